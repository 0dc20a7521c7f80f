"""Fast adaptive boundary (FAB): step to the linearized boundary, drawn back towards the clean input.

With x_0 the clean input, p(x) the point of the plane m(x_k) + <grad m(x_k), z - x_k> = 0 nearest to x in the box
(m the margin over one rival) and d(x) = p(x) - x,

    x_{k+1} = clip((1 - a) (x_k + eta d(x_k)) + a (x_0 + eta d(x_0))),
    a = min(|d(x_k)| / (|d(x_k)| + |d(x_0)|), 0.1),    eta = 1.05,

and a success is drawn back to x_0 + 0.9 (x_k - x_0) first. Rivals are taken one after the other, nearest to first
order first, each from where the nearest success so far lies half way. Towards a target m is the margin of the best
other class, smoothed at a falling temperature: where several classes are in the way, steps onto one plane after the
other would only come near their corner. At the end the gap to the input is halved a few times.

Source: Croce, Hein 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack" (arXiv
1907.02044), sections 2.3 to 2.5; one rival at a time as in the authors' FAB-T (arXiv 2003.01690).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from brittle.attacks.descent import half_cosine
from brittle.attacks.geometry import size, spread
from brittle.attacks.losses import soft_margin
from brittle.attacks.planes import to_plane
from brittle.attacks.problem import Problem
from brittle.attacks.route import Guide, take_bearing
from brittle.attacks.search import Search
from brittle.bounds import within
from brittle.records import AttackRows

OVERSHOOT, MOST_BIAS, BACKWARD = 1.05, 0.1, 0.9
"""eta, the largest a, and how far a success is drawn back."""

LINE_SEARCH = 6
"""Halvings at the end."""

TEMPERATURE = (0.2, 0.005)
"""First and last temperature of the margin to a target, in units of the clean margin."""


def fab(problem: Problem, *, generator: torch.Generator, steps: int = 100, rivals: int = 5) -> AttackRows:
    """A minimal-norm attack in L1, L2 or Linf.

    Args:
        steps: of all rivals together.
        rivals: how many classes to go for.

    Towards a target in L1 it found nothing for 5 to 20 % of linear models' inputs; `fmn` came within 1 % there.

    Cost: at most 1 + `rivals` + `steps` + 6 evaluations an input.
    """
    search = Search(problem)
    with search:
        clean = search.look(problem.inputs)
        bearing = take_bearing(search, Guide.margin(problem), clean, rivals, generator)
        count = bearing.rivals.shape[1]
        for k, rival in enumerate(bearing.rivals.unbind(1)):
            start = problem.inputs if k == 0 else (problem.inputs + search.inputs) / 2
            _approach(search, rival, problem.margin(clean).abs(), start, steps // count + (k < steps % count))
        search.pull_in(LINE_SEARCH)
    return search.rows("FAB", "minimal")


def _approach(search: Search, rival: Tensor, scale: Tensor, points: Tensor, steps: int) -> None:
    """`steps` steps to where the rival, or the target, takes over. scale: (B,) the clean margin."""
    problem = search.problem
    clean, norm, bounds = problem.inputs, problem.norm, problem.bounds
    for k in range(steps):
        temperature = half_cosine(k / steps, *TEMPERATURE) * scale
        logits, gain, slope = search.gradient(points, partial(_gain, problem, rival, temperature))
        through = spread(problem.fooled(logits), points)
        base = torch.where(through, clean + BACKWARD * (points - clean), points)
        gap = lambda x, at=points, g=gain, s=slope: -g - _inner(s, x - at)  # noqa: E731
        home = to_plane(clean, slope, gap(clean), bounds, norm)
        step = to_plane(base, slope, gap(base), bounds, norm)
        near, far = size(step, norm), size(home, norm)
        bias = spread((near / (near + far).clamp_min(torch.finfo(far.dtype).tiny)).clamp_max(MOST_BIAS), points)
        mixed = (1 - bias) * (base + OVERSHOOT * step) + bias * (clean + OVERSHOOT * home)
        points = within(torch.where(mixed.isfinite(), mixed, points), bounds)


def _gain(problem: Problem, rival: Tensor, temperature: Tensor, logits: Tensor) -> Tensor:
    """Minus the margin: over the rival, or of the other classes over the target."""
    if problem.targets is not None:
        return soft_margin(logits, problem.labels, problem.targets, temperature)
    pick = lambda column: logits.gather(1, column[:, None])[:, 0]  # noqa: E731
    return pick(rival) - pick(problem.labels)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)

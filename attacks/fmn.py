"""Fast minimum-norm (FMN): a descent in a ball whose radius follows success, in L0, L1, L2 and Linf.

    epsilon <- min(epsilon, |d*|) (1 - g_k) where x + d succeeds (|d*| the smallest success so far),
               epsilon (1 + g_k) where it does not, (|d| + m / |grad m|_dual) (1 + g_k) where it never did,
    d       <- P_epsilon(d - a_k grad m / |grad m|_2),

with m the margin, P the projection on the ball within the bounds (exact, `geometry.into_ball`), and a_k, g_k falling
along a half cosine (`STEP`, `SHRINK`). In L0 epsilon counts coordinates and moves by one at least. At the end the gap
to the input is halved; in L0 coordinates go back to where they were, half as many at a time. Towards a target the
margin's maximum over the other classes is smoothed at a falling temperature.

Source: Pintor, Roli, Brendel, Biggio 2021, "Fast minimum-norm adversarial attacks through adaptive norm constraints"
(arXiv 2102.12827), algorithm 1.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from brittle.attacks.descent import half_cosine
from brittle.attacks.geometry import dual_size, into_ball, room, size, steepest
from brittle.attacks.losses import soft_margin
from brittle.attacks.problem import Problem
from brittle.attacks.route import Guide, take_bearing
from brittle.attacks.search import Search
from brittle.bounds import width, within
from brittle.records import AttackRows

SHRINK = (0.05, 1e-4)
"""First and last share g_k."""

STEP = {"l0": (1.0, 0.01), "l1": (1.0, 0.01), "l2": (1.0, 0.01), "linf": (2.0, 0.001)}
"""First and last a_k, in units of the bounds' width."""

LINE_SEARCH = 8
"""Halvings at the end."""

TEMPERATURE = (0.2, 0.005)
"""First and last temperature of the margin to a target, in units of the clean margin."""

RIVALS = 5
"""Classes among which the second descent looks for the nearest."""


def fmn(problem: Problem, *, generator: torch.Generator, steps: int = 100) -> AttackRows:
    """A minimal-norm attack in L0, L1, L2 or Linf.

    The first half of the steps goes for any class, the second for the rival that is nearest to first order (or both for
    the target): a descent on the margin over all classes stays with the one that it meets first.
    Towards a target in L0 linear models came out at the optimum for 95 % of inputs, one or two numbers above it else.
    Cost: at most 1 + 5 + `steps` + 8 evaluations an input.
    """
    search = Search(problem)
    with search:
        clean = search.look(problem.inputs)
        scale = problem.margin(clean).abs()
        rivals = take_bearing(search, Guide.margin(problem), clean, RIVALS, generator).rivals[:, 0]
        _descend(problem, search, scale, steps - steps // 2, generator)
        aimed = problem.aimed(rivals) if problem.targets is None else problem
        _descend(aimed, search, scale, steps // 2, generator)
        if problem.norm == "l0":
            thin_out(search, LINE_SEARCH)
        else:
            search.pull_in(LINE_SEARCH)
    return search.rows("FMN", "minimal")


def _descend(problem: Problem, search: Search, scale: Tensor, steps: int, generator: torch.Generator) -> None:
    """One descent from the inputs towards success at `problem`: that of the search, or aimed at other targets."""
    norm, unit = problem.norm, width(problem.bounds)
    points, farthest = problem.inputs, room(problem.inputs, problem.bounds, norm)
    radius, nearest = torch.full_like(farthest, torch.inf), torch.full_like(farthest, torch.inf)
    for k in range(steps):
        temperature = half_cosine(k / steps, *TEMPERATURE) * scale
        logits, gain, slope = search.gradient(points, partial(_gain, problem, temperature))
        through, far = problem.fooled(logits), size(points - problem.inputs, norm)
        nearest = torch.where(through, nearest.minimum(far), nearest)
        share = half_cosine(k / steps, *SHRINK)
        linear = far - gain.clamp_max(0) / (dual_size(slope, norm) * (unit if norm == "l0" else 1.0))
        first = linear.ceil() if norm == "l0" else linear * (1 + share)
        outside = torch.where(nearest.isinf(), first.nan_to_num(torch.inf), _changed(radius, 1 + share, norm))
        radius = torch.where(through, _changed(radius.minimum(nearest), 1 - share, norm), outside).minimum(farthest)
        length = half_cosine(k / steps, *STEP[norm]) * unit
        points = into_ball(
            points + length * steepest(slope, "l2", generator), problem.inputs, radius, problem.bounds, norm
        )


def thin_out(search: Search, steps: int) -> None:
    """Put back coordinates of each success, those that moved least first. Cost: `steps` evaluations an input.

    Half of the changed ones at first; as many again where that still succeeds, half as many where it does not.
    """
    problem, count = search.problem, size(search.inputs - search.problem.inputs, "l0")
    back = (count / 2).ceil()
    for _ in range(steps):
        offset = search.inputs - problem.inputs
        changed = size(offset, "l0")
        kept = (changed - back.minimum((changed - 1).clamp_min(0))).clamp_min(1)
        tried = into_ball(search.inputs, problem.inputs, kept, problem.bounds, "l0")
        before = search.best.clone()
        search.look(within(tried, problem.bounds))
        back = torch.where(search.best < before, back, (back / 2).floor()).clamp_min(1)


def _changed(radius: Tensor, factor: float, norm: str) -> Tensor:
    if norm != "l0":
        return radius * factor
    return (
        (radius * factor).ceil().maximum(radius + 1)
        if factor > 1
        else (radius * factor).floor().minimum(radius - 1).clamp_min(1)
    )


def _gain(problem: Problem, temperature: Tensor, logits: Tensor) -> Tensor:
    if problem.targets is None:
        return -problem.margin(logits)
    return soft_margin(logits, problem.labels, problem.targets, temperature)

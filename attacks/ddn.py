"""Decoupled direction and norm (DDN): a minimal-norm attack in L2 whose radius follows success.

With w the widest range of a value, d = 0 and r = w at first, and a_k falling from 1 to 1/100 along a half cosine,

    d <- d + a_k w g / |g|,        r <- r (1 - GAMMA) where x + d succeeded, r (1 + GAMMA) where it did not,
    d <- clip(x + r d / |d|) - x.

foolbox's DDN gives the same points to rounding (tests/test_attacks.py). Here a step writes over the tensors of
the last one and draws noise only where it is needed (benchmarks/attacks.md has what that saves).

Source: Rony, Hafemann, Oliveira, Ben Ayed, Sabourin, Granger 2019, "Decoupling direction and norm for efficient
gradient-based L2 adversarial attacks and defenses" (arXiv 1811.09600), algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from brittle.attacks.descent import half_cosine
from brittle.attacks.geometry import room, size, spread, steepest
from brittle.attacks.losses import cross_entropy
from brittle.attacks.problem import Problem
from brittle.attacks.route import Guide, take_bearing
from brittle.attacks.search import Search
from brittle.bounds import width, within
from brittle.records import AttackRows

GAMMA = 0.05
"""Share by which the radius shrinks or grows."""

STEP = (1.0, 0.01)
"""First and last a_k."""

LINE_SEARCH = 6
"""Halvings at the end."""

RIVALS = 5
"""Classes among which the last third looks for the nearest."""

SHARP = 20.0
"""Logits that the clean margin counts for in the last third."""


def ddn(problem: Problem, *, generator: torch.Generator, steps: int = 100) -> AttackRows:
    """Decoupled direction and norm, a minimal-norm attack in L2.

    Two thirds of the steps climb the cross entropy; the last third goes for the rival that is nearest to first order
    (or the target), with logits so large that its cross entropy looks at one rival at a time: by the first alone
    linear models of five classes came out up to 16 % too far. The gap to the input is halved at the end, since the
    last steps are a hundredth of the bounds' width. Cost: at most 1 + 5 + `steps` + 6 evaluations an input.
    """
    search = Search(problem)
    with search:
        clean = search.look(problem.inputs)
        bearing = take_bearing(search, Guide.margin(problem), clean, RIVALS, generator)
        step_out(problem, search, steps - steps // 3, generator)
        sharpness = SHARP / problem.margin(clean).abs().clamp_min(torch.finfo(clean.dtype).tiny)
        step_out(problem.aimed(bearing.rivals[:, 0]), search, steps // 3, generator, sharpness[:, None])
        search.pull_in(LINE_SEARCH)
    return search.rows("DDN", "minimal")


def step_out(
    problem: Problem, search: Search, steps: int, generator: torch.Generator, sharpness: Tensor | float = 1.0
) -> None:
    """DDN from the inputs; `search` keeps what is met on the way.

    Args:
        problem: what counts as success here: that of the search, or the same aimed at other targets.
        sharpness: (B, 1) by which logits are multiplied.

    Cost: `steps` evaluations an input.
    """
    inputs, bounds, wide = problem.inputs, problem.bounds, width(problem.bounds)
    points, offset, way = inputs.clone(), torch.zeros_like(inputs), torch.empty_like(inputs)  # written over
    farthest = room(inputs, bounds, "l2")
    radius = torch.full_like(farthest, wide)

    def loss(logits: Tensor) -> Tensor:
        return cross_entropy(logits * sharpness, problem.labels, problem.targets)

    for k in range(steps):
        logits, _, gradient = search.gradient(points, loss)
        length = half_cosine(k / steps, *STEP) * wide
        offset.add_(steepest(gradient, "l2", generator, out=way), alpha=length)
        radius = torch.where(problem.fooled(logits), radius * (1 - GAMMA), radius * (1 + GAMMA)).minimum(farthest)
        scale = radius / size(offset, "l2").clamp_min(torch.finfo(radius.dtype).tiny)
        points = within(torch.addcmul(inputs, spread(scale, offset), offset, out=points), bounds, out=points)
        torch.sub(points, inputs, out=offset)

"""Minimal-norm descent on a sphere whose radius follows success.

Each input x_0 has a radius r, that of the sphere around it on which its iterate x moves:

    x <- P_r(x + a_k r s),        r <- r (1 - g_k) where x succeeds,  r (1 + g_k) where it does not,

with s the steepest direction of the soft margin, P_r the projection within the bounds (exact in both norms), and
a_k, g_k falling along a half cosine. Direction and norm are decoupled as in DDN. Steps in units of r, a temperature
in units of the clean margin and a first-order first radius make the descent independent of the scale of inputs and
logits. The soft margin looks at all rivals at once: on a plain MNIST CNN a hard margin ended 2 % farther away.

Sources: Rony, Hafemann, Oliveira, Ben Ayed, Sabourin, Granger 2019, "Decoupling direction and norm for efficient
gradient-based L2 adversarial attacks and defenses" (arXiv 1811.09600); Pintor, Roli, Brendel, Biggio 2021, "Fast
minimum-norm adversarial attacks through adaptive norm constraints" (arXiv 2102.12827).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from brittle.attacks.geometry import dual_size, into_ball, onto_sphere, room, size, spread, steepest
from brittle.attacks.losses import soft_margin
from brittle.attacks.problem import Problem
from brittle.attacks.search import Search


@dataclass(frozen=True)
class Descent:
    """How the steps go; the figures were chosen on MNIST CNNs, plain and adversarially trained."""

    step: tuple[float, float] = (2.0, 0.01)
    """First and last length a_k of a step, in units of the radius."""
    radius: tuple[float, float] = (0.15, 0.002)
    """First and last share g_k by which the radius grows or shrinks."""
    temperature: tuple[float, float] = (0.18, 0.012)
    """First and last temperature of the soft margin, in units of the clean margin."""


def descend(
    problem: Problem,
    search: Search,
    start: Tensor,
    scale: Tensor,
    how: Descent,
    steps: int,
    generator: torch.Generator,
    radius: Tensor | None = None,
) -> None:
    """Move from `start` towards the nearest success of `problem`; `search` keeps what is met on the way.

    Args:
        problem: what counts as success here: that of the search, or the same aimed at other targets.
        start: (B, *input) within the bounds.
        scale: (B,) the clean margin, logits, in which temperatures are measured.
        radius: (B,) the first radius; by default the best distance so far, or the first-order one at the start where
            there is none.

    Cost: `steps` evaluations an input.
    """
    points, radius = start, search.best.clone() if radius is None else radius
    farthest = room(problem.inputs, problem.bounds, problem.norm)

    for k in range(steps):
        temperature = half_cosine(k / steps, *how.temperature) * scale
        loss = partial(soft_margin, labels=problem.labels, targets=problem.targets, temperature=temperature)
        logits, _, gradient = search.gradient(points, loss)
        through, far = problem.fooled(logits), size(points - problem.inputs, problem.norm)
        if k == 0:
            linear = far + problem.margin(logits).abs() / dual_size(gradient, problem.norm)
            radius = torch.where(radius.isfinite(), radius, linear.nan_to_num(torch.inf))
        share = half_cosine(k / steps, *how.radius)
        radius = torch.where(through, torch.minimum(radius, far) * (1 - share), radius * (1 + share))
        radius = torch.minimum(radius, farthest)
        length = half_cosine(k / steps, *how.step) * radius
        moved = points + spread(length, points) * steepest(gradient, problem.norm, generator)
        points = _onto(problem, moved, radius)


def half_cosine(share: float, first: float, last: float) -> float:
    """From `first` at share 0 down to `last` at share 1."""
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def _onto(problem: Problem, points: Tensor, radius: Tensor) -> Tensor:
    """P_r. In Linf the ball's projection: a step of twice the radius ends on its surface in any case."""
    if problem.norm == "linf":
        return into_ball(points, problem.inputs, radius, problem.bounds, "linf")
    return onto_sphere(points, problem.inputs, radius, problem.bounds)

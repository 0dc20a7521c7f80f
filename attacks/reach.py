"""How far a prediction reaches: the minimal adversarial distance predicted in a few gradient passes.

Let m(r) be the least margin within distance r of an input x. It falls with r, its root is the minimal distance, and
where the bounds do not matter its slope at a minimiser z is -|grad margin(z)|_*, the dual norm (the Lagrange multiplier
of the ball). So Newton's method on that curve needs no more than what a step of descent computes anyway:

    r <- |z - x| + margin(z) / |grad margin(z)|_*,        z <- P_r(z + a_k r s),

with s the steepest direction, P_r the projection onto the sphere of radius r within the bounds, and r kept within a
factor 1 +- g_k of what it was. The last r is the prediction. An attack of ten steps tells the radius where it happens
to break through; this one also uses how steeply the margin still falls where it does not.

The passes may go through several networks in turn, such as the states of the late path: they share most of their holes
with the final one, and none of these passes goes through its weights. Where the predictions of the networks differ the
distance is settled late.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.attacks.descent import half_cosine
from brittle.attacks.geometry import dual_size, into_ball, onto_sphere, room, size, spread, steepest
from brittle.attacks.losses import soft_margin
from brittle.attacks.problem import Logits, Problem

LENGTH, GROWTH, TEMPERATURE = (2.0, 0.5), (0.3, 0.05), (0.18, 0.012)
"""First and last a_k, g_k, and temperature of the soft margin in units of the clean margin."""


@dataclass(frozen=True)
class Reach:
    """What K passes met: distances, margins and slopes at K points of M inputs; and where the search ended."""

    far: Tensor  # shape: (K, M), |z_k - x|
    lead: Tensor  # shape: (K, M), logits, below 0 where the prediction has flipped
    slope: Tensor  # shape: (K, M), logits per unit of distance
    radius: Tensor  # shape: (M,) the last r
    points: Tensor  # shape: (M, *input) the last z, not asked about yet

    @property
    def roots(self) -> Tensor:
        """Where the margin would vanish to first order, as each pass saw it: (K, M)."""
        return self.far + self.lead / self.slope.clamp_min(torch.finfo(self.slope.dtype).tiny)


def reach(
    problem: Problem,
    steps: int,
    *,
    through: Sequence[Logits] = (),
    start: Tensor | None = None,
    radius: Tensor | None = None,
    length: tuple[float, float] = LENGTH,
    growth: tuple[float, float] = GROWTH,
    generator: torch.Generator | None = None,
) -> Reach:
    """Newton's method on the least margin against the radius, K = `steps` gradient passes an input.

    Args:
        problem: inputs that are right, with their classes, or with targets; in L2 or Linf.
        through: networks that the passes go through in turn; the problem's own where left out.
        start: the first points, (M, *input), within the bounds; the inputs themselves where left out.
        radius: the first r, (M,); the first-order distance where left out.
        length, growth: first and last a_k and g_k.
        generator: of directions where a gradient vanishes.

    Cost: `steps` gradient passes an input, and one forward pass for the clean margin.
    """
    asked = through or (problem.logits,)
    inputs, labels, targets, norm = problem.inputs, problem.labels, problem.targets, problem.norm
    points = inputs if start is None else start
    r = inputs.new_full((len(inputs),), torch.inf) if radius is None else radius
    farthest = room(inputs, problem.bounds, norm)
    with torch.no_grad():
        scale = problem.margin(problem.logits(inputs)).abs().clamp_min(1e-6)
    met = []
    for k in range(steps):
        share = k / steps
        temperature = half_cosine(share, *TEMPERATURE) * scale
        z = points.detach().requires_grad_()
        logits = asked[k % len(asked)](z)
        (slope,) = torch.autograd.grad(soft_margin(logits, labels, targets, temperature).sum(), z)
        lead, far, steep = problem.margin(logits.detach()), size(points - inputs, norm), dual_size(slope, norm)
        met.append((far, lead, steep))
        root = far + lead / steep.clamp_min(torch.finfo(steep.dtype).tiny)
        g = half_cosine(share, *growth)
        r = torch.where(r.isfinite(), torch.minimum(torch.maximum(root, r * (1 - g)), r * (1 + g)), root)
        r = r.clamp_min(0).minimum(farthest)
        moved = points + spread(half_cosine(share, *length) * r, points) * steepest(slope, norm, generator)
        points = _onto(problem, moved, r)
    far, lead, slopes = (torch.stack(column) for column in zip(*met, strict=True))
    return Reach(far, lead, slopes, r, points)


def _onto(problem: Problem, points: Tensor, radius: Tensor) -> Tensor:
    """P_r; in Linf the ball's projection, at whose surface a step of its width ends in any case."""
    if problem.norm == "linf":
        return into_ball(points, problem.inputs, radius, problem.bounds, "linf")
    return onto_sphere(points, problem.inputs, radius, problem.bounds)

"""Distances, steepest directions and projections in L2 and Linf, inside the bounds.

For a clean input x in the box [low, high], the points within radius r of x that the box allows are a convex set
whose nearest point to any z is, in Linf, the clipped z, and in L2

    clip(x + t (z - x)),    t in [0, 1] such that its distance to x is r (or t = 1),

because the Lagrangian of the projection splits over the coordinates. With F the coordinates that the box leaves
free at t and S those it stopped, |clip(x + t d) - x|^2 = sum_S room^2 + t^2 sum_F d^2, so t is found by solving this
for the S of the last t, starting with none: it rises to the solution, never beyond it, and stays there once S does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from brittle.records import Norm

Bounds = tuple[float, float]

ROUNDS = 12
"""Most rounds of the search for t; it stops when no input moves any more, after three or four as a rule."""

SETTLED = 1e-4
"""Relative change of t at which it does."""


def size(offset: Tensor, norm: Norm) -> Tensor:
    """Norm of each row. offset: (B, *input) -> (B,)."""
    flat = offset.flatten(1)
    return flat.norm(dim=1) if norm == "l2" else flat.abs().amax(1)


def dual_size(gradient: Tensor, norm: Norm) -> Tensor:
    """The most that a function with this gradient changes per unit of distance: the dual norm, (B,)."""
    flat = gradient.flatten(1)
    return flat.norm(dim=1) if norm == "l2" else flat.abs().sum(1)


def distance(inputs: Tensor, others: Tensor, norm: Norm) -> Tensor:
    """Distance of each input to its counterpart, (B,), computed in float64."""
    return size(others.double() - inputs.double(), norm)


def steepest(gradient: Tensor, norm: Norm, generator: torch.Generator | None = None) -> Tensor:
    """The direction of size 1 that climbs fastest: g / |g| in L2, sign(g) in Linf.

    Where a gradient vanishes or is not finite a random direction takes its place (drawn from `generator`).
    """
    largest = size(gradient, "linf")
    lost = ~((largest > 0) & largest.isfinite())
    if lost.any():
        noise = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype).to(gradient.device)
        gradient = torch.where(spread(lost, gradient), noise, gradient)
        largest = size(gradient, "linf")
    if norm == "linf":
        return gradient.sign()
    scaled = gradient / spread(largest, gradient)  # so that squares of tiny gradients do not underflow
    return scaled / spread(size(scaled, "l2"), gradient)


def spread(values: Tensor, like: Tensor) -> Tensor:
    """One value an input, shaped to multiply inputs: (B,) -> (B, 1, ..., 1)."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def room(inputs: Tensor, bounds: Bounds, norm: Norm) -> Tensor:
    """Distance of each input to the farthest corner of the box, (B,): no adversarial lies farther."""
    low, high = bounds
    return size(torch.maximum(inputs - low, high - inputs), norm)


def into_ball(points: Tensor, centres: Tensor, radius: Tensor, bounds: Bounds, norm: Norm) -> Tensor:
    """The nearest points that lie within `radius` (B,) of the centres and within the bounds; exact in both norms.

    The centres lie within the bounds.
    """
    if norm == "linf":
        near = torch.minimum(torch.maximum(points, centres - spread(radius, points)), centres + spread(radius, points))
        return near.clamp(*bounds)
    offset = points - centres
    return _along(centres, offset, radius, bounds, longest=1.0)


def onto_sphere(points: Tensor, centres: Tensor, radius: Tensor, bounds: Bounds) -> Tensor:
    """The points clip(centre + t (point - centre)) at L2 distance `radius`, or as far as the bounds let them go."""
    return _along(centres, points - centres, radius, bounds, longest=torch.inf)


def _along(centres: Tensor, offset: Tensor, radius: Tensor, bounds: Bounds, longest: float) -> Tensor:
    """clip(centre + t offset) with t at most `longest` and, if it can be, of L2 size `radius`."""
    low, high = bounds
    steps = offset.flatten(1).abs()  # shape: (B, D)
    stops = torch.where(offset > 0, high - centres, centres - low).flatten(1)
    ends, steps, stops = stops / steps, steps.square(), stops.square()  # a coordinate is stopped at t = its end
    moving, stopped = steps.sum(1), torch.zeros_like(radius)
    t = torch.zeros_like(radius)
    for _ in range(ROUNDS):
        further = ((radius.square() - stopped).clamp_min(0) / moving).sqrt().clamp_max(longest)
        further = torch.where(moving > 0, torch.maximum(further, t), t)
        settled = torch.allclose(further, t, rtol=SETTLED, atol=0)
        t = further
        if settled:
            break
        free = (ends > t[:, None]).to(steps)
        moving, stopped = (steps * free).sum(1), (stops * (1 - free)).sum(1)
    return (centres + spread(t, offset) * offset).clamp(low, high)

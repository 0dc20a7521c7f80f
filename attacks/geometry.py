"""Distances, steepest directions and projections in L0, L1, L2 and Linf, inside the bounds.

For a clean input x in the box [low, high], the points within radius r of x that the box allows are, but for L0, a
convex set. With d = z - x, its point nearest to any z is

    Linf    the clipped z
    L2      clip(x + t d),                  t in [0, 1] such that its distance to x is r (or t = 1)
    L1      clip(x + sign(d) (|d| - t)+),   t >= 0 such that its distance to x is r (or t = 0)
    L0      clip(z) in the r coordinates where that comes nearest to z, x in the others

because the Lagrangian of the projection splits over the coordinates, and x lies in the box. In L2, with F the
coordinates that the box leaves free at t and S those it stopped, |clip(x + t d) - x|^2 = sum_S room^2 + t^2 sum_F d^2:
t is found by solving this for the S of the last t, starting with none: it rises to the solution, never beyond it, and
stays there once S does. In L1, t is bisected.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from brittle.bounds import Bounds, ends, within
from brittle.records import Norm

Projection = Callable[[Tensor], Tensor]
"""Points (B, *input) -> points."""

ROUNDS = 12
"""Most rounds of the search for t in L2; it stops when no input moves any more, after three or four as a rule."""

SETTLED = 1e-4
"""Relative change of t at which it does."""

ROUNDING, ULPS = 1e-5, 4
"""What may lie beyond epsilon for rounding: relative to it, and in units of the largest input's last place."""

HALVINGS = 40
"""Of the interval of t in L1."""


def size(offset: Tensor, norm: Norm) -> Tensor:
    """Norm of each row. offset: (B, *input) -> (B,)."""
    flat = offset.flatten(1)
    if norm == "l2":
        return flat.norm(dim=1)
    if norm == "linf":
        return torch.maximum(flat.amax(1), -flat.amin(1))  # no copy of the offset is made
    return flat.abs().sum(1) if norm == "l1" else (flat != 0).sum(1).to(flat)


def dual_size(gradient: Tensor, norm: Norm) -> Tensor:
    """The most that a function with this gradient changes per unit of distance: the dual norm, (B,).

    In L0, where there is no such bound, as in L1: per coordinate that moves by 1.
    """
    flat = gradient.flatten(1)
    if norm == "l2":
        return flat.norm(dim=1)
    return flat.abs().sum(1) if norm == "linf" else flat.abs().amax(1)


def distance(inputs: Tensor, others: Tensor, norm: Norm) -> Tensor:
    """Distance of each input to its counterpart, (B,), computed in float64."""
    return size(others.double() - inputs, norm)


def steepest(
    gradient: Tensor, norm: Norm, generator: torch.Generator | None = None, out: Tensor | None = None
) -> Tensor:
    """The direction of size 1 that climbs fastest: g / |g| in L2, sign(g) in Linf, one coordinate in L1 and L0.

    Where a gradient vanishes or is not finite a random direction takes its place (drawn from `generator`). In L2 and
    Linf it is written to `out` if given, which may not be the gradient.
    """
    if norm in ("l2", "linf") and len(gradient):
        length = size(gradient, "l2")
        least = torch.finfo(length.dtype).tiny ** 0.4  # above it no square underflows that counts
        low, high = torch.stack(torch.aminmax(length)).tolist()
        if least < low <= high < torch.inf:
            if norm == "linf":
                return torch.sign(gradient, out=out)
            return torch.div(gradient, spread(length, gradient), out=out)
    # of a tiny gradient the size in L1 does not underflow as that in L2 does
    length = torch.abs(gradient, out=out).flatten(1).sum(1)
    if len(length) and not 0 < length.min().item() <= length.max().item() < torch.inf:
        lost = ~((length > 0) & length.isfinite())
        noise = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype).to(gradient.device)
        gradient = torch.where(spread(lost, gradient), noise, gradient)
    if norm == "linf":
        return torch.sign(gradient, out=out)
    if norm in ("l1", "l0"):
        flat = gradient.flatten(1)
        top = flat.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign()).reshape(gradient.shape)
    scaled = gradient / spread(size(gradient, "linf"), gradient)  # so that squares do not underflow
    return torch.div(scaled, spread(size(scaled, "l2"), gradient), out=out)


def spread(values: Tensor, like: Tensor) -> Tensor:
    """One value an input, shaped to multiply inputs: (B,) -> (B, 1, ..., 1)."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def put(rows: Tensor, these: Tensor, others: Tensor, spare: Tensor) -> None:
    """Write some rows (B',) int64 of `these` over those of `others`; faster than a `where` that is broadcast.

    spare: (B, *input), contiguous; what it held is lost.
    """
    if len(rows):
        others.index_copy_(0, rows, torch.index_select(these, 0, rows, out=spare[: len(rows)]))


def reached(epsilon: float, bounds: Bounds) -> float:
    """Epsilon, and what rounding may add to it: in single precision inputs round to about 1e-7 of the bounds."""
    return epsilon * (1 + ROUNDING) + ULPS * torch.finfo(torch.float32).eps * max(map(abs, ends(bounds)))


def room(inputs: Tensor, bounds: Bounds, norm: Norm) -> Tensor:
    """Distance of each input to the farthest corner of the box, (B,): no adversarial lies farther."""
    low, high = bounds
    return size(torch.maximum(inputs - low, high - inputs), norm)


def into_ball(points: Tensor, centres: Tensor, radius: Tensor, bounds: Bounds, norm: Norm) -> Tensor:
    """The nearest points that lie within `radius` (B,) of the centres and within the bounds; exact in every norm.

    The centres lie within the bounds. In L0 the radius counts coordinates and is rounded down.
    """
    return ball(centres, radius, bounds, norm)(points)


def ball(centres: Tensor, radius: Tensor, bounds: Bounds, norm: Norm, over: bool = False) -> Projection:
    """`into_ball` for many points: in Linf the ball is a box, whose corners are found once.

    over: the projection may write its result over its argument.
    """
    if norm == "linf":
        reach = spread(radius, centres)
        low, high = within(centres - reach, bounds), within(centres + reach, bounds)
        return lambda points: torch.clamp(points, low, high, out=points if over else None)
    if norm == "l2":
        return lambda points: _along(centres, points - centres, radius, bounds, longest=1.0)
    if norm == "l1":
        return lambda points: _shrunk(centres, points - centres, radius, bounds)
    return lambda points: _fewest(centres, points, radius, bounds)


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
    return within(centres + spread(t, offset) * offset, bounds)


def _shrunk(centres: Tensor, offset: Tensor, radius: Tensor, bounds: Bounds) -> Tensor:
    """L1: the offset's coordinates drawn towards 0 by the same length, then clipped."""
    at = lambda t: within(centres + offset.sign() * (offset.abs() - spread(t, offset)).clamp_min(0), bounds)  # noqa: E731
    low, high = torch.zeros_like(radius), size(offset, "linf")
    inside = size(at(low) - centres, "l1") <= radius
    for _ in range(HALVINGS):
        half = (low + high) / 2
        fits = size(at(half) - centres, "l1") <= radius
        low, high = torch.where(fits, low, half), torch.where(fits, half, high)
    return at(torch.where(inside, 0, high))


def _fewest(centres: Tensor, points: Tensor, radius: Tensor, bounds: Bounds) -> Tensor:
    """L0: those `radius` coordinates changed that bring the clipped point nearest."""
    clipped = within(points, bounds)
    gain = ((points - centres).square() - (points - clipped).square()).flatten(1)
    rank = gain.argsort(dim=1, descending=True).argsort(dim=1)
    kept = (rank < radius.floor()[:, None]).reshape(points.shape)
    return torch.where(kept, clipped, centres)

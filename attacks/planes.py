"""The nearest point of a plane inside the bounds: what linearized attacks step to.

Among the d with x + d in the box, the smallest one that gains <n, d> = gap >= 0. With a = |n| and s the room that the
box leaves in the direction of n, all coordinates move in that direction, by

    Linf    min(t, s)            L2    min(t a, s),           t >= 0 such that the gain is reached
    L1      s, coordinate by coordinate in the order of a, until the gain is reached; the last one in part

In the first two the gain grows with t in straight pieces between the sorted s (or s / a), so that t is exact.

Source: Croce, Hein 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack" (arXiv
1907.02044), section 2.2, for L1, L2 and Linf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from brittle.bounds import Bounds
from brittle.records import Norm


def to_plane(points: Tensor, normal: Tensor, gap: Tensor, bounds: Bounds, norm: Norm) -> Tensor:
    """The smallest step from each point to its plane, (B, *input); the step to the corner where none reaches it.

    Args:
        points: (B, *input) within the bounds.
        normal: (B, *input) gradient of what is to be gained.
        gap: (B,) what is to be gained; where it is negative, lost.
        norm: L1, L2 or Linf.
    """
    low, high = bounds
    normal = torch.where(gap.reshape(-1, *[1] * (normal.dim() - 1)) < 0, -normal, normal)
    rate = normal.flatten(1).abs()  # shape: (B, D)
    stops = torch.where(normal > 0, high - points, points - low).flatten(1).clamp_min(0)
    stops = torch.where(rate > 0, stops, 0)
    gap = gap.abs()
    if norm in ("l2", "linf"):
        length = _together(rate, rate if norm == "l2" else torch.ones_like(rate), stops, gap)
    else:
        length = _in_turn(rate * stops, rate, gap) * stops
    return length.reshape(normal.shape) * normal.sign()


def _together(rate: Tensor, pace: Tensor, stops: Tensor, gap: Tensor) -> Tensor:
    """Lengths min(t pace, stops) with the t at which sum rate min(t pace, stops) = gap, (B, D)."""
    ends = torch.where(pace > 0, stops / pace.clamp_min(torch.finfo(pace.dtype).tiny), 0)  # t where it stops
    ends, order = ends.sort(dim=1)
    gained = (rate * stops).gather(1, order).cumsum(1)  # by those stopped so far, this one included
    speed = (rate * pace).gather(1, order)
    moving = speed.flip(1).cumsum(1).flip(1)  # of those not stopped before, this one included
    before = torch.cat([torch.zeros_like(gained[:, :1]), gained[:, :-1]], 1)
    reached = before + ends * moving  # the gain where the k-th stops; rises
    k = (reached < gap[:, None]).sum(1, keepdim=True).clamp_max(ends.shape[1] - 1)
    pick = lambda table: table.gather(1, k)[:, 0]  # noqa: E731
    t = ((gap - pick(before)) / pick(moving).clamp_min(torch.finfo(rate.dtype).tiny)).clamp_min(0)
    t = torch.minimum(t, ends[:, -1])
    return torch.minimum(t[:, None] * pace, stops)


def _in_turn(gains: Tensor, key: Tensor, gap: Tensor) -> Tensor:
    """Shares of each coordinate's whole gain, taken in falling order of `key` until they reach the gap, (B, D)."""
    order = key.argsort(dim=1, descending=True, stable=True)
    sorted_gains = gains.gather(1, order)
    before = sorted_gains.cumsum(1) - sorted_gains
    share = (gap[:, None] - before) / sorted_gains.clamp_min(torch.finfo(gains.dtype).tiny)
    share = torch.where(sorted_gains > 0, share.clamp(0, 1), 0)
    return torch.zeros_like(gains).scatter(1, order, share)

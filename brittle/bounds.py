"""The box that raw inputs lie in: the smallest and the largest value, of all numbers or of each channel."""

from __future__ import annotations

import torch
from torch import Tensor

Bounds = tuple[float, float] | tuple[Tensor, Tensor]
"""Numbers, or tensors that broadcast over one input, such as (C, 1, 1)."""


def within(points: Tensor, bounds: Bounds, out: Tensor | None = None) -> Tensor:
    """The nearest points within the bounds, written to `out` if given."""
    low, high = bounds
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return torch.clamp(points, torch.as_tensor(low).to(points), torch.as_tensor(high).to(points), out=out)
    return torch.clamp(points, low, high, out=out)


def moved(bounds: Bounds, device: torch.device) -> Bounds:
    """The same on a device."""
    low, high = bounds
    return (low.to(device), high.to(device)) if isinstance(low, Tensor) and isinstance(high, Tensor) else bounds


def ends(bounds: Bounds) -> tuple[float, float]:
    """The smallest and the largest value that any channel may take."""
    low, high = bounds
    return float(low.min() if isinstance(low, Tensor) else low), float(high.max() if isinstance(high, Tensor) else high)


def width(bounds: Bounds) -> float:
    """The widest range that a value has."""
    return float(torch.as_tensor(bounds[1] - bounds[0]).max())

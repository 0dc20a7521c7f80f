"""Numbers with their 95 % intervals."""

from __future__ import annotations

from torch import Tensor

from brittle.findings import Estimate


def median(values: Tensor) -> Estimate:
    """The median with its distribution-free interval, from order statistics (normal approximation of the ranks)."""
    ordered, n = values.sort().values, len(values)
    if n == 0:
        return Estimate(value=None, low=None, high=None)
    half = 0.98 * n**0.5
    low, high = max(0, round(n / 2 - half) - 1), min(n - 1, round(n / 2 + half))
    return Estimate(value=finite(ordered[(n - 1) // 2]), low=finite(ordered[low]), high=finite(ordered[high]))


def mean(values: Tensor) -> Estimate:
    """A mean of rates with its normal interval, kept within [0, 1]."""
    middle = values.mean().item()
    half = 1.96 * values.std().item() / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Estimate(value=middle, low=max(0.0, middle - half), high=min(1.0, middle + half))


def finite(value: Tensor) -> float | None:
    return value.item() if value.isfinite() else None

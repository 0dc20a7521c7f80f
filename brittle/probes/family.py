"""What a probe family is.

A family is a map a(x, s, d) with a(x, 0, d) = x, continuous in the severity s, inside the bounds. What is random
about it (a sign, a place, a pattern) is the draw d: taken once a query and kept for all severities, so that small
severities can be held against what happens later on the same curve. Failures are predicted and observed at the
family's *reference*; the shift map looks at `MAP_SHARES` of it and no further.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAP_SHARES = (1 / 8, 1 / 4)
"""Severities at which the shift map looks, as shares of the reference; never more than a quarter."""

Draw = Callable[[Tensor, torch.Generator], Tensor]
"""(inputs (M, *input), generator) -> the family's randomness, one row an input."""

Apply = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(inputs (M, *input), severity (M,), draws) -> probes (M, *input)."""


@dataclass(frozen=True)
class Family:
    """One kind of small change."""

    name: str
    unit: str  # of the severity
    reference: float  # severity at which failures are predicted and observed
    draw: Draw
    apply: Apply


def column(values: Tensor, like: Tensor) -> Tensor:
    """One number an input, shaped to broadcast over it. values: (M,), like: (M, *input)."""
    return values.to(like).reshape(-1, *[1] * (like.dim() - 1))

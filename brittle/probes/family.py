"""What a probe family is, and what the subject does under it.

A family is a map a(x, s, d) with a(x, 0, d) = x, continuous in the severity s, inside the bounds. What is random
about it (a sign, a place, a pattern) is the draw d: taken once a query and kept for all severities, so that small
severities can be held against what happens later on the same curve. Failures are predicted and observed at the
family's *reference*; the shift map looks at `MAP_SHARES` of it and no further.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.subject import Subject

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


def observed_failure(
    subject: Subject,
    inputs: Tensor,
    targets: Tensor,
    family: Family,
    draws: Tensor,
    levels: Sequence[float],
    *,
    batch: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Whether the subject misclassifies the probes at each level.

    Args:
        inputs: (M, *input), clean.  targets: (M,) true classes.  draws: one row an input, from `family.draw`.
        levels: K severities as shares of the family's reference.
        progress: called with (inputs done, M).

    Returns:
        Shape (M, K), bool.
    """
    failed = torch.zeros(len(inputs), len(levels), dtype=torch.bool)
    for start in range(0, len(inputs), batch):
        rows = slice(start, start + batch)
        for k, level in enumerate(levels):
            severity = inputs.new_full((len(inputs[rows]),), level * family.reference)
            probes = family.apply(inputs[rows], severity, draws[rows])
            failed[rows, k] = subject.predict(probes, batch).argmax(1) != targets[rows]
        if progress:
            progress(min(start + batch, len(inputs)), len(inputs))
    return failed


def failure_level(failed: Tensor, levels: Sequence[float]) -> Tensor:
    """The smallest level at which an input failed, infinite where it never did. failed: (M, K) -> (M,)."""
    at = torch.tensor(levels, dtype=torch.float64)
    return torch.where(failed, at, torch.inf).amin(1)


def column(values: Tensor, like: Tensor) -> Tensor:
    """One number an input, shaped to broadcast over it. values: (M,), like: (M, *input)."""
    return values.to(like).reshape(-1, *[1] * (like.dim() - 1))

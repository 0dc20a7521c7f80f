"""M vectors over the state, as the sweep holds them: one matrix for most tensors, low rank for large linear weights.

Which tensors are of low rank a `Layout` says. With none, everything is one matrix (M, P).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from brittle.kernel.factors import Factors
from brittle.kernel.gradients import Span
from brittle.kernel.lowrank import LowRank, added
from brittle.kernel.outer import Outer, Part

LEAST = 4096
"""Entries that a weight has at least, if it is to be of low rank."""


@dataclass(frozen=True)
class Layout:
    """Where the columns of the state are: `low` spans are of low rank, the others lie side by side in the matrix."""

    size: int  # P
    low: tuple[Span, ...] = ()

    @classmethod
    def common(cls, size: int, passes: Sequence[Factors]) -> Layout:
        """Large linear weights that were used once, without positions, in each of several passes."""
        spans = [{span for span, part in one.parts.items() if _is_single(part)} for one in passes]
        large = [(a, b) for a, b in sorted(set.intersection(*spans)) if b - a >= LEAST]
        return cls(size, tuple(large))

    @property
    def dense(self) -> list[slice]:
        """The columns in the matrix, in order."""
        edges = [0, *(edge for span in self.low for edge in span), self.size]
        return [slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]

    @property
    def width(self) -> int:
        """Columns of the matrix."""
        return self.size - sum(b - a for a, b in self.low)

    def place(self, columns: slice) -> slice:
        """Where columns of the state lie in the matrix."""
        before = sum(b - a for a, b in self.low if b <= columns.start)
        return slice(columns.start - before, columns.stop - before)

    def gathered(self, vector: Tensor) -> Tensor:
        """A vector over the state, (P,) -> what belongs to the matrix, (D,)."""
        return vector if not self.low else torch.cat([vector[columns] for columns in self.dense])


@dataclass(frozen=True)
class Mixed:
    """M vectors over the state."""

    layout: Layout
    dense: Tensor  # shape: (M, D)
    low: Mapping[Span, LowRank]

    def dot(self, vector: Tensor) -> Tensor:
        """Inner products with one vector, (P,) -> (M,)."""
        found = self.dense @ self.layout.gathered(vector)
        for (start, stop), part in self.low.items():
            found = found + part.dot(vector[start:stop])
        return found

    def plus(self, by: float, other: Mixed) -> Mixed:
        """Itself and `by` times another."""
        dense = torch.add(self.dense, other.dense, alpha=by)
        low = {span: added([part, other.low[span].scaled(by)]) for span, part in self.low.items()}
        return Mixed(self.layout, dense, low)

    def scaled(self, by: float) -> Mixed:
        return Mixed(self.layout, by * self.dense, {span: part.scaled(by) for span, part in self.low.items()})

    def shortened(self, tolerance: float) -> Mixed:
        """With as few terms as the tolerance allows; see `LowRank.shortened`."""
        return replace(self, low={span: part.shortened(tolerance) for span, part in self.low.items()})

    def multiplied_out(self) -> Mixed:
        """The same as one matrix, (M, P); what is missing is 0."""
        out = self.dense.new_zeros(len(self.dense), self.layout.size)
        for columns in self.layout.dense:
            out[:, columns] = self.dense[:, self.layout.place(columns)]
        for (start, stop), part in self.low.items():
            out[:, start:stop] = part.matrices()
        return Mixed(Layout(self.layout.size), out, {})


def rows_of(part: Part) -> LowRank:
    """The rows of a weight that a layout has of low rank, (B, 1, p) and (B, 1, d)."""
    assert isinstance(part, Outer)
    return LowRank(part.g[:, 0].transpose(1, 2), part.inputs[:, 0].transpose(1, 2))


def _is_single(part: Part) -> bool:
    return isinstance(part, Outer) and part.window is None and part.g.shape[1] == 1 and part.g.shape[3] == 1

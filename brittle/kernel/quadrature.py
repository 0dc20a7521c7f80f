"""The gradient of outputs along a segment of the path: midpoints, as many as the exact increment asks for.

A segment from w_a to w_b is taken as one straight line, D = w_b - w_a. With midpoints t_k = (k + 1/2) / n,

    Jbar = 1/n sum_k J(w_a + t_k D),        Jbar . D = f(w_b) - f(w_a) - (what quadrature missed),

and the increment on the right costs two forward passes, so the miss is known. Where it is too large the
number of midpoints is tripled; the old ones are among the new, and are not evaluated again. ReLU networks are
kinked along the line: many midpoints beat few Gauss nodes. For smooth models Gauss-Legendre nodes are exact to the
order of 2 n.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from brittle.kernel.factors import Factors, factors_of
from brittle.kernel.gradients import Scalar, Span, check_rows, row_gradients, row_pieces
from brittle.kernel.lowrank import LowRank, added, stacked
from brittle.kernel.mixed import Layout, Mixed, rows_of
from brittle.kernel.outer import formed
from brittle.path.flat import FlatModel
from brittle.records import Pairs
from brittle.subject import Subject

BLOCK = 256
"""Rows whose gradients are formed at once, at most."""

BLOCK_BYTES = 24 << 20
"""Bytes of row gradients at most: larger allocations go back to the system each time, and cost their pages anew."""

FEWEST = 8
"""Rows that are taken at once in any model: forward passes of fewer cost nearly as much."""

CHECKED = 5
"""Rows whose gradients are held against plain autograd before a model is trusted."""


@dataclass(frozen=True)
class Line:
    """The averaged gradient over one segment for M outputs."""

    jacobian: Mixed  # M rows
    nodes: int


@dataclass(frozen=True)
class Allowance:
    """What quadrature may miss on a line, in logits, means of absolute values over M outputs.

    Misses of either sign add up as the root of their number, and no faster: their sum is bounded besides each of them.
    """

    line: float  # the miss of this line alone
    total: float  # the sum of the misses up to this line
    so_far: Tensor  # shape: (M,) that sum before this line

    def covers(self, missed: Tensor, finely: bool) -> bool:
        """Whether a line may miss its increments by so much. missed: (M,).

        finely: the line has been taken so finely that no more is asked of it than of the sum.
        """
        by_line, in_all = missed.abs().mean().item(), (self.so_far + missed).abs().mean().item()
        return in_all <= self.total and (finely or by_line <= self.line)


def midpoints(n: int) -> list[float]:
    """The n midpoints of [0, 1]."""
    return [(k + 0.5) / n for k in range(n)]


def gauss_nodes(n: int) -> tuple[list[float], list[float]]:
    """The n Gauss-Legendre nodes of [0, 1], and their weights."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()


@torch.no_grad()
def outputs_at(subject: Subject, flat: FlatModel, state: Tensor, inputs: Tensor, pairs: Pairs) -> Tensor:
    """Margins of the pairs at one point of the path, in evaluation mode. inputs: (M, *input) -> (M,)."""
    flat.load(state)
    model = flat.eval()
    parts = [
        pairs[rows].margin(subject.class_logits(model, inputs[rows].to(flat.state)))
        for rows in blocks(len(inputs), 4 * BLOCK)
    ]
    return torch.cat(parts)


def output_pieces(
    subject: Subject, flat: FlatModel, state: Tensor, inputs: Tensor, pairs: Pairs
) -> Iterator[tuple[slice, Tensor]]:
    """J tensor by tensor: gradients of the pairs' margins at one point of the path, (columns, (M, p)); one pass."""
    return row_pieces(flat, _margins(subject, flat, state, inputs, pairs), len(inputs))


def output_gradients(subject: Subject, flat: FlatModel, state: Tensor, inputs: Tensor, pairs: Pairs) -> Tensor:
    """J as one matrix, (M, P)."""
    return row_gradients(flat, _margins(subject, flat, state, inputs, pairs), len(inputs))


def output_factors(subject: Subject, flat: FlatModel, state: Tensor, inputs: Tensor, pairs: Pairs) -> Factors:
    """The same in factors."""
    return factors_of(flat, _margins(subject, flat, state, inputs, pairs), len(inputs))


def _margins(subject: Subject, flat: FlatModel, state: Tensor, inputs: Tensor, pairs: Pairs) -> Scalar:
    """The sum of the pairs' margins at one point of the path, to be differentiated there."""
    flat.load(state)
    model, x = flat.eval(), inputs.to(flat.state)
    return lambda: pairs.margin(subject.class_logits(model, x)).sum()


def check_outputs(subject: Subject, flat: FlatModel) -> None:
    """Check on a few training examples that output gradients are what plain autograd finds, row by row.

    Raises `UnsupportedError` that names the parameter, where the model cannot be taken apart by examples.
    """
    model, x = flat.eval(), subject.train.inputs[:CHECKED].to(flat.state)
    pairs = Pairs.of(subject.class_logits(model, x).detach().cpu())
    check_rows(flat, lambda: pairs.margin(subject.class_logits(model, x)))


def line_gradient(
    subject: Subject,
    flat: FlatModel,
    ends: tuple[Tensor, Tensor],
    inputs: Tensor,
    pairs: Pairs,
    increment: Tensor,
    allowance: Allowance,
    nodes: int,
    most: int,
    gauss: bool = False,
    layout: Layout | None = None,
) -> Line:
    """Jbar over the straight line between two states.

    Args:
        layout: what of it is kept of low rank.
        ends: the states (P,) at both ends.
        increment: f(w_b) - f(w_a), shape (M,).
        allowance: where a miss goes beyond it the number of nodes is tripled, up to a third of `most` for the line's
            own miss, up to `most` for that of the sum.
        nodes: the number of midpoints to begin with.
        gauss: take as many Gauss-Legendre nodes instead, and do not refine.
    """
    low, high = ends
    layout, displacement = layout or Layout(len(flat)), (high - low).to(flat.state)

    def average(at: Sequence[float], weights: Sequence[float] | None = None) -> Mixed:
        weights = weights or [1 / len(at)] * len(at)
        take = _average_in_factors if layout.low else _average
        return take(subject, flat, [torch.lerp(low, high, t) for t in at], weights, inputs, pairs, layout)

    if gauss:
        return Line(average(*gauss_nodes(nodes)), nodes)
    jacobian, own = average(midpoints(nodes)), most // 3
    while True:
        missed = increment - jacobian.dot(displacement)
        if 3 * nodes > most or allowance.covers(missed, finely=3 * nodes > own):
            return Line(jacobian, nodes)
        nodes *= 3
        fresh = [t for k, t in enumerate(midpoints(nodes)) if k % 3 != 1]
        jacobian = jacobian.scaled(1 / 3).plus(2 / 3, average(fresh))


def blocks(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover `count` rows."""
    return (slice(i, min(i + size, count)) for i in range(0, count, size))


def row_blocks(count: int, flat: FlatModel) -> Iterator[slice]:
    """Slices that cover `count` rows, as many at once as the gradients of the largest tensor leave room for."""
    row = max(slot.shape.numel() for slot in flat.slots) * flat.state.element_size()
    return blocks(count, min(BLOCK, max(FEWEST, BLOCK_BYTES // max(row, 1))))


def _average(
    subject: Subject,
    flat: FlatModel,
    states: Sequence[Tensor],
    weights: Sequence[float],
    inputs: Tensor,
    pairs: Pairs,
    layout: Layout,
) -> Mixed:
    """The weighted mean of J over some states, as one matrix (M, P)."""
    out = flat.state.new_zeros(len(inputs), len(flat))
    for state, weight in zip(states, weights, strict=True):
        for rows in row_blocks(len(inputs), flat):
            for columns, piece in output_pieces(subject, flat, state, inputs[rows], pairs[rows]):
                out[rows, columns].add_(piece, alpha=weight)
                del piece
    return Mixed(layout, out, {})


def _average_in_factors(
    subject: Subject,
    flat: FlatModel,
    states: Sequence[Tensor],
    weights: Sequence[float],
    inputs: Tensor,
    pairs: Pairs,
    layout: Layout,
) -> Mixed:
    """The same; large linear weights get one term a state."""
    out = flat.state.new_zeros(len(inputs), layout.width)
    terms: dict[Span, list[LowRank]] = {span: [] for span in layout.low}
    for state, weight in zip(states, weights, strict=True):
        blocks_of: dict[Span, list[LowRank]] = {span: [] for span in layout.low}
        for rows in blocks(len(inputs), BLOCK):
            for span, part in output_factors(subject, flat, state, inputs[rows], pairs[rows]).parts.items():
                if span in blocks_of:
                    blocks_of[span].append(rows_of(part).scaled(weight))
                else:
                    out[rows, layout.place(slice(*span))].add_(formed(part), alpha=weight)
        for span, parts in blocks_of.items():
            terms[span].append(stacked(parts))
    return Mixed(layout, out, {span: added(parts) for span, parts in terms.items()})

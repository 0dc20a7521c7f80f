"""Gradients row by row: how each row of a batch pulls on the weights, from one backward pass.

For a scalar L of a batch, row i's gradient is the part of dL/dw that passes through its own activations (the
*row split*): the rows add up to dL/dw, with batch statistics included. For a linear layer it is the outer
product of the row's output gradient and its input, and so on (`layers`). `row_pieces` forms one tensor's rows at a
time, so that no one needs (B, P) numbers who can use them up as they come.

The row split differs from the gradient of each row's own loss term only where rows see each other (batch
normalization in training mode). It takes the model apart at its modules, which it cannot see through: a weight that
is used outside its module's own call, or a module whose first axis is not the batch. `check_rows` and `check_sum`
hold the rows against plain autograd, so that such a model is refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from brittle.errors import UnsupportedError
from brittle.kernel.calls import Call, record
from brittle.kernel.layers import own_tensors, units, weight_parts
from brittle.kernel.outer import Part, formed
from brittle.path.flat import FlatModel

Scalar = Callable[[], Tensor]
"""Runs the flat model and returns the scalar whose gradient is wanted."""

Piece = tuple[slice, Tensor]
"""The columns of one tensor in the state, and the gradients of its rows, (B, p)."""

Span = tuple[int, int]
"""Beginning and end of such columns."""

AGREEMENT = 1e-3
"""Relative distance from plain autograd up to which a parameter's rows count as equal."""

ROUNDING = 100
"""Units in the last place below which the sum of a batch's row gradients is rounding."""


def row_pieces(flat: FlatModel, scalar: Scalar, rows: int) -> Iterator[Piece]:
    """Gradient of `scalar()` through each row of the batch, one tensor of the state at a time.

    Args:
        flat: the model at the point of the path where gradients are wanted; leave it there until the last piece.
        scalar: computes the scalar from a batch of `rows` rows through `flat.model`; it may run under autocast.
        rows: B.

    Yields:
        The columns of a tensor in the state, and (B, p) in the state's dtype; a tensor without a gradient is left
        out. Columns of buffers hold the gradient with respect to running statistics (evaluation mode). Pieces may
        share memory: read them only.

    Raises:
        UnsupportedError: where a module with parameters mixes rows in a way that cannot be split.

    Memory: inputs and output gradients of the modules that are still to come, and the rows of one module; drop a
    piece before the next is asked for.
    """
    for columns, part in row_parts(flat, scalar, rows):
        yield columns, formed(part)
        del part


def row_parts(flat: FlatModel, scalar: Scalar, rows: int) -> Iterator[tuple[slice, Part]]:
    """The same, a weight that one linear layer or convolution used once in factors, not formed."""
    calls = _by_module(record(units(flat.model), scalar, flat.state.device))
    check_first_axis(calls, rows)
    spans = {call.name: spans_of(flat, call) for call in calls}
    to_come = Counter(span for call in calls for span in spans[call.name])
    sums: dict[Span, Part] = {}
    while calls:
        done = spans[calls[-1].name]
        _add(sums, flat, calls.pop())
        for span in done:
            to_come[span] -= 1
            if not to_come[span] and span in sums:
                yield slice(*span), sums.pop(span)


def row_gradients(flat: FlatModel, scalar: Scalar, rows: int) -> Tensor:
    """All of `row_pieces` at once: (B, P), 0 where a tensor has no gradient."""
    out = flat.state.new_empty(rows, len(flat))
    without = {(slot.start, slot.stop) for slot in flat.slots}
    for columns, piece in row_pieces(flat, scalar, rows):
        out[:, columns] = piece
        without.discard((columns.start, columns.stop))
        del piece
    for start, stop in without:
        out[:, start:stop] = 0
    return out


def sum_of(flat: FlatModel, pieces: Iterable[Piece]) -> Tensor:
    """The sum over rows of all pieces, (P,): the batch's gradient."""
    out = torch.zeros_like(flat.state)
    for columns, piece in pieces:
        out[columns] = piece.sum(0)
        del piece
    return out


def beyond_rounding(rows: Tensor) -> Tensor:
    """Where row gradients (B, p) add up to more than rounding, or are 0, (p,): elsewhere nothing is to be shared out.

    So it is with a bias before batch normalization, which takes the mean away. Left alone, the rows' large and
    opposite shares would be blown up by Adam, whose preconditioner is as small as their sum.
    """
    return ~is_rounding(rows.sum(0), torch.linalg.vector_norm(rows, 1, dim=0))


def is_rounding(total: Tensor, size: Tensor) -> Tensor:
    """Whether a sum is rounding, other than that of zeros. total: sum of rows, (p,). size: of their amounts, (p,)."""
    return (total.abs() <= ROUNDING * torch.finfo(total.dtype).eps * size) & (size > 0)


def check_rows(flat: FlatModel, values: Scalar) -> None:
    """Hold the row gradients of `values()` (B,), each a function of its own row, against plain autograd.

    Raises `UnsupportedError` that names the first parameter that differs.
    """
    count = len(values())
    rows = row_gradients(flat, lambda: values().sum(), count)
    plain = [flat.gradient(lambda row=row: values()[row]) for row in range(count)]  # type: ignore[misc]
    _compare(flat, rows, torch.stack(plain), AGREEMENT)


def check_sum(flat: FlatModel, found: Tensor, whole: Tensor, tolerance: float = AGREEMENT) -> None:
    """Hold the sum of row gradients (P,), as of `sum_of`, against the batch's gradient (P,).

    tolerance: relative; a pass in half precision is as far from itself as its rounding. Raises `UnsupportedError`.
    """
    _compare(flat, found[None], whole[None], tolerance)


def _by_module(calls: list[Call]) -> list[Call]:
    """Last first, so that they can be popped; the calls of a module side by side, so that they soon add up."""
    first: dict[str, int] = {}
    for k, call in enumerate(calls):
        first.setdefault(call.name, k)
    return sorted(calls, key=lambda call: first[call.name], reverse=True)


def check_first_axis(calls: list[Call], rows: int) -> None:
    """Raises `UnsupportedError` where a module has not returned one row an example."""
    for call in calls:
        for g in call.upstream.values():
            if g.shape[:1] != (rows,):
                raise UnsupportedError(
                    f"every module with parameters must return one row an example, {call} returned shape "
                    f"{tuple(g.shape)} for {rows} inputs; keep the batch as the first axis of what goes in and out"
                )


def spans_of(flat: FlatModel, call: Call) -> set[Span]:
    """The columns that a call may have gradients for; those of tied tensors are the same."""
    columns = [flat.columns[name] for name in own_tensors(call) if name in flat.columns]
    return {(c.start, c.stop) for c in columns}


def _add(sums: dict[Span, Part], flat: FlatModel, call: Call) -> None:
    """Add the gradients of one call to those of the same tensors, in the state's dtype."""
    call.upstream = {k: g.to(flat.state.dtype) for k, g in call.upstream.items()}
    for leaf, part in weight_parts(call).items():
        columns = flat.columns[call.column(leaf)]
        span = columns.start, columns.stop
        if columns.start < columns.stop:
            sums[span] = formed(sums[span]) + formed(part) if span in sums else part


def _compare(flat: FlatModel, found: Tensor, expected: Tensor, tolerance: float) -> None:
    total = expected[:, : flat.parameters].norm()
    for slot in flat.slots:
        own, plain = (rows[:, slot.start : slot.stop] for rows in (found, expected))
        off, size = (own - plain).norm(), plain.norm()
        if not slot.buffer and not off <= tolerance * size + tolerance**2 * total:
            raise UnsupportedError(
                f"gradients must split by examples, those of {slot.name} do not add up to plain autograd's; use the "
                "weight only inside its own module's forward, and keep the batch as the first axis"
            )

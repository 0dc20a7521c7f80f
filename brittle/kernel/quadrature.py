"""The gradient of outputs along a segment of the path: midpoints, as many as the exact increment asks for.

A segment from w_a to w_b is taken as one straight line, D = w_b - w_a. With midpoints t_k = (k + 1/2) / n,

    Jbar = 1/n sum_k J(w_a + t_k D),        Jbar . D = f(w_b) - f(w_a) - (what quadrature missed),

and the increment on the right costs two forward passes, so the miss is known. Where it is too large the
number of midpoints is tripled. ReLU networks are kinked along the line: many midpoints beat few Gauss nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.kernel.gradients import row_gradients
from brittle.path.flat import FlatModel
from brittle.records import Pairs
from brittle.subject import Subject

BLOCK = 256
"""Rows whose gradients are formed at once."""


@dataclass(frozen=True)
class Line:
    """The averaged gradient over one segment for M outputs."""

    jacobian: Tensor  # shape: (M, P)
    missed: Tensor  # shape: (M,), increment minus jacobian . D
    nodes: int


def midpoints(n: int) -> list[float]:
    """The n midpoints of [0, 1]."""
    return [(k + 0.5) / n for k in range(n)]


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


def output_gradients(subject: Subject, flat: FlatModel, state: Tensor, inputs: Tensor, pairs: Pairs) -> Tensor:
    """J: gradients of the pairs' margins at one point of the path, (M, P); one backward pass."""
    flat.load(state)
    model = flat.eval()
    x = inputs.to(flat.state)
    return row_gradients(flat, lambda: pairs.margin(subject.class_logits(model, x)).sum(), len(inputs))


def line_gradient(
    subject: Subject,
    flat: FlatModel,
    ends: tuple[Tensor, Tensor],
    inputs: Tensor,
    pairs: Pairs,
    increment: Tensor,
    allowed: float,
    nodes: int,
    most: int,
) -> Line:
    """Jbar over the straight line between two states.

    Args:
        ends: the states (P,) at both ends.
        increment: f(w_b) - f(w_a), shape (M,).
        allowed: mean absolute miss (logits) above which the number of nodes is tripled, up to `most`.
        nodes: the number of midpoints to begin with.
    """
    low, high = ends
    while True:
        jacobian = _average(subject, flat, low, high, inputs, pairs, nodes)
        missed = increment - (jacobian @ (high - low).to(jacobian))
        if missed.abs().mean().item() <= allowed or 3 * nodes > most:
            return Line(jacobian, missed, nodes)
        nodes *= 3


def blocks(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover `count` rows."""
    return (slice(i, min(i + size, count)) for i in range(0, count, size))


def _average(
    subject: Subject, flat: FlatModel, low: Tensor, high: Tensor, inputs: Tensor, pairs: Pairs, nodes: int
) -> Tensor:
    out = flat.state.new_zeros(len(inputs), len(flat))
    for t in midpoints(nodes):
        state = torch.lerp(low, high, t)
        for rows in blocks(len(inputs), BLOCK):
            out[rows] += output_gradients(subject, flat, state, inputs[rows], pairs[rows]) / nodes
    return out


Counter = Callable[[int], None]
"""Called with the number of gradient evaluations (one row, one backward pass) that were just spent."""

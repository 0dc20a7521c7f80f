"""The account in units of work: one stretch of the path for one block of queries.

    ledger of f(w_S) - f(w_0)  =  sum over stretches [a, b) of the ledger of f(w_b) - f(w_a),        block by block.

Units do not need each other, so that processes may share them. How the work is cut depends on the path, the queries and
a budget of memory alone, and results are added in float64 in the order of the path: the sum is the same to the last
bit, whoever computed its parts. A unit holds 5 M P numbers of the model's type (averaged gradients and those they are
refined by, momentum buffers before and after a step, the credit of one step) and M N of float64, so that a block has

    M  =  budget / (5 P itemsize + 8 N)

queries at most. Where memory runs out all the same, a unit is halved and goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from brittle.errors import OutOfMemoryError, UsageError
from brittle.kernel.sweep import Quadrature, Swept, stretches, sweep
from brittle.path.flat import layout
from brittle.path.replay import Path
from brittle.records import Ledger, Pairs, Progress
from brittle.subject import Subject

T = TypeVar("T")

BUDGET = 2 << 30
"""Bytes for a block of queries, where nothing else is asked for."""

HELD = 5
"""Matrices of queries x parameters that a sweep holds at most."""

SAID = ("out of memory", "not enough memory", "can't allocate memory")
"""How torch says that memory ran out, where it raises no error of its own kind."""


@dataclass(frozen=True)
class Unit:
    """A stretch [a, b) of the path's steps for a block [i, j) of queries."""

    steps: tuple[int, int]
    rows: tuple[int, int]

    def __str__(self) -> str:
        return f"queries-{self.rows[0]:06d}-{self.rows[1]:06d}-steps-{self.steps[0]:08d}-{self.steps[1]:08d}"


@dataclass(frozen=True)
class Part:
    """What a unit found: the ledger of its stretch, with contributions (m, n) of the n examples met there alone."""

    examples: Tensor  # shape: (n,) positions in the training data
    ledger: Ledger
    drift: float
    evaluations: int


def cut(
    path: Path, subject: Subject, queries: int, budget: int = BUDGET, quadrature: Quadrature | None = None
) -> list[Unit]:
    """The units of an account of `queries` outputs, stretch by stretch.

    budget: bytes that a unit may hold. Raises `UsageError` where one query needs more.
    """
    itemsize = next(subject.model.parameters()).element_size()
    each = bytes_each(layout(subject.model)[-1].stop, itemsize, len(subject.train))
    if each > budget:
        raise UsageError(
            f"--memory-budget must hold one query at least, {each / 2**20:.1f} MB here, found {budget / 2**20:.1f} MB; "
            "allow more"
        )
    blocks = -(-queries // (budget // each))
    edges = [queries * k // blocks for k in range(blocks + 1)] if blocks else [0]
    return [Unit(steps, rows) for steps in stretches(path, quadrature) for rows in pairwise(edges)]


def bytes_each(size: int, itemsize: int, examples: int) -> int:
    """What a unit holds of one query. size: P. itemsize: bytes of each of its numbers. examples: N."""
    return HELD * size * itemsize + 8 * examples


def account_unit(
    path: Path,
    subject: Subject,
    inputs: Tensor,
    pairs: Pairs,
    unit: Unit,
    quadrature: Quadrature | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Part:
    """What one unit found. inputs, pairs: all the M queries'.

    Raises what `sweep` does, and `OutOfMemoryError` where not even one query fits.
    """

    def swept(rows: slice) -> Swept:
        return sweep(path, subject, inputs[rows], pairs[rows], quadrature, device, progress, stretch=unit.steps)

    pieces = in_halves(swept, *unit.rows)
    ledger = Ledger.join(*(piece.ledger for piece in pieces))
    examples = (ledger.contributions != 0).any(0).nonzero()[:, 0]
    ledger = replace(ledger, contributions=ledger.contributions[:, examples])
    return Part(examples, ledger, max(piece.drift for piece in pieces), sum(piece.evaluations for piece in pieces))


def in_halves(compute: Callable[[slice], T], first: int, last: int) -> list[T]:
    """`compute` of the rows [first, last): of all at once, or of halves and quarters as far as memory runs out."""
    found, left = [], [slice(first, last)]
    while left:
        rows = left.pop()
        computed = _computed(compute, rows)
        if computed is None:
            middle = (rows.start + rows.stop) // 2
            left += [slice(middle, rows.stop), slice(rows.start, middle)]
        else:
            found.append(computed)
    return found


def total(units: Sequence[Unit], parts: Iterable[Part], queries: int, examples: int) -> Swept:
    """The account that parts add up to, in the order of their units, which is the path's. queries: M. examples: N."""
    zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64)  # noqa: E731
    ledger = Ledger(zeros(queries), zeros(queries, examples), *(zeros(queries) for _ in range(5)))
    drift, evaluations = 0.0, 0
    for unit, part in zip(units, parts, strict=True):
        rows, found = slice(*unit.rows), part.ledger
        ledger.contributions[rows].index_add_(1, part.examples, found.contributions)
        for name in ("decay", "buffers", "unexplained", "residual"):
            getattr(ledger, name)[rows] += getattr(found, name)
        if unit.steps[0] == 0:
            ledger.start[rows] = found.start
        ledger.output[rows] = found.output  # in the end that of the last stretch
        drift, evaluations = max(drift, part.drift), evaluations + part.evaluations
    return Swept(ledger, drift, evaluations)


def _computed(compute: Callable[[slice], T], rows: slice) -> T | None:
    """None where memory ran out; on return nothing of the attempt is held any more."""
    try:
        return compute(rows)
    except Exception as error:
        if not ran_out(error):
            raise
        if rows.stop - rows.start == 1:
            raise OutOfMemoryError(
                "the account of one query at a time must fit into memory, it ran out; end other programs, or take a "
                "larger machine or another --device"
            ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def ran_out(error: Exception) -> bool:
    """Whether an error says that memory ran out, that of the device or of the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in SAID)

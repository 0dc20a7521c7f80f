"""How a batch's rows pull M vectors: <A_m, G_i>, tensor by tensor, with rows formed or the vectors carried forward.

With A_m (p, d) the credit of query m in a weight, and G_i = sum_t g_it a_it^T the gradient of row i (`outer`),

    <A_m, G_i> = the sum of all entries of A_m * G_i         rows: G_i is formed
               = sum_t g_it . (A_m a_it)                     forward: forward mode through this layer alone, the tangent
                                                             of its weight being A_m

For B rows and T positions these take, in the time of a multiplication inside a convolution,

    rows      B p d (FORMING T + WRITTEN + M)                forward    B p (d + PER_NUMBER) T (M + 2)

A formed row costs mostly what is written and read again, where a batch's rows do not stay in the cache: it is made,
looked through for what adds up to rounding, added up and multiplied. Forward, the batch's gradient is one more product
of that size, and what adds up to rounding another at most. So forward pays for few queries, and where positions are
few: the late layers of a residual network.

    seconds of one thread: B = 128, ResNet-18          rows (M = 1, 8)    forward, M = 1, 8     taken, M = 1, 8
    T = 1024, p =  64, d =  576                        .116                 .17   .75           rows      rows
    T =  256, p = 128, d = 1152                        .22                  .13   .60           forward   rows
    T =   64, p = 256, d = 2304                        .84                  .11   .46           forward   forward
    T =   16, p = 512, d = 4608                        2.0                  .15   .49           forward   forward

Factored inner products are for pairs of factors: the credit is a matrix (`credit`), or of low rank (`lowrank`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from brittle.kernel.gradients import beyond_rounding, is_rounding
from brittle.kernel.outer import Outer, Part
from brittle.kernel.precision import lowered

Route = Literal["rows", "forward"]
"""What is done: rows are formed, or vectors carried forward."""

FORMING, WRITTEN, PER_NUMBER = 1.5, 1000, 16
"""Times of one multiplication: to form an entry of a row, for each position and once; to write a layer's output."""

CACHED = 1 << 18
"""Entries of a batch's rows that stay in the cache."""

BLOCK_BYTES = 24 << 20
"""Bytes of an intermediate result at most."""

FEW = 1 / 16
"""Share of a weight's columns, up to which those that may add up to rounding are looked at one by one."""


def pulled(vectors: Tensor, part: Part, coupled: bool = False, route: Route | None = None) -> tuple[Tensor, Tensor]:
    """Inner products of vectors (M, p) with the rows (B, p) of one tensor, (M, B); and the sum of the rows, (p,).

    coupled: rows see each other, so that columns whose rows add up to rounding count 0 (`gradients.beyond_rounding`).
    route: the cheaper one where not given.
    """
    if isinstance(part, Outer) and (route or cheaper(len(vectors), part)) == "rows":
        part = part.rows()
    total = part.sum(0)
    if coupled and len(nothing := cancelling(part, total)):
        total[nothing] = 0
        vectors = vectors.index_fill(1, nothing, 0)
    with lowered():
        return (_forward(vectors, part) if isinstance(part, Outer) else vectors @ part.T), total


def cheaper(m: int, part: Outer) -> Route:
    """The route of less cost for M vectors."""
    k, p, d, t = part.sizes
    written = WRITTEN if len(part) * k * p * d > CACHED else 0
    rows, forward = d * (FORMING * t + written + m), (d + PER_NUMBER) * t * (m + 2)
    return "forward" if forward < rows else "rows"


def cancelling(part: Part, total: Tensor) -> Tensor:
    """The columns (n,) whose rows add up to rounding (`gradients.beyond_rounding`). total: their sum, (p,).

    Of rows in factors: where the sum is more than rounding of a bound of sum_i |G_i|, it is more than that of
    sum_i |G_i|. Only the few other columns are formed.
    """
    if isinstance(part, Tensor):
        return is_rounding(total, torch.linalg.vector_norm(part, 1, dim=0)).nonzero()[:, 0]
    doubtful = is_rounding(total, part.bound()).nonzero()[:, 0]
    if len(doubtful) > FEW * len(total):
        return cancelling(part.rows(), total)
    each = len(part) * part.sizes[3] * total.element_size()
    kept = [beyond_rounding(part.entries(doubtful[at])) for at in _blocks(len(doubtful), BLOCK_BYTES // each)]
    return doubtful[~torch.cat(kept)] if kept else doubtful


def _forward(vectors: Tensor, part: Outer) -> Tensor:
    """By forward mode, in blocks of vectors and rows: (M, B)."""
    k, p, _, t = part.sizes
    out = vectors.new_empty(len(vectors), len(part))
    room = max(1, BLOCK_BYTES // (k * p * t * vectors.element_size()))  # pairs
    for some in _blocks(len(vectors), room // len(part)):
        for rows in _blocks(len(part), room // (some.stop - some.start)):
            out[some, rows] = part[rows].carried(vectors[some])
    return out


def _blocks(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size`, of one at least, that cover `count`."""
    return (slice(i, min(i + max(size, 1), count)) for i in range(0, count, max(size, 1)))

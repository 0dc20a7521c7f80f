"""Inner products of row gradients, which are formed only where that is cheaper.

The rows of a batch's gradient are sums of outer products wherever a weight is used by a linear layer or a convolution
(`outer`): G_i = sum_t g_it a_it^T with g (p,), a (d,) and T positions. So

    <G_i, H_j> = sum_t sum_u <g_it, h_ju> <a_it, b_ju>                        gram: nothing is formed
               = sum_u h_ju^T G_i b_ju                                        left: row i alone is formed
               = sum of all entries of G_i * H_j                              rows: both are

For M left rows with T positions and B right rows with U these take, in multiplications,

    gram   M B T U (p + d)                  left   M T p d + M B U p d
    rows   (M T + B U + M B) p d            right  B U p d + M B T p d

and write M B T U (two times), M p d + M B U min(p, d) and (M + B) p d numbers on the way. One number written and read
takes as long as `PER_NUMBER` multiplications. Without positions (T = U = 1) gram wins, for most convolutions rows: of
the multiplications alone, gram against rows is T U (p + d) < p d (1 + T / B + U / M). Gram of a row with itself is the
norm of Goodfellow 2015 ("Efficient per-example gradient computations", arXiv 1510.01799), and the choice that of Bu,
Mao, Xu 2022 (arXiv 2205.10683), here for pairs. Whatever is no linear layer or convolution, and tensors that were used
several times, are formed by `layers` as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from brittle.kernel.gradients import Scalar, Span, row_parts
from brittle.kernel.outer import Outer, Part
from brittle.kernel.precision import lowered
from brittle.path.flat import FlatModel

Route = Literal["gram", "rows", "left", "right"]
"""What is formed: nothing, all rows, those of one side."""

PER_NUMBER = 16
"""Multiplications that a processor does in the time in which a number is written and read again."""

TILE_BYTES = {"cpu": 8 << 20}
"""Bytes of an intermediate result at most: what fits into a processor's cache is read from there."""

TILE_BYTES_ELSEWHERE = 1 << 29
"""The same on an accelerator, which keeps its memory, and is idle in small products."""


@dataclass(frozen=True)
class Factors:
    """The gradients of a batch's rows at one state, in factors as far as possible; the model may move on."""

    rows: int
    parts: Mapping[Span, Part]  # by the columns of a tensor in the state; without those that have no gradient


def factors_of(flat: FlatModel, scalar: Scalar, rows: int) -> Factors:
    """The gradient of `scalar()` through each row of a batch, at the flat model's present state.

    Arguments and errors are those of `gradients.row_pieces`. Cost: one forward and one backward pass without the
    gradients of weights. Memory: what goes into linear layers and convolutions and the gradients at what comes out;
    the rows of all other tensors.
    """
    return Factors(rows, {(at.start, at.stop): part for at, part in row_parts(flat, scalar, rows)})


def products(flat: FlatModel, left: Factors, right: Factors) -> Tensor:
    """Inner products over the parameters of every row of `left` with every row of `right`, (M, B).

    The factors may come from different states and modes. Memory: of one tensor, the rows of one side.
    """
    out = flat.state.new_zeros(left.rows, right.rows)
    with lowered():
        for span in sorted(left.parts.keys() & right.parts.keys()):
            if span[0] < flat.parameters:
                out += inner(left.parts[span], right.parts[span])
    return out


def against(flat: FlatModel, dense: Tensor, right: Factors) -> Tensor:
    """Inner products over the whole state, buffers included, of vectors (K, P) with every row, (K, B)."""
    out = flat.state.new_zeros(len(dense), right.rows)
    for (start, stop), part in sorted(right.parts.items(), key=lambda item: item[0]):
        out += inner(dense[:, start:stop], part)
    return out


def ready(factors: Factors, rows: int, blocks: int) -> Factors:
    """The same for products with `blocks` blocks of `rows` rows: what each of them would form is formed once."""

    def made(part: Part) -> Part:
        if isinstance(part, Tensor):
            return part
        route = cheapest(len(part), rows, *part.sizes, part.sizes[3], blocks=blocks)
        return part.rows() if route in ("rows", "left") else part

    return replace(factors, parts={span: made(part) for span, part in factors.parts.items()})


def inner(left: Part, right: Part, route: Route | None = None) -> Tensor:
    """Inner products of all rows with all rows, (M, B); `route` is the cheapest where not given."""
    if isinstance(left, Tensor):
        return left @ right.T if isinstance(right, Tensor) else _of_formed(left, right, route)
    if isinstance(right, Tensor):
        return _of_formed(right, left, route).T
    (k, p, d, t), u = left.sizes, right.sizes[3]
    route = route or cheapest(len(left), len(right), k, p, d, t, u)
    if route == "gram":
        return _gram(left, right)
    return _of_formed(right.rows(), left, "left").T if route == "right" else _of_formed(left.rows(), right, route)


def cheapest(
    m: int,
    b: int,
    k: int,
    p: int,
    d: int,
    t: int,
    u: int,
    *,
    blocks: int = 1,
    among: Sequence[Route] = ("gram", "rows", "left", "right"),
) -> Route:
    """The route of least cost for M x B rows of k groups (p, d) with T and U positions.

    blocks: blocks of right rows with which formed left rows are multiplied; forming these counts once for all.
    """
    left, right = (n * (positions + PER_NUMBER) * p * d for n, positions in ((m / blocks, t), (b, u)))
    contracted = m * b * (p * d + PER_NUMBER * min(p, d))
    cost: dict[Route, float] = {
        "gram": m * b * t * u * (p + d + 2 * PER_NUMBER),
        "rows": left + right + m * b * p * d,
        "left": left + u * contracted,
        "right": right + t * contracted,
    }
    return min(among, key=lambda route: cost[route])


def _of_formed(left: Tensor, right: Outer, route: Route | None) -> Tensor:
    """Inner products of rows that are formed, (M, k p d), with rows in factors: (M, B)."""
    (m, b), (k, p, d, u) = (len(left), len(right)), right.sizes
    route = route or cheapest(m, b, k, p, d, 1, u, among=("rows", "left"))
    out = left.new_empty(m, b)
    if route == "rows":
        for _, columns in _tiles(1, b, k * max(p, u) * d, left):
            out[:, columns] = left @ right[columns].rows().T
        return out
    matrices = left.unflatten(1, (k, p, d))  # shape: (M, k, p, d)
    for rows, columns in _tiles(m, b, k * min(p, d) * u, left):
        out[rows, columns] = _contracted(matrices[rows], right[columns])
    return out


def _contracted(matrices: Tensor, right: Outer) -> Tensor:
    """sum_u g_u^T E a_u. matrices: (M, k, p, d) -> (M, B). The longer side of E is summed over first."""
    g, a = right.g, right.a()  # shape: (B, k, p, U), (B, k, d, U)
    if g.shape[2] <= a.shape[2]:
        half, other = torch.einsum("mkpd,bkdu->kmpbu", matrices, a), g
    else:
        half, other = torch.einsum("mkpd,bkpu->kmdbu", matrices, g), a
    half *= other.permute(1, 2, 0, 3)[:, None]
    return half.sum((0, 2, 4))


def _gram(left: Outer, right: Outer) -> Tensor:
    (k, _, _, t), u = left.sizes, right.sizes[3]
    out = left.g.new_empty(len(left), len(right))
    for rows, columns in _tiles(len(left), len(right), k * t * u, left.g):
        one, other = left[rows], right[columns]
        both = torch.einsum("mkpt,bkpu->kmtbu", one.g, other.g)
        both *= torch.einsum("mkdt,bkdu->kmtbu", one.a(), other.a())
        out[rows, columns] = both.sum((0, 2, 4))
    return out


def _tiles(m: int, b: int, numbers: int, like: Tensor) -> Iterator[tuple[slice, slice]]:
    """Tiles of M x B pairs, each of which takes so many numbers, that keep to the bytes of an intermediate result."""
    room = TILE_BYTES.get(like.device.type, TILE_BYTES_ELSEWHERE) // (numbers * like.element_size())
    height = max(1, min(m, room))
    width = max(1, min(b, room // height))
    for i in range(0, m, height):
        for j in range(0, b, width):
            yield slice(i, min(i + height, m)), slice(j, min(j + width, b))

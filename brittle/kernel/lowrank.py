"""Matrices by the row, as sums of outer products: how the large weights of linear layers are kept in the sweep.

For query i and a (p, d) weight, X_i = sum_k g_ik a_ik^T: the averaged output gradient over K points of the path, or
what momentum carries of several of those. With the gradient g a^T of a training example

    < X_i, g a^T > = sum_k <g_ik, g> <a_ik, a>,

K (p + d) multiplications in place of p d. `shortened` keeps K small: with X = G^T A, G^T = Q R and

    X X^T = Q (R A A^T R^T) Q^T = U L U^T,              X = sum_r u_r (X^T u_r)^T,

and to leave out the smallest eigenvalues is the best approximation of that rank (Eckart and Young 1936, "The
approximation of one matrix by another of lower rank", Psychometrika 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """M matrices of shape (p, d): the i-th is sum_k g[i, k] a[i, k]^T."""

    g: Tensor  # shape: (M, K, p)
    a: Tensor  # shape: (M, K, d)

    @property
    def rank(self) -> int:
        """K."""
        return self.g.shape[1]

    @property
    def dear(self) -> bool:
        """Whether products with it take more than half the multiplications of those with matrices."""
        p, d = self.g.shape[2], self.a.shape[2]
        return 2 * self.rank * (p + d) > p * d

    def scaled(self, by: float) -> LowRank:
        """All matrices times a number."""
        return LowRank(by * self.g, self.a)

    def matrices(self) -> Tensor:
        """Multiplied out, (M, p d)."""
        return torch.bmm(self.g.transpose(1, 2), self.a).flatten(1)

    def sum(self) -> Tensor:
        """The sum of all matrices, (p d,)."""
        return (self.g.flatten(0, 1).T @ self.a.flatten(0, 1)).flatten()

    def dot(self, vector: Tensor) -> Tensor:
        """Inner products with one matrix, (p d,) -> (M,)."""
        return ((self.a @ vector.view(self.g.shape[2], -1).T) * self.g).sum((1, 2))

    def products(self, rows: LowRank) -> Tensor:
        """Inner products with B matrices, (M, B)."""
        both = self.g.flatten(0, 1) @ rows.g.flatten(0, 1).T  # shape: (M K, B K')
        both *= self.a.flatten(0, 1) @ rows.a.flatten(0, 1).T
        return both.view(len(self.g), self.rank, len(rows.g), rows.rank).sum((1, 3))

    def shortened(self, tolerance: float) -> LowRank:
        """The same in as few terms as leave out at most `tolerance` of each matrix's Frobenius norm."""
        gram = torch.bmm(self.a, self.a.transpose(1, 2)).double()  # shape: (M, K, K)
        q, r = torch.linalg.qr(self.g.double().transpose(1, 2))  # shapes: (M, p, R), (M, R, K)
        values, vectors = torch.linalg.eigh(r @ gram @ r.transpose(1, 2))  # ascending; shapes: (M, R), (M, R, R)
        values = values.clamp_min(0)
        left_out = values.cumsum(1) <= tolerance**2 * values.sum(1, keepdim=True)
        rank = max(1, values.shape[1] - int(left_out.sum(1).min()))
        if rank >= self.rank:
            return self
        kept = vectors[:, :, -rank:].transpose(1, 2)  # shape: (M, rank, R)
        return LowRank((kept @ q.transpose(1, 2)).to(self.g), torch.bmm((kept @ r).to(self.a), self.a))


def added(parts: Sequence[LowRank]) -> LowRank:
    """The sums, matrix by matrix, of several with as many matrices."""
    return LowRank(torch.cat([part.g for part in parts], dim=1), torch.cat([part.a for part in parts], dim=1))


def stacked(parts: Sequence[LowRank]) -> LowRank:
    """The matrices of several of the same rank, one after the other."""
    return LowRank(torch.cat([part.g for part in parts]), torch.cat([part.a for part in parts]))

"""What a score says beyond how sure the model is.

partial_spearman   rank correlation with what happened where another score (the margin) is held fixed:
                   (r_xy - r_xz r_zy) / sqrt((1 - r_xz^2) (1 - r_zy^2)), r the correlations of mid-ranks
confident_half     AUROC among the half of the inputs of which the model is surest

In a resample ranks and half are those of the full sample. Source: The Advanced Theory of Statistics, vol. 2,
M. Kendall and A. Stuart, 1973, chapter 27.
"""

from __future__ import annotations

import torch
from torch import Tensor

from brittle.agreement.metrics import Resampled, auroc, bootstrap

ROUNDING = 1e-12
"""Variance of ranks, as shares of their number, that is taken for none."""


def partial_spearman(scores: Tensor, observed: Tensor, given: Tensor, weights: Tensor) -> Resampled:
    """Of scores and what was observed, given another score; NaN where that says all, or one is constant.

    Args:
        scores, observed, given: (M,).  weights: (M, R).
    """
    parts = torch.stack([ranks(v) for v in (scores, observed, given)], dim=1) / max(1, len(scores))  # shape: (M, 3)
    drawn = torch.cat([torch.ones(len(parts), 1), weights], dim=1).double()
    xy, zy, xz = _correlations(parts, drawn / drawn.sum(0))
    left = (1 - zy**2) * (1 - xz**2)
    held = (xy - zy * xz) / torch.where(left > ROUNDING, left, torch.nan).sqrt()
    return Resampled(held[0].item(), held[1:])


def confident_half(scores: Tensor, failed: Tensor, doubt: Tensor, weights: Tensor) -> Resampled:
    """AUROC among the inputs of least doubt (higher: less sure), all those at the median included."""
    rows = doubt <= doubt.median()
    return bootstrap(auroc, scores[rows], failed[rows], weights[rows])


def ranks(values: Tensor) -> Tensor:
    """Mid-ranks, (M,) -> (M,) float64; infinite values tie."""
    _, place, counts = values.double().unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - counts / 2.0).double()[place]


def _correlations(parts: Tensor, weights: Tensor) -> list[Tensor]:
    """Of x and y, z and y, x and z, the columns of parts (M, 3), under weights (M, R) that add up to 1: (R,) each."""
    centre = weights.T @ parts

    def product(a: int, b: int) -> Tensor:
        return weights.T @ (parts[:, a] * parts[:, b]) - centre[:, a] * centre[:, b]

    spread = [torch.where(own > ROUNDING, own, torch.nan).sqrt() for own in (product(k, k) for k in range(3))]
    return [product(a, b) / (spread[a] * spread[b]) for a, b in ((0, 1), (2, 1), (0, 2))]

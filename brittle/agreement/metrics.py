"""How well a score ranks failures, with 95 % intervals.

Every metric takes weights beside the inputs, w: (M, R), one column a resample, and gives R values at once: a
bootstrap resample is the number of times that each input was drawn. With P and Q the weights of failures and of
the others, summed over inputs of equal score v, and Q(<v) what lies below,

    AUROC = sum_v P(v) (Q(<v) + Q(v) / 2) / (P Q)            average precision = sum_v P(v) P(>=v) / (P+Q)(>=v) / P

and Spearman's coefficient is the weighted correlation of mid-ranks. Ties count half, infinities tie with each
other, and what is not defined (no failures, nothing but failures, a constant) is NaN, in findings None.
Resamples keep the number of failures (stratified) and are shared by all scores (paired), so that differences of
scores have intervals too: An Introduction to the Bootstrap, B. Efron and R. Tibshirani, 1993, chapters 13 and 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.stats import binomtest
from torch import Tensor

from brittle.findings import Estimate

Metric = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(scores (M,), what was observed (M,), weights (M, R)) -> (R,)."""

NOTHING = Estimate(value=None, low=None, high=None)
"""The estimate of what could not be estimated."""

CHUNK = 1 << 18
"""Weights that a metric looks at together; larger takes more memory, the result is the same."""


@dataclass(frozen=True)
class Resampled:
    """A figure on the full sample and on each resample; differences are paired."""

    value: float
    resamples: Tensor  # shape: (R,)

    def __sub__(self, other: Resampled) -> Resampled:
        return Resampled(self.value - other.value, self.resamples - other.resamples)

    @property
    def estimate(self) -> Estimate:
        """The figure with the 2.5th and 97.5th percentile of its resamples.

        Measured on normal scores: 94 to 97 per cent of the intervals hold the true figure with 40 failures among
        400 inputs, 89 to 98 with 12 among 200.
        """
        defined = self.resamples[self.resamples.isfinite()]
        if not math.isfinite(self.value) or not len(defined):
            return NOTHING
        low, high = torch.quantile(defined, defined.new_tensor([0.025, 0.975])).tolist()
        return Estimate(value=self.value, low=low, high=high)


def auroc(scores: Tensor, failed: Tensor, weights: Tensor) -> Tensor:
    """Chance that a failure scores higher than another input, ties half.

    Args:
        scores: (M,), higher means brittler.  failed: (M,) bool.  weights: (M, R).
    """
    positive, negative = _by_score(scores, weights * failed[:, None], weights * ~failed[:, None])
    below = negative.cumsum(0) - negative / 2
    return (positive * below).sum(0) / (positive.sum(0) * negative.sum(0))


def average_precision(scores: Tensor, failed: Tensor, weights: Tensor) -> Tensor:
    """Mean precision over the failures, from the highest score down; a random score has the prevalence.

    Args: as `auroc`.
    """
    positive, every = (part.flip(0) for part in _by_score(scores, weights * failed[:, None], weights))
    precision = positive.cumsum(0) / every.cumsum(0).clamp_min(torch.finfo(every.dtype).tiny)
    return (positive * precision).sum(0) / positive.sum(0)


def spearman(scores: Tensor, observed: Tensor, weights: Tensor) -> Tensor:
    """Correlation of mid-ranks.

    Args:
        scores, observed: (M,); infinite values rank first or last and tie.  weights: (M, R).
    """
    total = weights.sum(0)
    x, y = (_mid_ranks(v, weights) - total / 2 for v in (scores, observed))  # shape: (M, R), mean 0
    spread = (weights * x * x).sum(0) * (weights * y * y).sum(0)
    return (weights * x * y).sum(0) / torch.where(spread > 0, spread, torch.nan).sqrt()


def bootstrap(metric: Metric, scores: Tensor, observed: Tensor, weights: Tensor) -> Resampled:
    """A metric on the full sample and on each column of `weights` (M, R)."""
    scores = scores.double()
    value = metric(scores, observed, torch.ones(len(scores), 1, dtype=torch.float64)).item()
    columns = weights.split(max(1, CHUNK // max(1, len(scores))), dim=1)
    return Resampled(value, torch.cat([metric(scores, observed, part.double()) for part in columns]))


def resample_weights(strata: Tensor, resamples: int, generator: torch.Generator) -> Tensor:
    """How often each input is drawn, with replacement, within its stratum. strata: (M,) -> (M, R)."""
    weights = torch.zeros(len(strata), resamples)
    for stratum in strata.unique():
        rows = (strata == stratum).nonzero()[:, 0]
        drawn = torch.randint(len(rows), (len(rows), resamples), generator=generator)
        weights[rows] = torch.zeros(drawn.shape).scatter_add_(0, drawn, torch.ones(drawn.shape))
    return weights


def wilson(count: int, total: int) -> Estimate:
    """A share with its 95 % interval by Wilson's score method; None of nothing."""
    if not total:
        return NOTHING
    interval = binomtest(count, total).proportion_ci(0.95, method="wilson")
    return Estimate(value=count / total, low=float(interval.low), high=float(interval.high))


def _by_score(scores: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    """Weights summed over inputs of equal score, lowest score first. (M, R) each -> (distinct, R)."""
    distinct, place = scores.unique(return_inverse=True)
    return tuple(part.new_zeros(len(distinct), part.shape[1]).index_add_(0, place, part) for part in parts)


def _mid_ranks(values: Tensor, weights: Tensor) -> Tensor:
    """Weight below an input plus half of the weight that ties with it. (M,), (M, R) -> (M, R)."""
    place = values.unique(return_inverse=True)[1]
    (tied,) = _by_score(values, weights)
    return (tied.cumsum(0) - tied / 2)[place]

"""How well a score ranks failures, with 95 % intervals.

Every metric takes weights beside the inputs, w: (M, R), one column a resample, and gives R values at once: a
bootstrap resample is the number of times that each input was drawn. With P and Q the weights of failures and of
the others, summed over inputs of equal score v, and Q(<v) what lies below,

    AUROC = sum_v P(v) (Q(<v) + Q(v) / 2) / (P Q)            average precision = sum_v P(v) P(>=v) / (P+Q)(>=v) / P
    FPR95 = Q(>=t) / Q, t the highest score with P(>=t) >= .95 P

and Spearman's coefficient is the weighted correlation of mid-ranks. Two figures ask what happens where the inputs of
highest score are turned away: with n = P + Q, and the i inputs of lowest score kept,

    AURC = mean_i (failures among the i kept) / i            AUGRC = mean over coverage of (failures kept) / n

E-AURC is AURC less that of the ideal order. Of one model's failures on one sample AUGRC is a falling straight line
in AUROC, so it orders scores alike; it says how many failures remain where AUROC says how often two inputs are in
the right order. Ties count half (for AURC: the mean over their orders), infinities tie with each other, and what is
not defined (no failures, nothing but failures, a constant) is NaN, in findings None.
Resamples keep the number of failures (stratified) and are shared by all scores (paired), so that differences of
scores have intervals too: An Introduction to the Bootstrap, B. Efron and R. Tibshirani, 1993, chapters 13 and 8.
AURC and E-AURC: Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers, Y. Geifman, G. Uziel and
R. El-Yaniv, 2019, https://arxiv.org/abs/1805.08206. AUGRC: Overcoming Common Flaws in the Evaluation of Selective
Classification Systems, J. Traub and others, 2024, https://arxiv.org/abs/2407.01032.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.stats import binomtest
from torch import Tensor

from brittle.findings import NOTHING, Estimate

Metric = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(scores (M,), what was observed (M,), weights (M, R)) -> (R,)."""

CHUNK = 1 << 18
"""Weights that a metric looks at together; larger takes more memory, the result is the same."""


SIGNS = 1 << 22
"""Pairs of inputs that Kendall's tau looks at together; the result is the same."""

RECALL = 0.95
"""Share of failures that FPR95 catches."""


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

    @property
    def chance(self) -> float | None:
        """Two-sided p-value of the figure being 0: twice the smaller share of resamples on either side, 0 counting as
        both; so that p < .05 where the 95 % interval leaves out 0. Never below 2 / (R + 1); None where not defined.

        Source: Bootstrap Methods and Their Application, A. Davison and D. Hinkley, 1997, section 4.4.
        """
        defined = self.resamples[self.resamples.isfinite()]
        if not math.isfinite(self.value) or not len(defined):
            return None
        fewer = min(int((defined <= 0).sum()), int((defined >= 0).sum()))
        return min(1.0, 2 * (1 + fewer) / (len(defined) + 1))


def auroc(scores: Tensor, failed: Tensor, weights: Tensor) -> Tensor:
    """Chance that a failure scores higher than another input, ties half.

    Args:
        scores: (M,), higher means brittler.  failed: (M,) bool.  weights: (M, R).
    """
    others, place = scores[~failed].sort()
    positive, own = weights[failed], scores[failed]
    negative = torch.cat([weights.new_zeros(1, weights.shape[1]), weights[~failed][place].cumsum(0)])
    below, upto = (negative[torch.searchsorted(others, own, right=right)] for right in (False, True))
    return (positive * (below + upto)).sum(0) / (2 * positive.sum(0) * negative[-1])


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


def kendall(scores: Tensor, observed: Tensor, weights: Tensor) -> Tensor:
    """Kendall's tau-b: pairs in order less pairs out of order, over the mean number of pairs that do not tie.

    Args:
        scores, observed: (M,); infinite values tie.  weights: (M, R), whole numbers.

    Cost: M M R products; half a second on one core for 2,000 inputs and 1,000 resamples.
    """
    x, y = (v.unique(return_inverse=True)[1].float() for v in (scores, observed))  # places, so that infinities tie
    ordered = weights.new_zeros(weights.shape[1])
    for rows in torch.arange(len(x)).split(max(1, SIGNS // max(1, len(x)))):
        sign = torch.sign(x[rows, None] - x) * torch.sign(y[rows, None] - y)  # shape: (rows, M)
        ordered += (weights[rows] * (sign @ weights.float())).sum(0)  # float32 is exact for whole numbers below 2^24
    distinct = [weights.sum(0) ** 2 - (_by_score(v, weights)[0] ** 2).sum(0) for v in (scores, observed)]
    spread = distinct[0] * distinct[1]
    return ordered / torch.where(spread > 0, spread, torch.nan).sqrt()


def fpr95(scores: Tensor, failed: Tensor, weights: Tensor) -> Tensor:
    """Share of the inputs that held which are turned away with the 95 per cent of failures of highest score.

    Lower is better. Args: as `auroc`.
    """
    positive, negative = (
        part.flip(0).cumsum(0) for part in _by_score(scores, weights * failed[:, None], weights * ~failed[:, None])
    )
    if not len(positive):
        return weights.new_full((weights.shape[1],), torch.nan)
    caught = positive >= RECALL * positive[-1] * (1 - 1e-12)  # shape: (distinct, R)
    false = negative.gather(0, caught.int().argmax(0)[None])[0] / negative[-1]
    return torch.where(positive[-1] > 0, false, torch.nan)


def aurc(scores: Tensor, failed: Tensor, weights: Tensor) -> Tensor:
    """Mean failure rate of what is kept, over all numbers of inputs kept, lowest scores first.

    Lower is better. Within a tie of t inputs with p failures, after n inputs with e failures, the i-th input kept
    has the mean rate p / t + (e - n p / t) / i, whose sum over i has harmonic numbers. Args: as `auroc`.
    """
    positive, every = _by_score(scores, weights * failed[:, None], weights)
    upto, rate = every.cumsum(0), positive / every.clamp_min(torch.finfo(every.dtype).tiny)
    before = upto - every
    surplus = positive.cumsum(0) - positive - rate * before
    harmonic = torch.digamma(torch.cat([torch.zeros_like(upto[:1]), upto]) + 1).diff(dim=0)  # sum of 1 / i in each tie
    return (positive + surplus * harmonic).sum(0) / every.sum(0)


def e_aurc(scores: Tensor, failed: Tensor, weights: Tensor) -> Tensor:
    """AURC less that of the order with all failures last; lower is better, 0 is ideal. Args: as `auroc`."""
    return aurc(scores, failed, weights) - aurc(failed.double(), failed, weights)


def augrc(scores: Tensor, failed: Tensor, weights: Tensor) -> Tensor:
    """Share of all inputs that are kept and fail, averaged over coverage; lower is better.

    It is (1 - AUROC) a (1 - a) + (1 - a)^2 / 2 with a the accuracy. Args: as `auroc`.
    """
    positive, every = _by_score(scores, weights * failed[:, None], weights)
    return (every * (positive.cumsum(0) - positive / 2)).sum(0) / every.sum(0) ** 2


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


def holm(chances: Sequence[float | None]) -> list[float | None]:
    """Holm's correction: p-values such that rejecting those below a level errs in any one no more often than that.

    The k-th smallest of m becomes the largest so far of (m - k + 1) p; None stays None and does not count.

    Source: A Simple Sequentially Rejective Multiple Test Procedure, S. Holm, 1979, Scand. J. Statist. 6, 65-70.
    """
    told = sorted((p, place) for place, p in enumerate(chances) if p is not None)
    adjusted: list[float | None] = [None] * len(chances)
    most = 0.0
    for k, (p, place) in enumerate(told):
        most = max(most, min(1.0, (len(told) - k) * p))
        adjusted[place] = most
    return adjusted


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

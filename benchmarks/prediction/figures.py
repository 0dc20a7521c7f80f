"""What scores of several networks rank on the same sealed images, with intervals.

A figure is the mean over networks. A resample draws images, each with all its networks, since these are not independent
of each other. Where images that fail in the same networks are one stratum, each network keeps its number of failures in
every resample, and AUGRC is the falling straight line of AUROC that `brittle.agreement.metrics` gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from brittle.agreement.conditional import partial_spearman
from brittle.agreement.metrics import Resampled, auroc, bootstrap, resample_weights


@dataclass(frozen=True)
class Ranked:
    """How well a score ranks failures: AUROC of each network, and the accuracy of each."""

    by_network: list[Resampled]
    accuracies: list[float]

    @property
    def auroc(self) -> Resampled:
        return mean(self.by_network)

    @property
    def augrc(self) -> Resampled:
        """(1 - AUROC) a (1 - a) + (1 - a)^2 / 2; lower is better."""
        each = zip(self.by_network, self.accuracies, strict=True)
        line = lambda r, a: (1 - r) * a * (1 - a) + (1 - a) ** 2 / 2  # noqa: E731
        return mean([Resampled(line(r.value, a), line(r.resamples, a)) for r, a in each])


def resampled(pattern: Tensor, resamples: int, seed: int = 0) -> Tensor:
    """How often each image is drawn. pattern: (K, M) bool of K networks, equal ones being one stratum -> (M, R)."""
    strata = (pattern.long() * 2 ** torch.arange(len(pattern))[:, None]).sum(0)
    return resample_weights(strata, resamples, torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Sealed:
    """What failed in each of K networks, and resamples of the images; a network's figure is over those that count."""

    failed: Tensor  # shape: (K, M) bool
    counts: Tensor  # shape: (K, M) bool
    weights: Tensor  # shape: (M, R)

    def ranked(self, scores: Sequence[Tensor]) -> Ranked:
        """scores: (M,) of each network, higher means brittler."""
        found, accuracies = [], []
        for score, failed, rows in zip(scores, self.failed, self.counts, strict=True):
            found.append(bootstrap(auroc, score[rows], failed[rows], self.weights[rows]))
            accuracies.append(1 - failed[rows].double().mean().item())
        return Ranked(found, accuracies)

    def partial(self, scores: Sequence[Tensor], given: Sequence[Tensor]) -> Resampled:
        """Spearman of a score and failure where another score is held fixed."""
        each = zip(scores, given, self.failed, self.counts, strict=True)
        return mean([partial_spearman(x[c], y[c].double(), z[c], self.weights[c]) for x, z, y, c in each])


def mean(figures: Sequence[Resampled]) -> Resampled:
    """The mean of paired figures."""
    total = reduce(lambda a, b: Resampled(a.value + b.value, a.resamples + b.resamples), figures)
    return Resampled(total.value / len(figures), total.resamples / len(figures))

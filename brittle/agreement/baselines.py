"""What a user would compute anyway: scores from the final model alone. Higher means brittler.

    softmax confidence     log(1 - p_max): orders as -p_max does, but without its saturation at 1
    logit margin           -(z_a - z_b), a predicted, b the runner-up
    first-order distance   -min_k (z_a - z_k) / |grad (z_a - z_k)|_*, the distance to the nearest class boundary of
                           the linearised model; |.|_* is the dual norm: L2 for L2, L1 for Linf
    trust score            -(distance to the nearest training example of a class that is not predicted)
                            / (distance to the nearest one of the predicted class), outliers filtered
    extrapolated margin    -(m_0 + (m_s - m_0) r / s), what a straight line through the clean margin and the margin
                           at the largest severity s that the shift map sees gives at the reference r

The last takes the same small probes as the shift map, without a kernel: a score that looks at probes must beat it.

Sources: A Baseline for Detecting Misclassified and Out-of-Distribution Examples, D. Hendrycks and K. Gimpel, 2017,
https://arxiv.org/abs/1610.02136. DeepFool, S. Moosavi-Dezfooli, A. Fawzi and P. Frossard, 2016,
https://arxiv.org/abs/1511.04599. To Trust or Not to Trust a Classifier, H. Jiang, B. Kim, M. Guan and M. Gupta, 2018,
https://arxiv.org/abs/1805.11783.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from brittle.data import Examples
from brittle.probes import margin_gradient
from brittle.records import Norm, Pairs, Queries, ShiftMap
from brittle.subject import Subject

RIVALS = 9
"""Rivals whose boundaries the first-order distance looks at, likeliest first: all of them up to ten classes."""


def baselines(
    subject: Subject,
    queries: Queries,
    norm: Norm = "l2",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """The four scores by name, each (M,) float64, higher meaning brittler.

    Args:
        norm: of the distance that the first-order score stands for.
        progress: called with (steps done, all steps): one a rival, one a class of the training data.

    Cost: min(9, C - 1) gradient passes a query; one nearest-neighbour search of the training data in itself.
    """
    rivals = min(RIVALS, subject.classes - 1)
    steps = rivals + subject.classes
    report = progress or (lambda done, total: None)
    return {
        "softmax confidence": softmax_confidence(queries.logits),
        "logit margin": -queries.margin.double(),
        "first-order distance": -first_order_distance(
            subject, queries.inputs, queries.logits, norm, lambda done: report(done, steps)
        ),
        "trust score": -trust_score(
            subject.train, queries.inputs, queries.pairs.predicted, lambda done: report(rivals + done, steps)
        ),
    }


def softmax_confidence(logits: Tensor) -> Tensor:
    """log(1 - p_max) = logsumexp of all logits but the largest - logsumexp of all. logits: (M, C) -> (M,)."""
    ordered = logits.double().sort(dim=1, descending=True).values
    return ordered[:, 1:].logsumexp(1) - ordered.logsumexp(1)


def first_order_distance(
    subject: Subject,
    inputs: Tensor,
    logits: Tensor,
    norm: Norm = "l2",
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Distance to the nearest class boundary of the linearised model, in raw units; infinite without a gradient.

    Exact where the logits are linear in the input and the bounds do not matter.

    Args:
        inputs: (M, *input).  logits: (M, C), at the inputs.

    Returns:
        Shape (M,), float64.
    """
    order = logits.argsort(dim=1, descending=True, stable=True)  # shape: (M, C)
    nearest = torch.full((len(inputs),), torch.inf, dtype=torch.float64)
    for k in range(1, min(RIVALS, logits.shape[1] - 1) + 1):
        margin, gradient = margin_gradient(subject, inputs, Pairs(order[:, 0], order[:, k]))
        slope = gradient.double().flatten(1).norm(p=2 if norm == "l2" else 1, dim=1)
        distance = torch.where(slope > 0, margin.double() / slope, torch.inf)
        nearest = torch.minimum(nearest, distance)
        if progress:
            progress(k)
    return nearest


def extrapolated_margin(shift: ShiftMap) -> Tensor:
    """Minus the lead over the best other class that a straight line predicts at each family's reference.

    Of the lines and parabolas through the map's severities, the line through the largest ranked failures best on
    25 of 27 pairs of small CNN and family (digits, Fashion-MNIST, MNIST).

    Returns:
        Shape (M, F), float64, logits.
    """
    factor = (shift.reference / shift.severities[:, -1]).double()  # shape: (F,)
    clean = shift.margin.double()[:, None]
    return -(clean + (shift.probed_lead[:, :, -1].double() - clean) * factor)


def trust_score(
    train: Examples,
    inputs: Tensor,
    predicted: Tensor,
    progress: Callable[[int], None] | None = None,
    neighbours: int = 10,
    filtered: float = 0.1,
) -> Tensor:
    """Distance to the nearest other class over distance to the predicted class, on raw inputs.

    Of each class the share `filtered` of examples with the farthest k-th neighbour in their class is left out
    first. A class without training examples is infinitely far.

    Args:
        inputs: (M, *input).  predicted: (M,) classes.  neighbours: k.

    Returns:
        Shape (M,), float64, at least 0.
    """
    points, flat = inputs.flatten(1).numpy(), train.inputs.flatten(1).numpy()
    own = torch.full((len(inputs),), torch.inf, dtype=torch.float64)
    other = own.clone()
    for done, label in enumerate(train.targets.unique(), start=1):
        kept = _dense(flat[train.targets == label], neighbours, filtered)
        distance = torch.from_numpy(NearestNeighbors(n_neighbors=1).fit(kept).kneighbors(points)[0])[:, 0].double()
        mine = predicted == label
        own = torch.where(mine, distance, own)
        other = torch.where(mine, other, torch.minimum(other, distance))
        if progress:
            progress(done)
    return other / own.clamp_min(torch.finfo(own.dtype).tiny)


def _dense(points: np.ndarray, neighbours: int, filtered: float) -> np.ndarray:
    """The points of a class without the share whose k-th neighbour lies farthest."""
    drop, k = int(filtered * len(points)), min(neighbours, len(points) - 1)
    if not drop or not k:
        return points
    radius = NearestNeighbors(n_neighbors=k).fit(points).kneighbors()[0][:, -1]  # without the point itself
    return points[np.argsort(radius, kind="stable")[: len(points) - drop]]

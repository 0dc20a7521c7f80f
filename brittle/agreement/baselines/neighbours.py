"""Scores from distances to the training data, on raw inputs and on penultimate features. Higher means brittler.

    trust score               -(distance to the nearest training example of a class that is not predicted)
                               / (distance to the nearest one of the predicted class), outliers filtered, on inputs
    trust score on features   the same on what enters the last layer
    nearest-neighbour ratio   distance to the nearest example of the predicted class / to the nearest of another one,
                              on features, nothing filtered

Source: To Trust or Not to Trust a Classifier, H. Jiang, B. Kim, M. Guan and M. Gupta, 2018,
https://arxiv.org/abs/1805.11783.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from brittle.data import Examples
from brittle.mass import penultimate
from brittle.records import Queries
from brittle.subject import Subject


def neighbour_scores(
    subject: Subject, queries: Queries, progress: Callable[[int], None] | None = None
) -> dict[str, Tensor]:
    """The three scores by name, each (M,) float64. progress: called with the number of scores done, 1 to 3."""
    predicted, report = queries.pairs.predicted, progress or (lambda done: None)
    pixels = trust_score(subject.train, queries.inputs, predicted)
    report(1)
    learned = Examples(penultimate(subject, subject.train), subject.train.targets)
    features = penultimate(subject, Examples(queries.inputs, predicted))
    trusted = trust_score(learned, features, predicted)
    report(2)
    ratio = nearest_ratio(learned, features, predicted)
    report(3)
    return {"trust score": -pixels, "trust score on features": -trusted, "nearest-neighbour ratio": ratio}


def trust_score(
    train: Examples, inputs: Tensor, predicted: Tensor, neighbours: int = 10, filtered: float = 0.1
) -> Tensor:
    """Distance to the nearest other class over distance to the predicted class.

    Of each class the share `filtered` of examples with the farthest k-th neighbour in their class is left out
    first. A class without training examples is infinitely far.

    Args:
        train: inputs or features, (N, *), with their classes.  inputs: (M, *).  predicted: (M,) classes.
        neighbours: k.

    Returns:
        Shape (M,), float64, at least 0.
    """
    own, other = _nearest(train, inputs, predicted, lambda points: _dense(points, neighbours, filtered))
    return other / own.clamp_min(torch.finfo(own.dtype).tiny)


def nearest_ratio(train: Examples, inputs: Tensor, predicted: Tensor) -> Tensor:
    """Distance to the nearest example of the predicted class over that to the nearest of another, 1 where both are 0.

    Arguments and shapes as for `trust_score`; infinite where no example has the predicted class.
    """
    own, other = _nearest(train, inputs, predicted, lambda points: points)
    return torch.where(own == other, 1.0, own / other.clamp_min(torch.finfo(own.dtype).tiny))


def _nearest(
    train: Examples, inputs: Tensor, predicted: Tensor, kept: Callable[[np.ndarray], np.ndarray]
) -> tuple[Tensor, Tensor]:
    """Distances to the nearest example of the predicted class and of any other, (M,) each. kept: of a class."""
    points, flat = inputs.flatten(1).numpy(), train.inputs.flatten(1).numpy()
    own = torch.full((len(inputs),), torch.inf, dtype=torch.float64)
    other = own.clone()
    for label in train.targets.unique():
        search = NearestNeighbors(n_neighbors=1).fit(kept(flat[train.targets == label]))
        distance = torch.from_numpy(search.kneighbors(points)[0])[:, 0].double()
        mine = predicted == label
        own = torch.where(mine, distance, own)
        other = torch.where(mine, other, torch.minimum(other, distance))
    return own, other


def _dense(points: np.ndarray, neighbours: int, filtered: float) -> np.ndarray:
    """The points of a class without the share whose k-th neighbour lies farthest."""
    drop, k = int(filtered * len(points)), min(neighbours, len(points) - 1)
    if not drop or not k:
        return points
    radius = NearestNeighbors(n_neighbors=k).fit(points).kneighbors()[0][:, -1]  # without the point itself
    return points[np.argsort(radius, kind="stable")[: len(points) - drop]]

"""Small models from scores to the minimal distance, fitted on calibration images, and what a side adds to another.

Scores and distances go to normal scores of their calibration ranks, so that units and tails do not matter. Two models:
`ridge`, linear, its penalty chosen by leave-one-out on the calibration images; `boosted`, gradient-boosted trees of
eight leaves. Both predict the distance's normal score, a higher one meaning farther, and are held against the
distance by Spearman's coefficient. Gains are differences on the same resamples of images (paired bootstrap).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from scipy.stats import norm as normal
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import RidgeCV
from torch import Tensor

from brittle.agreement.metrics import Resampled, bootstrap, resample_weights, spearman

PENALTIES = tuple(10.0**k for k in np.arange(-1, 4.1, 0.5))
TREES = {"max_iter": 150, "learning_rate": 0.05, "max_leaf_nodes": 8, "min_samples_leaf": 20, "l2_regularization": 1.0}
RESAMPLES = 2000

MODELS = ("ridge", "boosted")


def fitted(known: Tensor, distance: Tensor, asked: Tensor, plain: Tensor | None = None) -> dict[str, Tensor]:
    """What the two models say of new images.

    Args:
        known: (M, F) scores of the calibration images.  distance: (M,) theirs.  asked: (M', F) of the new ones.
        plain: (F,) bool, columns that stay as they are (classes as indicators).

    Returns:
        By model, (M',) float64, higher meaning farther.
    """
    plain = torch.zeros(known.shape[1], dtype=torch.bool) if plain is None else plain
    x, new = (torch.where(plain, part.double(), normal_scores(known, part)).numpy() for part in (known, asked))
    y = normal_scores(distance[:, None], distance[:, None])[:, 0].numpy()
    models = {"ridge": RidgeCV(PENALTIES), "boosted": HistGradientBoostingRegressor(random_state=0, **TREES)}
    return {name: torch.from_numpy(model.fit(x, y).predict(new)) for name, model in models.items()}


def normal_scores(known: Tensor, asked: Tensor) -> Tensor:
    """Normal quantile of each value's mid-rank among the known ones of its column, between which it is linear.

    known: (M, F), asked: (M', F) -> (M', F) float64. Infinite values take the place of the farthest finite one.
    """
    columns = []
    for old, new in zip(known.double().T.numpy(), asked.double().T.numpy(), strict=True):
        finite = old[np.isfinite(old)]
        low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
        values, counts = np.unique(np.clip(old, low, high), return_counts=True)
        share = (np.cumsum(counts) - counts / 2) / len(old)
        columns.append(normal.ppf(np.interp(np.clip(new, low, high), values, share)))
    return torch.from_numpy(np.stack(columns, 1))


def weights_for(count: int, seed: int = 0) -> Tensor:
    """The resamples of the images, (M, R), shared by all that is compared."""
    return resample_weights(torch.zeros(count), RESAMPLES, torch.Generator().manual_seed(seed))


def follows(predicted: Tensor, distance: Tensor, weights: Tensor) -> Resampled:
    """Spearman's coefficient with its resamples. predicted: higher means farther."""
    return bootstrap(spearman, predicted, distance, weights)


def figure(found: Resampled) -> Mapping[str, float | None]:
    """Value and 95 % interval."""
    e = found.estimate
    return {"value": e.value, "low": e.low, "high": e.high}

"""Models of failure from many scores, all of them fitted on the calibration part alone.

logistic    every score to normal quantiles, the predicted and the rival class as they are; L2 penalty
boosted     shallow trees on the scores as they are, many and small
both        the mean of the two probabilities: the predictor
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, QuantileTransformer, StandardScaler
from torch import Tensor

Kind = Literal["logistic", "boosted"]
KINDS: tuple[Kind, ...] = ("logistic", "boosted")

PENALTY, TREES = 0.03, 150


@dataclass(frozen=True)
class Table:
    """Scores of M inputs by name, each (M,), (M, k), or (M,) int64 for a class; and what failed."""

    scores: Mapping[str, Tensor]
    failed: Tensor  # shape: (M,) bool

    def __getitem__(self, rows: Tensor | slice) -> Table:
        return Table({name: score[rows] for name, score in self.scores.items()}, self.failed[rows])

    def only(self, names: Sequence[str]) -> Table:
        return Table({name: self.scores[name] for name in names}, self.failed)

    def columns(self) -> tuple[NDArray[np.float64], list[int]]:
        """All scores side by side (M, D), and the columns that hold classes; infinities as far out as need be."""
        wide = {name: score[:, None] if score.dim() == 1 else score for name, score in self.scores.items()}
        classes, at = [], 0
        for score in wide.values():
            classes += [] if score.is_floating_point() else list(range(at, at + score.shape[1]))
            at += score.shape[1]
        joined = torch.cat([score.double() for score in wide.values()], dim=1)
        return joined.clamp(-1e30, 1e30).numpy(), classes


def rates(kind: Kind, known: Table, asked: Table, seed: int = 0) -> Tensor:
    """Failure rates of `asked` by a model fitted on `known`: (M,) float64."""
    (x, classes), (at, _) = known.columns(), asked.columns()
    model = _logistic(classes, x.shape[1]) if kind == "logistic" else _boosted(classes, seed)
    return torch.from_numpy(model.fit(x, known.failed.numpy()).predict_proba(at)[:, 1])


def _logistic(classes: list[int], width: int) -> Any:
    numbers = [k for k in range(width) if k not in classes]
    normal = QuantileTransformer(n_quantiles=300, output_distribution="normal", random_state=0)
    columns = make_column_transformer(
        (make_pipeline(normal, StandardScaler()), numbers), (OneHotEncoder(handle_unknown="ignore"), classes)
    )
    return make_pipeline(columns, LogisticRegression(C=PENALTY, max_iter=400))


def _boosted(classes: list[int], seed: int) -> Any:
    return HistGradientBoostingClassifier(
        learning_rate=0.05,
        max_iter=TREES,
        max_leaf_nodes=10,
        min_samples_leaf=40,
        l2_regularization=20.0,
        max_features=0.3,
        categorical_features=classes or None,
        early_stopping=False,
        random_state=seed,
    )

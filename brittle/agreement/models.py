"""Models of failure from many scores at once: what several say together, and what some add to the others.

    logistic    every score by the normal quantile of its rank, classes by indicators; L2 penalty
    boosted     many small shallow trees on the scores as they are

Both are fitted to the log loss of known failures and so predict rates. A score is worth something beside others where
the models with it rank the failures of other inputs better than those without it: the models of both kinds, since
what the one makes of a score that the other cannot may be no more than shape.

Sources: Greedy Function Approximation: A Gradient Boosting Machine, J. Friedman, 2001, doi 10.1214/aos/1013203451;
Regression Modeling Strategies, F. Harrell, 2015, chapter 10.
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

PENALTY, QUANTILES = 0.03, 300
TREES = {
    "learning_rate": 0.05,
    "max_iter": 150,
    "max_leaf_nodes": 10,
    "min_samples_leaf": 40,
    "l2_regularization": 20.0,
    "max_features": 0.3,
}
SETTINGS = str((PENALTY, QUANTILES, TREES))
"""All of them, for what is kept of a fitted model."""


@dataclass(frozen=True)
class Table:
    """Scores of M inputs by name, each (M,), (M, k), or (M,) int64 for a class; and what failed."""

    scores: Mapping[str, Tensor]
    failed: Tensor  # shape: (M,) bool

    def __len__(self) -> int:
        return len(self.failed)

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
    """Failure rates of `asked` by a model fitted on `known`: (M,) float64; one rate where all or none failed there."""
    if known.failed.all() or not known.failed.any():
        return torch.full((len(asked),), (known.failed.sum().item() + 0.5) / (len(known) + 1), dtype=torch.float64)
    (x, classes), (at, _) = known.columns(), asked.columns()
    model = _logistic(classes, *x.shape) if kind == "logistic" else _boosted(classes, seed)
    return torch.from_numpy(model.fit(x, known.failed.numpy()).predict_proba(at)[:, 1])


def _logistic(classes: list[int], count: int, width: int) -> Any:
    numbers = [k for k in range(width) if k not in classes]
    normal = QuantileTransformer(n_quantiles=min(QUANTILES, count), output_distribution="normal", random_state=0)
    columns = make_column_transformer(
        (make_pipeline(normal, StandardScaler()), numbers), (OneHotEncoder(handle_unknown="ignore"), classes)
    )
    return make_pipeline(columns, LogisticRegression(C=PENALTY, max_iter=400))


def _boosted(classes: list[int], seed: int) -> Any:
    return HistGradientBoostingClassifier(
        categorical_features=classes or None, early_stopping=False, random_state=seed, **TREES
    )

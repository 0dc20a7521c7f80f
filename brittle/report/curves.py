"""Curves behind the figures: pure functions from arrays to points.

- ROC curve of a score s over failures y: true positive rate against false positive rate as the threshold falls;
  tied scores move both at once, so that the area under the curve is the AUROC with ties counted one half.
- Survival: the share of inputs whose distance or severity exceeds d, for every d.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def read(arrays: Mapping[str, Tensor], key: str) -> Array | None:
    """One array in float64, or None where the run did not keep it."""
    return arrays[key].detach().double().cpu().numpy() if key in arrays else None


def roc(scores: Array, failed: Array, points: int = 200) -> tuple[Array, Array] | None:
    """False and true positive rate at falling thresholds, at most about `points` of them.

    Args:
        scores: (M,), higher means brittler; NaN ranks last.
        failed: (M,), nonzero where the failure was observed.

    Returns:
        Two arrays from 0 to 1, or None where all or none failed: then there is nothing to rank.
    """
    y = np.asarray(failed) != 0
    if y.all() or not y.any():
        return None
    s = np.where(np.isnan(scores), -np.inf, scores)
    order = np.argsort(-s, kind="stable")
    last_of_tie = np.append(s[order][1:] != s[order][:-1], True)
    true = np.append(0, np.cumsum(y[order])[last_of_tie]) / y.sum()
    false = np.append(0, np.cumsum(~y[order])[last_of_tie]) / (~y).sum()
    kept = thin(len(true), points)
    return false[kept], true[kept]


def survival(values: Array, points: int = 200) -> tuple[Array, Array]:
    """Steps (d, share of values above d) from d = 0 to the largest finite value; NaN is left out."""
    known = values[~np.isnan(values)]
    finite = np.sort(known[np.isfinite(known)])
    at = np.append(0.0, finite)
    above = np.array([(known > d).mean() for d in at]) if len(known) else np.zeros(1)
    kept = thin(len(at), points)
    return at[kept], above[kept]


def reached(values: Array, at: Array) -> Array:
    """Share of `values` (M,) that are at most each of `at` (K,); infinite values never are. Shape (K,)."""
    known = np.sort(values[~np.isnan(values)])
    return np.searchsorted(known, at, side="right") / max(len(known), 1)


def thin(length: int, points: int) -> NDArray[np.int64]:
    """At most `points` positions spread over `length`, both ends kept."""
    return np.unique(np.linspace(0, length - 1, min(length, points)).round().astype(np.int64))

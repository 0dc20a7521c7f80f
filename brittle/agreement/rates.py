"""Predicted failure rates: a score calibrated on what happened.

The calibrator is isotonic: of all curves that never fall as the score rises, the one with the least squared error,
by pooling adjacent violators (M. Ayer and others, 1955, doi 10.1214/aoms/1177728423; B. Zadrozny and C. Elkan, 2002,
doi 10.1145/775047.775151). It takes no shape for granted, which matters where failures begin at a cliff: on the
digits, 97 % of the sealed probes fail whose predicted severity is below three quarters of the reference, 18 % of those
up to half as far beyond it, and a logistic curve over normal quantiles, bound to its one slope, said 67 % and 31 %. An
input that fails at the base rate, added beyond either end of the sample, keeps a few failures from making certainty.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from sklearn.isotonic import IsotonicRegression
from torch import Tensor

from brittle.errors import DataError, NotFiniteError


def calibrate(score: Tensor, failed: Tensor) -> Callable[[Tensor], Tensor]:
    """A curve from score to failure rate, fitted on calibration inputs; it never falls as the score rises.

    Where the score says nothing there (it is constant, ranks failures backwards, or all or none failed) the curve
    is flat, at (failures + 1/2) / (inputs + 1).

    Args:
        score: (M,), higher means brittler; infinite values rank first or last.
        failed: (M,) bool.

    Returns:
        A function from scores (any number) to rates in [0, 1], float64.

    Raises:
        DataError: without inputs.  NotFiniteError: for a score that is NaN.
    """
    if not len(score):
        raise DataError("calibration needs at least one input, found none; hold some test inputs back for it")
    if score.isnan().any():
        raise NotFiniteError(f"scores must be numbers, found NaN at {int(score.isnan().sum())} inputs to calibrate on")
    flat = (failed.sum().item() + 0.5) / (len(failed) + 1)
    constant = lambda scores: torch.full(scores.shape, flat, dtype=torch.float64)  # noqa: E731
    if failed.all() or not failed.any():
        return constant
    low, high = _range(score)
    x = torch.cat([score.new_tensor([low, high]), score.clamp(low, high)]).double()
    y = torch.cat([torch.tensor([flat, flat]), failed.double()])
    curve = IsotonicRegression().fit(x.numpy(), y.numpy())
    if len(np.unique(curve.predict(x[2:].numpy()))) == 1:
        return constant
    at, rates = curve.X_thresholds_, curve.y_thresholds_
    return lambda scores: torch.from_numpy(np.interp(scores.double().clamp(low, high).numpy(), at, rates))


def _range(score: Tensor) -> tuple[float, float]:
    """Ends for infinite scores: one span beyond the finite ones."""
    finite = score[score.isfinite()].double()
    low, high = (finite.min().item(), finite.max().item()) if len(finite) else (0.0, 0.0)
    span = high - low or 1.0
    return low - span, high + span

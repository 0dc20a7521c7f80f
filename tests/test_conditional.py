"""What a score says beyond margin and confidence: by regression of ranks, and at the ends where it is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from torch import Tensor

from brittle.agreement.conditional import confident_half, partial_spearman, ranks
from brittle.agreement.metrics import auroc, resample_weights


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """Two scores and failures that depend on both."""
    draws = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 400, generator=draws, dtype=torch.float64)
    return one, other, one + other + torch.randn(400, generator=draws) > 1


def weights_for(failed: Tensor, resamples: int = 200) -> Tensor:
    return resample_weights(failed, resamples, torch.Generator().manual_seed(0))


def left_over(values: Tensor, given: Tensor, times: Tensor) -> np.ndarray:
    """What a weighted regression of ranks on the ranks of `given` leaves over."""
    y, x = (rankdata(v.numpy()) for v in (values, given))
    design, w = np.stack([np.ones_like(x), x], 1), times.double().numpy()
    beta = np.linalg.solve(design.T @ (w[:, None] * design), design.T @ (w * y))
    return (y - design @ beta) * np.sqrt(w)


def test_it_is_the_correlation_of_what_ranks_leave_over_in_every_resample() -> None:
    one, other, failed = drawn()
    weights = weights_for(failed, 5)
    found = partial_spearman(one, failed.double(), other, weights)
    for value, times in [(found.value, torch.ones(400)), *zip(found.resamples.tolist(), weights.T, strict=True)]:
        x, y = left_over(one, other, times), left_over(failed.double(), other, times)
        assert value == pytest.approx(x @ y / np.sqrt((x @ x) * (y @ y)), abs=1e-9)


def test_a_score_adds_what_it_has_of_its_own_and_nothing_else() -> None:
    one, other, failed = drawn()
    weights = weights_for(failed)
    low = partial_spearman(one, failed.double(), other, weights).estimate.low
    assert low is not None
    assert low > 0.2
    noisy = other + 0.1 * torch.randn(400, generator=torch.Generator().manual_seed(1))
    nothing = partial_spearman(noisy, failed.double(), other, weights).estimate
    assert nothing.low is not None
    assert nothing.high is not None
    assert nothing.low < 0 < nothing.high


def test_given_itself_nothing_is_left_and_none_is_said() -> None:
    one, _, failed = drawn()
    assert partial_spearman(one, failed.double(), one, weights_for(failed)).estimate.value is None
    assert partial_spearman(torch.ones(400), failed.double(), one, weights_for(failed)).estimate.value is None


def test_the_confident_half_leaves_out_the_others() -> None:
    one, other, failed = drawn()
    found = confident_half(one, failed, other, weights_for(failed))
    rows = other <= other.median()
    assert found.value == pytest.approx(auroc(one[rows], failed[rows], torch.ones(int(rows.sum()), 1)).item())
    assert 150 < rows.sum() < 250
    shuffled = torch.where(rows, one, one.flip(0))
    assert confident_half(shuffled, failed, other, weights_for(failed)).value == found.value


def test_ranks_are_mid_ranks() -> None:
    values = torch.tensor([2.0, 1.0, 2.0, torch.inf, torch.inf])
    assert torch.equal(ranks(values) + 0.5, torch.from_numpy(rankdata(values.numpy())))

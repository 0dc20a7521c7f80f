"""What ours add to all baselines together: found where it is there, not where it is not; nothing from hardly any."""

from __future__ import annotations

import torch
from torch import Tensor

from brittle.agreement.increment import SIDES, Together, free_controls, increment, together
from brittle.agreement.models import KINDS
from brittle.findings import Increment
from brittle.records import Pairs, Queries

COUNT = 1500


def held(adds: float, count: int = COUNT) -> Increment:
    """Failures follow a baseline and, `adds` times as much, what our score alone knows."""
    draws = torch.Generator().manual_seed(0)
    base, own, more = torch.randn(3, 2 * count, generator=draws, dtype=torch.float64)
    failed = torch.rand(2 * count, generator=draws) < torch.sigmoid(2 * base + adds * own - 1.5)
    parts = [
        ({"base": base[r], "class": torch.zeros(count, dtype=torch.int64)}, {"own": own[r], "more": more[r]})
        for r in (slice(count), slice(count, None))
    ]
    models = together(parts[0], failed[:count], parts[1])
    assert set(models.rate) == {f"{side} {kind}" for side in SIDES for kind in KINDS}
    return increment(models, failed[count:], torch.Generator().manual_seed(1), resamples=300)


def test_what_a_score_knows_alone_is_a_gain_in_both_kinds_of_model() -> None:
    found = held(2.0)
    assert found.verdict == "pass"
    for kind in KINDS:
        gain, low = found.gain[kind], found.gain[kind].low
        assert low is not None
        assert low > 0
        assert abs((gain.value or 0) - ((found.together[kind].value or 0) - (found.baselines[kind].value or 0))) < 1e-9
    assert "add to" in found.sentence


def test_a_score_that_knows_nothing_adds_nothing() -> None:
    found = held(0.0)
    assert found.verdict != "pass"
    assert all(abs(found.gain[kind].value or 0) < 0.02 for kind in KINDS)


def test_hardly_any_failures_decide_nothing() -> None:
    draws = torch.Generator().manual_seed(0)
    score = torch.randn(60, generator=draws, dtype=torch.float64)
    failed = torch.zeros(60, dtype=torch.bool)
    failed[:4] = True
    models = together(({"a": score}, {"b": score}), failed, ({"a": score}, {"b": score}))
    assert increment(models, failed, draws, resamples=50).verdict == "inconclusive"
    none = together(({"a": score}, {"b": score}), torch.zeros(60, dtype=torch.bool), ({"a": score}, {"b": score}))
    assert all((rate == rate[0]).all() for rate in none.rate.values()), "one rate for all"
    assert increment(none, failed, draws, resamples=50).verdict == "inconclusive"
    assert isinstance(none, Together)


def test_controls_are_classes_logits_and_averages() -> None:
    logits: Tensor = torch.tensor([[0.0, 2.0, 1.0]])
    queries = Queries(torch.tensor([0]), torch.zeros(1, 4), torch.tensor([1]), logits, Pairs.of(logits))
    found = free_controls(queries, logits.softmax(1).double())
    assert found["predicted class"].tolist() == [1]
    assert found["rival class"].tolist() == [2]
    assert torch.allclose(found["averaged outputs"], logits.double().log_softmax(1), atol=1e-6)
    assert "averaged outputs" not in free_controls(queries)

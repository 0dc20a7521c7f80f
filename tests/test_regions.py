"""Holes against random regions: exact under the null, blind to confidence and class, awake to what is planted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom
from torch import Tensor

from brittle.agreement import Claim, hole_tests, peers_of, wilson
from brittle.agreement.regions import (
    MOST_BINS,
    PER_STRATUM,
    Peers,
    corrected,
    false_findings,
    least_confident,
    p_value,
    permuted,
    smallest_p,
    stand_ins,
    strata_of,
)
from brittle.findings import NOTHING, HoleTest

CLASSES, FAMILIES = 5, 3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(m: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Predicted classes and confidences."""
    generator = seeded(seed)
    return torch.randint(CLASSES, (m,), generator=generator), torch.randn(m, generator=generator, dtype=torch.float64)


def chances(predicted: Tensor, confidence: Tensor) -> Tensor:
    """Failure by class, confidence and family alone: (M, F)."""
    offset = torch.tensor([-0.5, 0.0, 0.5]) + 0.4 * (predicted[:, None] - 2)
    return torch.sigmoid(offset - 1.5 * confidence[:, None])


def happens(chance: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(chance.shape, generator=generator, dtype=torch.float64) < chance


def claim(inside: Tensor, family: int | Tensor = 0, rate: float = 0.5) -> Claim:
    m = len(inside)
    named = torch.full((m,), family) if isinstance(family, int) else family
    return Claim(inside, named, torch.full((m,), rate, dtype=torch.float64))


def unsure(predicted: Tensor, confidence: Tensor, seed: int = 3) -> list[Claim]:
    """Two regions of each class that say little but that their inputs are not confident."""
    generator, found = seeded(seed), []
    for label in range(CLASSES):
        for depth in (-0.8, -0.2):
            blurred = confidence + 0.3 * torch.randn(len(confidence), generator=generator, dtype=torch.float64)
            family = torch.randint(FAMILIES, (len(confidence),), generator=generator)
            found.append(claim((predicted == label) & (blurred < depth), family))
    return found


def of_one_stratum(failed: Tensor, inside: Tensor, regions: int = 4000) -> HoleTest:
    """Twenty inputs in one stratum."""
    one = torch.zeros(len(failed), dtype=torch.int64)
    drawn = stand_ins(one, regions, seeded())
    peers = Peers(one, torch.zeros(len(failed)), one, drawn, drawn)
    return hole_tests([claim(inside)], failed[:, None], peers)[0]


def first(k: int, of: int = 20) -> Tensor:
    return torch.arange(of) < k


class TestStrata:
    @settings(deadline=None, max_examples=30)
    @given(st.integers(1, 300), st.integers(0, 1000))
    def test_they_are_runs_of_confidence_within_a_class(self, m: int, seed: int) -> None:
        predicted, confidence = inputs(m, seed)
        strata = strata_of(predicted, confidence)
        for label in predicted.unique():
            own = strata[predicted == label]
            assert not set(own.tolist()) & set(strata[predicted != label].tolist())
            sizes = own.bincount()[own.min() :]
            assert len(sizes) <= MOST_BINS
            assert len(sizes) == 1 or sizes.min() >= PER_STRATUM
            assert sizes.max() - sizes.min() <= 1
            assert (own[confidence[predicted == label].argsort()].diff() >= 0).all()

    def test_stand_ins_are_of_the_same_stratum_and_equally_likely(self) -> None:
        strata = torch.tensor([2, 0, 2, 1, 0, 2])
        drawn = stand_ins(strata, 3000, seeded())
        assert (strata[drawn] == strata).all()
        assert (drawn.sort(dim=1).values == torch.arange(6)).all()
        for place in (0, 2, 5):
            counts = drawn[:, place].bincount(minlength=6)[[0, 2, 5]]
            assert (counts - 1000).abs().max() < 4 * (3000 * (1 / 3) * (2 / 3)) ** 0.5

    def test_outcomes_are_dealt_anew_whole_and_within_strata(self) -> None:
        strata, failed = torch.arange(40) // 8, happens(torch.full((40, FAMILIES), 0.4), seeded(1))
        dealt = permuted(failed, strata, seeded(2))
        assert not torch.equal(dealt, failed)
        for k in range(5):
            rows = strata == k
            assert sorted(dealt[rows].tolist()) == sorted(failed[rows].tolist())


class TestChance:
    @pytest.mark.parametrize(("failures", "hits"), [(8, 5), (8, 3), (4, 4), (12, 6)])
    def test_p_is_hypergeometric_in_one_stratum(self, failures: int, hits: int) -> None:
        """20 inputs, 7 of them members: so many failures among them by chance, up to Monte Carlo error."""
        failed = torch.cat([first(hits, 7), first(failures - hits, 13)])
        exact = hypergeom.sf(hits - 1, 20, failures, 7)
        found = of_one_stratum(failed, first(7))
        assert found.p_value == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 4000) ** 0.5 + 1 / 4000)
        assert found.p_value_of_class == found.p_value

    def test_random_regions_fail_at_the_rates_of_their_strata_and_families(self) -> None:
        predicted, confidence = inputs(200)
        failed = happens(chances(predicted, confidence), seeded(1))
        peers = peers_of(predicted, confidence, seeded(2), regions=4000)
        family = torch.randint(FAMILIES, (200,), generator=seeded(4))
        inside = confidence < -0.5
        [found] = hole_tests([claim(inside, family)], failed, peers)
        for groups, spread in ((peers.strata, found.random), (predicted, found.random_of_class)):
            expected = [failed[groups == groups[m], family[m]].double().mean() for m in inside.nonzero()[:, 0]]
            assert spread.value == pytest.approx(torch.stack(expected).mean().item(), abs=0.005)
            assert spread.low is not None
            assert spread.high is not None
            assert spread.low < spread.value < spread.high
        assert found.base_rate == pytest.approx(failed.double().mean(0)[family[inside]].mean().item())

    def test_a_p_value_is_never_nought(self) -> None:
        assert p_value(9, torch.arange(9)) == 1 / 10
        assert p_value(0, torch.arange(9)) == 1

    def test_the_smallest_p_is_that_of_the_best_draw(self) -> None:
        assert smallest_p(2, torch.tensor([5, 5, 1])) == 2 / 4
        assert smallest_p(5, torch.tensor([5, 5, 1])) == 3 / 4
        assert smallest_p(7, torch.tensor([5, 5, 1])) == 1 / 4

    def test_correction_is_over_the_testable_alone(self) -> None:
        """Benjamini and Hochberg by hand: p n / rank, never above that of the next rank."""
        assert corrected([0.01, 0.9, 0.03, 0.02], [True] * 4) == pytest.approx([0.04, 0.9, 0.04, 0.04])
        found = corrected([0.01, 0.9, 0.03, 0.02], [True, False, False, True])
        assert (found[1], found[2]) == (None, None)
        assert (found[0], found[3]) == (pytest.approx(0.02), pytest.approx(0.02))
        assert corrected([0.5], [False]) == [None]


class TestVerdict:
    def test_a_hole_passes_where_its_members_fail_and_the_others_hold(self) -> None:
        found = of_one_stratum(first(8), first(8))
        assert (found.verdict, found.members, found.failures) == ("pass", 8, 8)
        assert found.observed_rate == wilson(8, 8)
        assert (found.base_rate, found.lift) == (pytest.approx(0.4), pytest.approx(2.5))
        assert found.corrected == found.p_value

    def test_a_hole_fails_below_the_rate_of_all(self) -> None:
        assert of_one_stratum(~first(8), first(8)).verdict == "fail"

    def test_what_holds_of_every_peer_proves_nothing(self) -> None:
        """Far above the base rate, and yet no more than its class and confidence."""
        predicted = (torch.arange(60) // 20).long()
        confidence = torch.arange(60.0, dtype=torch.float64) % 20
        failed = (predicted == 0)[:, None]
        inside = (predicted == 0) & (confidence < 12)
        [found] = hole_tests([claim(inside)], failed, peers_of(predicted, confidence, seeded()))
        assert found.observed_rate.low is not None
        assert found.observed_rate.low > found.base_rate
        assert (found.p_value, found.corrected, found.verdict) == (1.0, None, "inconclusive")

    def test_few_members_get_no_verdict(self) -> None:
        found = of_one_stratum(first(4), first(4))
        assert found.p_value is not None
        assert found.p_value < 0.01
        assert (found.corrected, found.verdict) == (None, "inconclusive")

    def test_a_hole_without_members(self) -> None:
        found = of_one_stratum(first(5), first(0))
        assert (found.members, found.observed_rate, found.random, found.least_confident) == (0, *[NOTHING] * 3)
        assert (found.p_value, found.predicted_rate, found.lift, found.verdict) == (None, None, None, "inconclusive")
        assert found.base_rate == pytest.approx(0.25)

    def test_predicted_and_observed_are_rates_of_the_same_members(self) -> None:
        one = torch.zeros(20, dtype=torch.int64)
        rate = torch.linspace(1, 0, 20, dtype=torch.float64)
        peers = peers_of(one, rate, seeded())
        [low, high] = hole_tests(
            [Claim(first(8), one, rate), Claim(first(8), one, rate / 4)], (torch.arange(20) < 6)[:, None], peers
        )
        assert low.predicted_rate == pytest.approx(rate[:8].mean().item())
        assert (low.predicted_within, high.predicted_within) == (True, False)


class TestLeastConfident:
    def test_as_many_of_each_class(self) -> None:
        predicted, confidence = inputs(120)
        inside = torch.rand(120, generator=seeded(5)) < 0.2
        members, picks = least_confident(inside, predicted, confidence)
        assert sorted(members.tolist()) == inside.nonzero()[:, 0].tolist()
        assert torch.equal(predicted[members], predicted[picks])
        for label in predicted.unique():
            own, left = picks[predicted[picks] == label], predicted == label
            left[own] = False
            assert len(own) == 0 or confidence[own].max() <= confidence[left].min()

    def test_a_hole_of_the_least_confident_has_their_rate(self) -> None:
        predicted, confidence = inputs(200)
        failed = happens(chances(predicted, confidence), seeded(1))
        inside = confidence <= confidence.sort().values[29]
        family = torch.randint(FAMILIES, (200,), generator=seeded(4))
        [found] = hole_tests([claim(inside, family)], failed, peers_of(predicted, confidence, seeded()))
        assert found.least_confident == found.least_confident_of_class == found.observed_rate


class TestFalseFindings:
    def test_permuted_outcomes_rarely_make_a_finding(self) -> None:
        predicted, confidence = inputs(300)
        failed = happens(chances(predicted, confidence), seeded(1))
        peers = peers_of(predicted, confidence, seeded(2), regions=200)
        found = false_findings(unsure(predicted, confidence), failed, peers, seeded(7), runs=60)
        assert found.low is not None
        assert found.low <= 0.05

    def test_confidence_alone_rarely_makes_a_finding_where_class_alone_would(self) -> None:
        """Outcomes drawn anew from class and confidence, which the strata hold only in steps."""
        predicted, confidence = inputs(300)
        claims, calls, by_class = unsure(predicted, confidence), 0, 0
        peers = peers_of(predicted, confidence, seeded(2), regions=200)
        coarse = Peers(predicted, confidence, predicted, peers.of_class, peers.of_class)
        for run in range(40):
            failed = happens(chances(predicted, confidence), seeded(100 + run))
            calls += any(test.verdict == "pass" for test in hole_tests(claims, failed, peers))
            by_class += any(test.verdict == "pass" for test in hole_tests(claims, failed, coarse))
        low = wilson(calls, 40).low
        assert low is not None
        assert low <= 0.05
        assert by_class > 30

    def test_a_planted_region_is_found_among_others(self) -> None:
        found = [self.planted(seed) for seed in range(4)]
        assert sum(test.verdict == "pass" for test in found) >= 3
        for test in found:
            assert test.predicted_within
            assert test.random.high is not None
            assert test.observed_rate.value is not None
            assert test.observed_rate.value > test.random.high

    def planted(self, seed: int) -> HoleTest:
        """The test of 14 to 25 inputs of one class, of any confidence, most of which fail under one family."""
        predicted, confidence = inputs(300, seed)
        region = (predicted == 2) & (torch.rand(300, generator=seeded(11 + seed)) < 0.35)
        chance = chances(predicted, confidence)
        chance[region, 1] = 0.95
        claims = [*unsure(predicted, confidence), claim(region, 1, rate=0.95)]
        return hole_tests(claims, happens(chance, seeded(1)), peers_of(predicted, confidence, seeded(2)))[-1]

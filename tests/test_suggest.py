"""Greedy cover against the plain greedy and the best set, suggestions by name, and the retraining check."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp
from torch import Tensor, nn

from brittle.data import Examples
from brittle.errors import DataError, NotFiniteError, SubjectError
from brittle.findings import Estimate, Hole, HoleTest
from brittle.probes import Family
from brittle.subject import Subject
from brittle.suggest import choose, regions, retrain_check, suggest
from brittle.suggest.check import _verdict


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def coverage(pool: Tensor, covered: Tensor, chosen: list[int], weights: Tensor) -> float:
    """F(S) by its definition, one loop an axis."""
    total = 0.0
    for q in range(len(pool)):
        have = [*covered, *(pool[i] for i in chosen)]
        total += weights[q].item() * max([0.0, *(F.cosine_similarity(pool[q], v, dim=0).item() for v in have)])
    return total / weights.sum().item()


class TestChoose:
    @settings(deadline=None, max_examples=30)
    @given(st.integers(0, 10_000), st.integers(0, 4), st.integers(1, 8))
    def test_is_the_plain_greedy(self, seed: int, covered_count: int, count: int) -> None:
        """Each choice raises F by more than any other would, and its gain is that rise."""
        pool, covered = normal(8, 3, seed=seed), normal(covered_count, 3, seed=seed + 1)
        weights = torch.rand(8, generator=seeded(seed), dtype=torch.float64) + 0.1
        chosen, gains = choose(pool, covered, count, weights)
        have: list[int] = []
        for best, gain in zip(chosen.tolist(), gains.tolist(), strict=True):
            before = coverage(pool, covered, have, weights)
            rises = {i: coverage(pool, covered, [*have, i], weights) - before for i in range(8) if i not in have}
            assert gain == pytest.approx(max(rises.values()), abs=1e-9)
            assert rises[best] == pytest.approx(gain, abs=1e-9)
            have.append(best)
        assert len(set(have)) == count

    @pytest.mark.parametrize("seed", range(5))
    def test_reaches_its_share_of_the_best_set(self, seed: int) -> None:
        pool, covered, weights = normal(9, 4, seed=seed), normal(2, 4, seed=99), torch.ones(9)
        start = coverage(pool, covered, [], weights)
        best = max(coverage(pool, covered, list(s), weights) for s in combinations(range(9), 3)) - start
        _, gains = choose(pool, covered, 3)
        assert (1 - 1 / 2.718281828) * best <= gains.sum().item() <= best + 1e-9

    def test_gains_never_rise_and_add_up_to_the_cover(self) -> None:
        pool, covered = normal(60, 5), normal(10, 5, seed=1)
        chosen, gains = choose(pool, covered, 60)
        assert sorted(chosen.tolist()) == list(range(60))
        assert (gains.diff() <= 1e-12).all()
        uncovered = 1 - coverage(pool, covered, [], torch.ones(60))
        assert gains.sum().item() == pytest.approx(uncovered)  # everything chosen covers itself

    def test_only_directions_count_and_the_order_of_the_pool_is_nothing(self) -> None:
        """By gains: two examples that cover nothing but each other are an exact tie, and either may come first."""
        pool, covered, order = normal(40, 6), normal(5, 6, seed=1), torch.randperm(40, generator=seeded())
        _, gains = choose(pool, covered, 10)
        scale = torch.rand(40, 1, generator=seeded()) + 0.1
        torch.testing.assert_close(choose(pool * scale, covered * 7, 10)[1], gains)
        torch.testing.assert_close(choose(pool[order], covered, 10)[1], gains)

    def test_one_example_of_each_cluster_that_training_lacks(self) -> None:
        """Four tight clusters of 30, 20, 10 and 25; training holds the largest; the rest come by size."""
        sizes = (30, 20, 10, 25)
        cluster = torch.arange(4).repeat_interleave(torch.tensor(sizes))
        pool = 10 * torch.eye(4, 8)[cluster].double() + 0.1 * normal(85, 8)
        covered = 10 * torch.eye(4, 8)[:1].double()
        chosen, gains = choose(pool, covered, 4)
        assert cluster[chosen[:3]].tolist() == [3, 1, 2]
        assert gains[3] < 0.01 * gains[2]

    def test_weights_decide_between_equals(self) -> None:
        pool = torch.eye(3, dtype=torch.float64)
        chosen, gains = choose(pool, torch.zeros(0, 3), 3, torch.tensor([1.0, 5.0, 2.0]))
        assert chosen.tolist() == [1, 2, 0]
        torch.testing.assert_close(gains, torch.tensor([5.0, 2.0, 1.0], dtype=torch.float64) / 8)

    def test_small_pools(self) -> None:
        assert len(choose(normal(3, 2), normal(1, 2), 10)[0]) == 3
        assert len(choose(torch.zeros(0, 2), normal(1, 2), 10)[0]) == 0
        zero = torch.zeros(2, 4, dtype=torch.float64)
        assert choose(zero, zero, 2)[1].tolist() == [0, 0]  # an example without a gradient covers nothing

    def test_features_that_are_not_finite_are_named(self) -> None:
        pool = normal(3, 2)
        pool[1, 0] = torch.nan
        with pytest.raises(NotFiniteError, match="found 1 NaN"):
            choose(pool, normal(1, 2), 1)


def subject_with(pool: Examples | None, retrain: object = None) -> Subject:
    part = Examples(torch.rand(12, 4, generator=seeded()), torch.arange(12) % 2)
    model = nn.Linear(4, 2).eval()
    return Subject(model, part, part, class_names=("cat", "dog"), pool=pool, retrain=retrain)


def pool_of(count: int = 30) -> Examples:
    names = tuple(f"p{i}.png" for i in range(count))
    return Examples(torch.rand(count, 4, generator=seeded(1)), torch.arange(count) % 2, names)


class TestSuggest:
    def test_names_classes_and_holes(self) -> None:
        features, train = normal(30, 5), normal(12, 5, seed=1)
        membership = torch.arange(30) % 3 - 1
        found = suggest(subject_with(pool_of()), torch.arange(len(features)), features, train, membership, 6)
        chosen, gains = choose(features, train, 6)
        assert [s.pool_id for s in found] == chosen.tolist()
        assert [s.gain for s in found] == gains.tolist()
        for s in found:
            assert s.name == f"p{s.pool_id}.png"
            assert s.class_name == ("cat", "dog")[s.pool_id % 2]
            assert s.hole == {-1: None, 0: 0, 1: 1}[int(membership[s.pool_id])]

    def test_without_a_pool_nothing_is_suggested(self) -> None:
        assert suggest(subject_with(None), torch.arange(0), normal(0, 5), normal(12, 5), torch.zeros(0).long(), 6) == []

    def test_features_of_another_pool_are_named(self) -> None:
        with pytest.raises(DataError, match="30 examples, 29 features, 30 hole ids"):
            suggest(subject_with(pool_of()), torch.arange(30), normal(29, 5), normal(12, 5), torch.zeros(30).long(), 6)


def family(name: str, unit: str, reference: float) -> Family:
    return Family(name, unit, reference, lambda x, g: x, lambda x, s, d: x)


FAMILIES = [
    family("rotation", "degrees", 20.0),
    family("translation", "share of the width", 0.1),
    family("margin gradient", "L2", 0.5),
]


def hole(families: list[str], test: HoleTest | None = None, share: float | None = 0.6, number: int = 4) -> Hole:
    return Hole(
        id=number, title="3 turns into 8", families=families, from_class="3", to_class="8", from_group="3 (1 of 2)",
        to_group="8 (2 of 2)", exemplar=17, members=[17, 21], support=2,
        severity=Estimate(value=share, low=None, high=None),
        predicted_rate=Estimate(value=0.5, low=0.3, high=0.7), test=test,
    )  # fmt: skip


def outcome(verdict: str, failures: int) -> HoleTest:
    rate = Estimate(value=0.5, low=0.4, high=0.6)
    return HoleTest(members=9, failures=failures, observed_rate=rate, base_rate=0.2, lift=2.5, verdict=verdict)


class TestRegions:
    @pytest.mark.parametrize(
        ("families", "share", "looks"),
        [
            (["rotation"], 0.6, "turned by about 12 degrees"),
            (["translation"], 0.6, "off centre by about 6% of the width"),
            (["margin gradient"], 0.6, "between the two classes, by about 0.3 in L2"),
            (["rotation", "translation", "margin gradient"], 0.5,
             "turned by about 10 degrees or off centre by about 5% of the width"),
            (["smoke"], 0.6, "under smoke"),
            (["rotation"], None, "under rotation"),
            ([], 0.6, "like its members"),
        ],
    )  # fmt: skip
    def test_one_sentence_says_what_to_collect(self, families: list[str], share: float | None, looks: str) -> None:
        (region,) = regions([hole(families, share=share)], FAMILIES)
        assert region.wanted == (f"Collect examples of 3 {looks}, close to test input 17: there the model drifts to 8.")
        assert (region.hole, region.title, region.share_of_failures) == (4, "3 turns into 8", None)

    def test_a_hole_that_failed_its_test_is_left_out(self) -> None:
        holes = [
            hole(["rotation"], outcome("pass", 6), number=0),
            hole(["rotation"], outcome("fail", 1), number=1),
            hole(["rotation"], outcome("inconclusive", 3), number=2),
            hole(["rotation"], None, number=3),
        ]
        found = regions(holes, FAMILIES, failures=24)
        assert [(r.hole, r.share_of_failures) for r in found] == [(0, 0.25), (2, 0.125), (3, None)]


class Learned(nn.Module):
    """A stand-in for a trained model: remembers what it was trained on."""

    def __init__(self, examples: Examples, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.examples, self.seed = examples, seed


class TestRetrainCheck:
    def test_arms_differ_only_in_the_examples_added(self) -> None:
        """Both arms: the training data, then as many of the pool; one seed a pair; other random ones each time."""
        seen: list[Learned] = []
        pool, chosen = pool_of(), torch.tensor([3, 5, 7, 11])
        subject = subject_with(pool, lambda examples, seed: Learned(examples, seed).train())

        def score(model: nn.Module) -> tuple[float, float]:
            assert not model.training
            if isinstance(model, Learned):
                seen.append(model)
            return 0.5, 0.5

        calls: list[tuple[int, int]] = []
        retrain_check(
            subject, chosen, seeds=3, score=score, generator=seeded(), progress=lambda *step: calls.append(step)
        )
        assert [model.seed for model in seen] == [0, 0, 1, 1, 2, 2]
        assert calls == [(k, 6) for k in range(1, 7)]
        added = [model.examples.names[12:] for model in seen]
        assert all(torch.equal(model.examples.inputs[:12], subject.train.inputs) for model in seen)
        assert added[0] == added[2] == added[4] == ("p3.png", "p5.png", "p7.png", "p11.png")
        random = added[1::2]
        assert len(set(random)) == 3
        assert all(len(set(names)) == 4 and set(names) <= set(pool.names) for names in random)

    def test_gains_are_paired_differences_with_a_t_interval(self) -> None:
        """Accuracies set by hand; scipy's one-sample t test gives the interval of their differences."""
        suggested = [(0.93, 0.60), (0.95, 0.62), (0.92, 0.57), (0.96, 0.63)]
        random = [(0.91, 0.66), (0.92, 0.66), (0.91, 0.63), (0.93, 0.66)]
        arms = iter([arm for pair in zip(suggested, random, strict=True) for arm in pair])
        subject = subject_with(pool_of(), Learned)
        check = retrain_check(
            subject, torch.arange(5), seeds=4, generator=seeded(),
            score=lambda model: next(arms) if isinstance(model, Learned) else (0.9, 0.5),
        )  # fmt: skip
        for gain, k in ((check.clean_gain, 0), (check.robust_gain, 1)):
            differences = [100 * (s[k] - r[k]) for s, r in zip(suggested, random, strict=True)]
            expected = ttest_1samp(differences, 0).confidence_interval(0.95)
            assert gain.value == pytest.approx(sum(differences) / 4)
            assert (gain.low, gain.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
        assert (check.added, check.seeds, check.base_clean) == (5, 4, 0.9)
        assert check.random_clean == pytest.approx(0.9175)
        assert check.suggested_clean == pytest.approx(0.94)
        assert check.verdict == "inconclusive"  # clean gains, robust loses
        assert check.sentence == (
            "The 5 suggested examples are not shown to help more than 5 random ones: +2.2 points [+0.7, +3.8] of clean "
            "accuracy and -4.8 points [-7.1, -2.4] under probes, over 4 retrainings of each."
        )

    @pytest.mark.parametrize(
        ("clean", "robust", "verdict"),
        [
            ((0.1, 2), (-1, 1), "pass"),
            ((-1, 1), (0.1, 2), "pass"),
            ((0.1, 2), (-2, -0.1), "inconclusive"),
            ((-1, 1), (-1, 1), "inconclusive"),
            ((-2, -0.1), (-1, 1), "fail"),
            ((None, None), (None, None), "inconclusive"),
        ],
    )
    def test_verdict(self, clean: tuple[float, float], robust: tuple[float, float], verdict: str) -> None:
        estimates = [Estimate(value=0.0, low=low, high=high) for low, high in (clean, robust)]
        assert _verdict(*estimates) == verdict

    def test_one_retraining_has_no_interval(self) -> None:
        subject = subject_with(pool_of(), Learned)
        check = retrain_check(subject, torch.arange(5), seeds=1, score=lambda model: (0.5, 0.5), generator=seeded())
        assert check.clean_gain == Estimate(value=0.0, low=None, high=None)
        assert check.verdict == "inconclusive"
        assert "+0.0 points of clean accuracy" in check.sentence

    @pytest.mark.parametrize(("pool", "retrain", "missing"), [(True, None, "retrain"), (False, Learned, "pool")])
    def test_what_is_missing_is_named(self, pool: bool, retrain: object, missing: str) -> None:
        subject = subject_with(pool_of() if pool else None, retrain)
        with pytest.raises(SubjectError, match=f"found no {missing}"):
            retrain_check(subject, torch.arange(2), seeds=1, score=lambda m: (0, 0), generator=seeded())

"""Metrics against scikit-learn and scipy, intervals by simulation, baselines in closed form, verdicts by example."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor, nn

from brittle.agreement import baselines, calibrate, compare, extrapolated_margin, metrics, overall, wilson
from brittle.agreement.baselines import first_order_distance, gradient_scores
from brittle.agreement.baselines.gradients import input_gradient_norm, lead_after, typical
from brittle.agreement.baselines.neighbours import nearest_ratio, trust_score
from brittle.agreement.baselines.outputs import entropy, output_scores, softmax_confidence
from brittle.agreement.calibration import bins, reliability
from brittle.agreement.meanings import MEANINGS
from brittle.agreement.metrics import (
    Resampled,
    augrc,
    aurc,
    auroc,
    average_precision,
    bootstrap,
    e_aurc,
    fpr95,
    holm,
    kendall,
    resample_weights,
    spearman,
)
from brittle.data import Examples
from brittle.errors import DataError, NotFiniteError
from brittle.findings import NOTHING, Estimate, TargetAgreement
from brittle.records import Norm, Pairs, Queries, ShiftMap
from brittle.subject import Subject


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def plain(metric: Callable[..., Tensor], scores: Tensor, observed: Tensor) -> float:
    return metric(scores, observed, torch.ones(len(scores), 1, dtype=torch.float64)).item()


@st.composite
def samples(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with many ties, failures of both kinds, and how often each input was drawn (3 resamples)."""
    m = draw(st.integers(4, 25))
    numbers = lambda low, high: st.lists(st.integers(low, high), min_size=m, max_size=m)  # noqa: E731
    failed = torch.tensor(draw(numbers(0, 1))).bool()
    failed[0], failed[1] = True, False
    weights = torch.tensor([draw(numbers(0, 3)) for _ in range(3)], dtype=torch.float64).T
    weights[:2] += 1
    return torch.tensor(draw(numbers(-4, 4)), dtype=torch.float64), failed, weights


def slow_aurc(scores: np.ndarray, failed: np.ndarray) -> float:
    """The mean rate of the i lowest for every i, where an input in a tie counts by its chance to be among the i."""
    below, tied = (np.array([relation(scores, s).sum() for s in scores]) for relation in (np.less, np.equal))
    total = 0.0
    for i in range(1, len(scores) + 1):
        total += (np.clip((i - below) / tied, 0, 1) * failed).sum() / i
    return total / len(scores)


class TestMetrics:
    @settings(deadline=None)
    @given(samples())
    def test_equal_scikit_learn_and_scipy_on_each_resample(self, sample: tuple[Tensor, Tensor, Tensor]) -> None:
        """Weights are repetitions: each column equals the metric of the rows written out as often as they count."""
        scores, failed, weights = sample
        other = scores.roll(1) + failed
        for r in range(weights.shape[1]):
            rows = torch.arange(len(scores)).repeat_interleave(weights[:, r].long())
            s, f, o = (v[rows].numpy() for v in (scores, failed, other))
            assert auroc(scores, failed, weights)[r].item() == pytest.approx(roc_auc_score(f, s))
            assert average_precision(scores, failed, weights)[r].item() == pytest.approx(average_precision_score(f, s))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of constants, where both are NaN
                expected, tau = spearmanr(s, o).statistic, kendalltau(s, o).statistic
            assert spearman(scores, other, weights)[r].item() == pytest.approx(expected, abs=1e-9, nan_ok=True)
            assert kendall(scores, other, weights)[r].item() == pytest.approx(tau, abs=1e-9, nan_ok=True)
            false, true, _ = roc_curve(f, s, drop_intermediate=False)
            assert fpr95(scores, failed, weights)[r].item() == pytest.approx(false[true >= 0.95][0])
            assert aurc(scores, failed, weights)[r].item() == pytest.approx(slow_aurc(s, f))
            ideal = slow_aurc(f.astype(float), f)
            assert e_aurc(scores, failed, weights)[r].item() == pytest.approx(slow_aurc(s, f) - ideal, abs=1e-12)
            right, area = 1 - f.mean(), roc_auc_score(f, s)
            assert augrc(scores, failed, weights)[r].item() == pytest.approx(
                (1 - area) * right * (1 - right) + (1 - right) ** 2 / 2
            )

    @settings(deadline=None)
    @given(samples())
    def test_laws(self, sample: tuple[Tensor, Tensor, Tensor]) -> None:
        """Ranks alone count, a reversed score has the mirrored figure, and the order of the inputs is nothing."""
        scores, failed, weights = sample
        order = torch.randperm(len(scores), generator=seeded())
        for metric in (auroc, average_precision, spearman, kendall, fpr95, aurc, e_aurc, augrc):
            figure = metric(scores, failed, weights)
            torch.testing.assert_close(metric(scores.exp() * 7, failed, weights), figure, equal_nan=True)
            shuffled = metric(scores[order], failed[order], weights[order])
            torch.testing.assert_close(shuffled, figure, equal_nan=True)
        torch.testing.assert_close(auroc(-scores, failed, weights), 1 - auroc(scores, failed, weights))
        torch.testing.assert_close(
            spearman(-scores, failed, weights), -spearman(scores, failed, weights), equal_nan=True
        )
        torch.testing.assert_close(kendall(-scores, failed, weights), -kendall(scores, failed, weights), equal_nan=True)

    def test_selective_figures_in_closed_form(self) -> None:
        """Four inputs, two failures: kept in the order held, failed, held, failed, then the ideal, then all tied."""
        failed = torch.tensor([False, True, False, True])
        order = torch.arange(4.0, dtype=torch.float64)
        assert plain(aurc, order, failed) == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)
        assert plain(e_aurc, order, failed) == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4 - 1 / 3 - 2 / 4) / 4)
        assert plain(augrc, order, failed) == pytest.approx((0 + 0.5 + 1 + 1.5) / 4 / 4)
        assert plain(e_aurc, failed.double(), failed) == pytest.approx(0)
        assert plain(aurc, torch.zeros(4), failed) == pytest.approx(1 / 2)
        assert plain(augrc, torch.zeros(4), failed) == pytest.approx(1 / 4)

    def test_fpr95_catches_at_least_that_share(self) -> None:
        """Of 40 failures 38 must be caught; the inputs that held above the 38th highest are the false alarms."""
        failed = torch.arange(140) < 40
        scores = torch.cat([torch.arange(40.0), torch.arange(100) / 10])  # the 38th highest failure scores 2
        assert plain(fpr95, scores.double(), failed) == pytest.approx((scores[40:] >= 2).double().mean().item())
        assert plain(fpr95, failed.double(), failed) == 0
        assert plain(fpr95, torch.zeros(140), failed) == 1

    def test_the_pairs_looked_at_together_do_not_matter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        scores, observed = normal(40).round(), normal(40, seed=1).round()
        whole = plain(kendall, scores, observed)
        monkeypatch.setattr(metrics, "SIGNS", 100)
        assert plain(kendall, scores, observed) == whole

    def test_infinite_values_rank_last_and_tie(self) -> None:
        distance = torch.tensor([1.0, 2.0, math.inf, math.inf, 0.5], dtype=torch.float64)
        finite = torch.tensor([1.0, 2.0, 9.0, 9.0, 0.5], dtype=torch.float64)
        score = normal(5)
        assert plain(spearman, score, -distance) == plain(spearman, score, -finite)
        assert plain(kendall, score, -distance) == plain(kendall, score, -finite)
        failed = torch.tensor([True, True, False, False, True])
        assert plain(auroc, -distance, failed) == 1

    @pytest.mark.parametrize("failed", [[True] * 3, [False] * 3, [True], []])
    def test_what_is_not_defined_is_no_estimate(self, failed: list[bool]) -> None:
        outcome = torch.tensor(failed, dtype=torch.bool)
        weights = resample_weights(outcome, 50, seeded())
        for metric in (auroc, spearman, kendall, fpr95):
            assert bootstrap(metric, normal(len(failed)), outcome, weights).estimate == NOTHING


class TestIntervals:
    def test_resamples_keep_the_strata(self) -> None:
        strata = torch.tensor([True] * 7 + [False] * 30)
        weights = resample_weights(strata, 400, seeded())
        assert (weights[strata].sum(0) == 7).all()
        assert (weights[~strata].sum(0) == 30).all()
        assert weights.std(1).min() > 0  # every input is sometimes left out, sometimes doubled
        torch.testing.assert_close(weights.mean(1), torch.ones(37), atol=0.25, rtol=0)  # five standard errors

    def test_the_chunk_size_does_not_matter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        scores, failed = normal(40), normal(40, seed=1) > 0.5
        weights = resample_weights(failed, 30, seeded())
        whole = bootstrap(auroc, scores, failed, weights)
        monkeypatch.setattr(metrics, "CHUNK", 100)
        assert torch.equal(bootstrap(auroc, scores, failed, weights).resamples, whole.resamples)

    def test_differences_are_paired(self) -> None:
        """Two scores of the same order differ by exactly 0 on every resample; unpaired they would not."""
        scores, failed = normal(60), normal(60, seed=1) > 0.5
        weights = resample_weights(failed, 100, seeded())
        one, other = (bootstrap(auroc, s, failed, weights) for s in (scores, scores.exp()))
        assert (one - other).estimate == Estimate(value=0, low=0, high=0)
        assert one.resamples.std() > 0.01

    def test_coverage(self) -> None:
        """Of 200 intervals for the AUROC of normal scores one deviation apart, some 95 per cent hold the truth."""
        truth = 0.5 * (1 + math.erf(0.5))  # normal distribution function at 1 / sqrt(2)
        failed, held = torch.arange(200) < 50, 0
        for seed in range(200):
            weights = resample_weights(failed, 200, seeded(seed))
            estimate = bootstrap(auroc, normal(200, seed=seed) + failed, failed, weights).estimate
            assert estimate.low is not None
            assert estimate.high is not None
            held += estimate.low <= truth <= estimate.high
        assert 0.89 < held / 200 < 0.99

    @settings(deadline=None)
    @given(st.integers(1, 500), st.data())
    def test_wilson_solves_its_equation(self, total: int, data: st.DataObject) -> None:
        """The ends are the rates p at which |k / n - p| is 1.96 standard errors of p."""
        count = data.draw(st.integers(0, total))
        estimate = wilson(count, total)
        assert estimate.value == count / total
        for p in (estimate.low, estimate.high):
            assert p is not None
            assert abs(count / total - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / total), abs=1e-6)

    def test_chance_goes_with_the_interval(self) -> None:
        """Of 100 resamples 2 lie below 0 and one on it: p = 2 (1 + 3) / 101; all above: 2 / 101."""
        resamples = torch.cat([torch.full((2,), -1.0), torch.zeros(1), torch.full((97,), 1.0)]).double()
        assert Resampled(0.9, resamples).chance == pytest.approx(8 / 101)
        assert Resampled(-0.9, -resamples).chance == pytest.approx(8 / 101)
        assert Resampled(1.0, torch.ones(100)).chance == pytest.approx(2 / 101)
        assert Resampled(0.0, torch.zeros(100)).chance == 1
        assert Resampled(math.nan, torch.zeros(0)).chance is None

    def test_chance_is_below_a_level_about_that_often(self) -> None:
        """The difference of two scores equally good, 200 draws: 10 are expected below .05."""
        below = 0
        for seed in range(200):
            failed = outcome(150, 0.3, seed)
            weights = resample_weights(failed, 200, seeded(seed))
            one, other = (bootstrap(auroc, failed + normal(150, seed=1000 * k + seed), failed, weights) for k in (1, 2))
            below += ((one - other).chance or 1) < 0.05
        assert 2 <= below <= 20

    def test_holm_by_hand(self) -> None:
        assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
        assert holm([0.02, None, 0.9, 0.6]) == [pytest.approx(0.06), None, 1, 1]
        assert holm([]) == []

    def test_wilson_of_nothing(self) -> None:
        assert wilson(0, 0) == NOTHING


def subject_of(model: nn.Module, features: int, classes: int) -> Subject:
    inputs = torch.rand(90, features, generator=seeded(5))
    part = Examples(inputs, torch.arange(90) % classes)
    return Subject(model.eval(), part, part)


def queries_of(subject: Subject, m: int = 20) -> Queries:
    inputs = torch.rand(m, subject.train.inputs.shape[1], generator=seeded(6))
    logits = subject.predict(inputs)
    return Queries(torch.arange(m), inputs, logits.argmax(1), logits, Pairs.of(logits))


class TestBaselines:
    def test_extrapolated_margin_is_exact_on_a_straight_line(self) -> None:
        """Margins that fall by a constant slope per unit of severity, two families, seen at a quarter at most."""
        margin, slope = normal(7).abs(), normal(7, 2, seed=1)
        reference = torch.tensor([2.0, 20.0], dtype=torch.float64)
        severities = reference[:, None] * torch.tensor([0.125, 0.25], dtype=torch.float64)
        probed = margin[:, None, None] - slope[:, :, None] * severities
        nothing = torch.zeros(7, 2, 2, 1)
        shift = ShiftMap(
            families=("a", "b"),
            units=("", ""),
            severities=severities,
            reference=reference,
            mass=nothing[:, 0, 0],
            probed=nothing,
            rival=torch.zeros(7, dtype=torch.int64),
            margin=margin,
            probed_margin=torch.full_like(probed, torch.nan),
            probed_lead=probed,
        )
        expected = slope * reference - margin[:, None]
        torch.testing.assert_close(extrapolated_margin(shift), expected)

    def test_the_scores_of_which_higher_means_brittler(self) -> None:
        """An input between two classes is brittler by every score than one deep inside its class."""
        x = torch.cat([0.1 + 0.1 * torch.rand(40, 2), 0.8 + 0.1 * torch.rand(40, 2)])
        y = torch.arange(80) // 40
        model = nn.Linear(2, 2)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[-4.0, -4.0], [4.0, 4.0]]))
            model.bias.copy_(torch.tensor([4.0, -4.0]))
        subject = Subject(model.eval(), Examples(x, y), Examples(x, y))
        inputs = torch.tensor([[0.45, 0.45], [0.1, 0.1]])
        logits = subject.predict(inputs)
        queries = Queries(torch.arange(2), inputs, torch.zeros(2).long(), logits, Pairs.of(logits))
        calls: list[tuple[int, int]] = []
        scores = baselines(subject, queries, progress=lambda *step: calls.append(step))
        assert list(scores) == [
            "softmax confidence",
            "entropy",
            "energy",
            "logit margin",
            "input-gradient norm",
            "first-order distance",
            "margin after one step",
            "margin after K steps",
            "trust score",
            "trust score on features",
            "nearest-neighbour ratio",
        ]
        for name, score in scores.items():
            assert (score.shape, score.dtype) == ((2,), torch.float64), name
            assert score[0] > score[1], name
        assert calls == sorted(set(calls))
        assert calls[-1] == (26, 26)  # 1 rival, 1, 1 and 20 steps, 3 searches

    def test_softmax_confidence_orders_where_the_softmax_saturates(self) -> None:
        logits = torch.tensor([[3.0, 1.0, 0.0], [60.0, 0.0, 0.0], [90.0, 0.0, 0.0]])
        score = softmax_confidence(logits)
        assert score[0].item() == pytest.approx(math.log(1 - logits[0].softmax(0).max().item()), rel=1e-5)
        assert logits.softmax(1).amax(1)[1:].tolist() == [1, 1]
        assert score[1] > score[2]

    def test_entropy_and_energy_are_the_textbooks(self) -> None:
        logits = 3 * normal(20, 5)
        p = logits.softmax(1)
        torch.testing.assert_close(entropy(logits), -(p * p.log()).sum(1))
        torch.testing.assert_close(output_scores(logits)["energy"], -logits.exp().sum(1).log())
        saturated = entropy(torch.tensor([[60.0, 0.0], [90.0, 0.0], [900.0, 0.0]]))
        assert saturated[0] > saturated[1] > saturated[2] == 0
        assert saturated[1].item() == pytest.approx(91 * math.exp(-90), rel=1e-9)

    @pytest.mark.parametrize(("norm", "dual"), [("l2", 2), ("linf", 1)])
    def test_input_gradient_norm_is_that_of_the_cross_entropy(self, norm: Norm, dual: int) -> None:
        torch.manual_seed(0)
        subject = subject_of(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), 6, 4)
        queries = queries_of(subject)
        x = queries.inputs.clone().requires_grad_()
        loss = nn.functional.cross_entropy(subject.model(x), queries.pairs.predicted, reduction="sum")
        expected = torch.autograd.grad(loss, x)[0].norm(p=dual, dim=1).log().double()
        torch.testing.assert_close(input_gradient_norm(subject, queries, norm), expected, rtol=1e-4, atol=1e-5)

    def test_input_gradient_norm_does_not_saturate(self) -> None:
        """The logits 100 x and 0: the loss's gradient is 100 exp(-100 x), nothing in float32."""
        model = nn.Linear(1, 2, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[100.0], [0.0]]))
        subject = subject_of(model, 1, 2)
        inputs = torch.tensor([[0.9], [1.0]])
        logits = subject.predict(inputs)
        queries = Queries(torch.arange(2), inputs, torch.zeros(2).long(), logits, Pairs.of(logits))
        expected = torch.tensor([math.log(100) - 90, math.log(100) - 100], dtype=torch.float64)
        torch.testing.assert_close(input_gradient_norm(subject, queries), expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize(("norm", "dual"), [("l2", 2), ("linf", 1)])
    @pytest.mark.parametrize("passes", [1, 2, 7])
    def test_finite_steps_on_a_linear_model(self, norm: Norm, dual: int, passes: int) -> None:
        """Two classes, no bound in the way: a descent within distance e ends at margin - e |w|_*, in any steps."""
        torch.manual_seed(0)
        model = nn.Linear(6, 2)
        subject = subject_of(model, 6, 2)
        queries = queries_of(subject)
        inside = dataclasses.replace(queries, inputs=0.4 + queries.inputs / 5)
        inside = dataclasses.replace(inside, logits=subject.predict(inside.inputs))
        inside = dataclasses.replace(inside, pairs=Pairs.of(inside.logits))
        slope = (model.weight[0] - model.weight[1]).detach().norm(p=dual)
        found = lead_after(subject, inside, 0.1, norm, passes)
        torch.testing.assert_close(found, (inside.margin - 0.1 * slope).double(), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("norm", ["l2", "linf"])
    def test_finite_steps_stay_within_distance_and_bounds(self, norm: Norm) -> None:
        seen: list[Tensor] = []

        class Watched(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

            def forward(self, x: Tensor) -> Tensor:
                seen.append(x.detach())
                return self.inner(x)

        torch.manual_seed(0)
        subject = subject_of(Watched(), 6, 3)
        queries = queries_of(subject)
        seen.clear()
        least = lead_after(subject, queries, 0.3, norm, 5)
        assert len(seen) == 6  # five gradient passes and a forward pass
        for points in seen:
            far = (points - queries.inputs).norm(p=2 if norm == "l2" else math.inf, dim=1)
            assert far.max() <= 0.3 + 1e-5
            assert points.min() >= 0
            assert points.max() <= 1
        leads = torch.stack([queries.pairs.lead(subject.predict(points)) for points in seen[1:6]])
        torch.testing.assert_close(least, leads.amin(0).double())

    def test_finite_steps_go_as_far_as_the_median_boundary(self) -> None:
        assert typical(torch.tensor([3.0, 1.0, math.inf, 2.0])) == 2
        assert typical(torch.tensor([math.inf])) == 0
        torch.manual_seed(0)
        subject = subject_of(nn.Linear(6, 2), 6, 2)
        queries = queries_of(subject, 21)
        scores = gradient_scores(subject, queries, "l2", 3)
        size = typical(-scores["first-order distance"])
        torch.testing.assert_close(scores["margin after one step"], -lead_after(subject, queries, size, "l2", 1))
        torch.testing.assert_close(scores["margin after K steps"], -lead_after(subject, queries, size, "l2", 3))

    @pytest.mark.parametrize(("norm", "dual"), [("l2", 2), ("linf", 1)])
    def test_first_order_distance_is_exact_for_a_linear_model(self, norm: str, dual: int) -> None:
        torch.manual_seed(0)
        model = nn.Linear(6, 4)
        subject = subject_of(model, 6, 4)
        queries = queries_of(subject)
        weight, z = model.weight.detach().double(), queries.logits.double()
        expected = []
        for m in range(len(queries)):
            a = int(z[m].argmax())
            boundary = [(z[m, a] - z[m, k]) / (weight[a] - weight[k]).norm(p=dual) for k in range(4) if k != a]
            expected.append(min(boundary).item())
        found = first_order_distance(subject, queries.inputs, queries.logits, norm)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)

    def test_a_flat_model_is_infinitely_far_from_its_boundary(self) -> None:
        model = nn.Linear(3, 2)
        nn.init.zeros_(model.weight)
        nn.init.constant_(model.bias[:1], 1.0)
        subject = subject_of(model, 3, 2)
        queries = queries_of(subject)
        assert first_order_distance(subject, queries.inputs, queries.logits).isinf().all()

    def test_trust_score_is_the_slow_one(self) -> None:
        """One loop an axis: outliers by their k-th neighbour, then the two nearest distances."""
        x, y = torch.rand(60, 3, generator=seeded(1)), torch.arange(60) % 3
        points, predicted = torch.rand(10, 3, generator=seeded(2)), torch.arange(10) % 3
        near = []
        for c in range(3):
            rows = x[y == c]
            radius = [sorted((rows[i] - rows[j]).norm().item() for j in range(20) if j != i)[4 - 1] for i in range(20)]
            kept = rows[torch.tensor(radius).argsort()[: 20 - 5]]
            near.append([min((p - q).norm().item() for q in kept) for p in points])
        expected = [
            min(near[c][i] for c in range(3) if c != predicted[i]) / near[int(predicted[i])][i] for i in range(10)
        ]
        found = trust_score(Examples(x, y), points, predicted, neighbours=4, filtered=0.25)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)

    def test_trust_score_filters_an_outlier(self) -> None:
        """A mislabelled point beside the query would make it untrustworthy; it is the outlier of its class."""
        x = torch.cat(
            [0.1 * torch.rand(20, 2, generator=seeded()), torch.tensor([[0.9, 0.9]]), torch.full((5, 2), 0.8)]
        )
        y = torch.tensor([0] * 21 + [1] * 5)
        point, predicted = torch.tensor([[0.89, 0.89]]), torch.tensor([1])
        assert trust_score(Examples(x, y), point, predicted, filtered=0).item() < 1
        assert trust_score(Examples(x, y), point, predicted, filtered=0.1).item() > 5

    def test_trust_score_of_twins_and_of_a_class_without_examples(self) -> None:
        x, y = torch.tensor([[0.0], [0.0], [1.0]]), torch.tensor([0, 1, 1])
        points = torch.tensor([[0.0], [0.5], [1.0]])
        found = trust_score(Examples(x, y), points, torch.tensor([0, 2, 1]))
        assert found[0] == 0  # twins in both classes
        assert found[1] == 0  # predicted a class that is infinitely far
        assert found[2] > 1e9  # on an example of its own class

    def test_nearest_ratio(self) -> None:
        train = Examples(torch.tensor([[0.0], [0.0], [1.0]]), torch.tensor([0, 1, 1]))
        points = torch.tensor([[0.0], [0.75], [0.5], [0.25]])
        assert nearest_ratio(train, points, torch.tensor([0, 1, 2, 0])).tolist() == [
            1,  # on examples of both classes
            pytest.approx(0.25 / 0.75),
            math.inf,  # no example of the predicted class
            1,
        ]

    def test_features_are_what_enters_the_last_layer(self) -> None:
        """A first layer that drops a coordinate: on features it does not count, on inputs it does."""
        model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 2))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[1.0, 0.0]]))
            model[1].weight.copy_(torch.tensor([[-1.0], [1.0]]))
            model[1].bias.copy_(torch.tensor([5.0, -5.0]))
        x, y = torch.tensor([[0.0, 0.0], [0.2, 0.0], [1.0, 1.0], [0.8, 1.0]]), torch.tensor([0, 0, 1, 1])
        subject = Subject(model.eval(), Examples(x, y), Examples(x, y))
        inputs = torch.tensor([[0.1, 1.0]])
        logits = subject.predict(inputs)
        queries = Queries(torch.arange(1), inputs, torch.zeros(1).long(), logits, Pairs.of(logits))
        scores = baselines(subject, queries)
        assert scores["trust score"].item() == pytest.approx(-0.7 / math.hypot(0.1, 1), rel=1e-5)
        assert scores["trust score on features"].item() == pytest.approx(-7, rel=1e-5)
        assert scores["nearest-neighbour ratio"].item() == pytest.approx(1 / 7, rel=1e-5)


def outcome(m: int = 400, rate: float = 0.2, seed: int = 9) -> Tensor:
    return torch.rand(m, generator=seeded(seed)) < rate


def held(scores: dict[str, Tensor], failed: Tensor, **options: object) -> TargetAgreement:
    arguments = {"ours": ["mass"], "named": "mass", "severity": None, "generator": seeded(), "resamples": 200}
    return compare("natural", "natural errors", scores, failed=failed, **(arguments | options))


class TestCompare:
    def test_a_better_score_passes_and_a_worse_one_fails(self) -> None:
        failed = outcome()
        good, bad = failed + 0.5 * normal(400), failed + 3 * normal(400, seed=1)
        passed = held({"margin": bad, "mass": good, "noise": normal(400, seed=2)}, failed)
        assert passed.verdict == "pass"
        assert passed.best_baseline == "margin"
        assert "beats the best baseline, margin" in passed.sentence
        failing = held({"margin": good, "mass": bad}, failed)
        assert failing.verdict == "fail"
        assert "does not beat but falls behind the best baseline, margin" in failing.sentence
        for target in (passed, failing):
            figures = {s.name: s.auroc.value for s in target.scores}
            assert target.gain.value == pytest.approx(figures["mass"] - figures["margin"])
            assert f"{target.gain.value:+.3f}" in target.sentence
            assert f"{figures['mass']:.3f}" in target.sentence
            assert (target.inputs, target.failures) == (400, int(failed.sum()))
            assert target.prevalence == target.failures / 400

    def test_the_same_score_is_inconclusive(self) -> None:
        failed, score = outcome(), normal(400)
        target = held({"mass": score, "margin": score.exp()}, failed)
        assert target.verdict == "inconclusive"
        assert target.gain == Estimate(value=0, low=0, high=0)
        assert "is not shown to beat the best baseline, margin" in target.sentence

    def test_the_gain_is_the_named_scores_not_the_best_of_ours(self) -> None:
        failed = outcome()
        scores = {"mass": normal(400), "lucky": failed + 0.2 * normal(400), "margin": failed + normal(400, seed=3)}
        target = held(scores, failed, ours=["mass", "lucky"])
        assert target.best_ours == "lucky"
        assert target.verdict == "fail"

    def test_each_of_our_scores_is_told_from_the_best_baseline_with_holms_correction(self) -> None:
        failed = outcome()
        scores = {
            "mass": failed + normal(400, seed=1),
            "other": failed + 0.5 * normal(400, seed=2),
            "lost": failed + 4 * normal(400, seed=3),
            "margin": failed + normal(400, seed=4),
        }
        target = held(scores, failed, ours=["mass", "other", "lost"])
        mass, other, lost, margin = target.scores
        assert mass.gain == target.gain
        for score in (mass, other, lost):
            assert score.gain is not None
            assert score.gain.value == pytest.approx(score.auroc.value - margin.auroc.value)
        assert [s.p_holm for s in (mass, other, lost)] == holm([s.p for s in (mass, other, lost)])
        assert other.p == lost.p == pytest.approx(2 / 201)
        assert other.p_holm == pytest.approx(6 / 201)
        assert (margin.gain, margin.p, margin.p_holm) == (None, None, None)

    def test_a_score_that_is_no_better_seldom_passes(self) -> None:
        """Over 100 draws of two scores equally good, at most a few pass: 2.5 are expected."""
        verdicts = []
        for seed in range(100):
            failed = outcome(150, 0.3, seed)
            scores = {name: failed + normal(150, seed=1000 * k + seed) for k, name in enumerate(("mass", "margin"), 1)}
            verdicts.append(held(scores, failed, generator=seeded(seed)).verdict)
        assert verdicts.count("pass") <= 7
        assert verdicts.count("fail") <= 7

    @pytest.mark.parametrize("failures", [0, 1, 400, 399])
    def test_one_sided_outcomes_give_no_estimate(self, failures: int) -> None:
        target = held({"mass": normal(400), "margin": normal(400, seed=1)}, torch.arange(400) < failures)
        assert target.verdict == "inconclusive"
        assert target.gain == NOTHING
        for score in target.scores:
            assert score.auroc == score.average_precision == score.fpr95 == score.e_aurc == score.augrc == NOTHING
            assert score.p is score.p_holm is None
        assert f"{failures} failures among 400 inputs no score can be told" in target.sentence

    @pytest.mark.parametrize("m", [0, 1])
    def test_hardly_any_input(self, m: int) -> None:
        target = held({"mass": normal(m), "margin": normal(m)}, torch.ones(m, dtype=torch.bool))
        assert target.gain == NOTHING
        assert all(score.spearman == NOTHING for score in target.scores)

    def test_few_failures_decide_nothing(self) -> None:
        failed = torch.arange(400) < 5
        target = held({"mass": failed.double(), "margin": normal(400)}, failed)
        assert target.gain.low is not None
        assert target.gain.low > 0
        assert target.verdict == "inconclusive"
        assert "too few to decide" in target.sentence
        assert target.scores[0].gain == target.gain
        assert target.scores[0].p is None

    def test_distances_are_compared_by_spearman(self) -> None:
        """All inputs fooled: AUROC says nothing, and a score that falls with the distance has Spearman 1."""
        distance = normal(100).exp()
        distance[:5] = math.inf
        scores = {"mass": -distance, "margin": -distance + normal(100, seed=1), "noise": normal(100, seed=2)}
        failed = torch.ones(100, dtype=torch.bool)
        target = held(scores, failed, severity=distance, by="spearman")
        mass = target.scores[0]
        assert mass.auroc == NOTHING
        assert mass.spearman.value == mass.kendall.value == pytest.approx(1)
        assert target.decided_by == "spearman"
        assert target.verdict == "pass"
        assert "(Spearman 1.000)" in target.sentence
        assert held(scores, failed, severity=distance).verdict == "inconclusive"

    def test_spearman_of_natural_errors_is_with_the_error(self) -> None:
        failed, score = outcome(), normal(400)
        target = held({"mass": score, "margin": score}, failed)
        expected = spearmanr(score.numpy(), failed.numpy()).statistic
        assert target.scores[0].spearman.value == pytest.approx(expected)

    def test_the_seed_decides_all(self) -> None:
        failed = outcome()
        scores = {"mass": normal(400), "margin": normal(400, seed=1)}
        assert held(scores, failed) == held(scores, failed)
        assert held(scores, failed).gain != held(scores, failed, generator=seeded(1)).gain

    def test_what_does_not_fit_is_named(self) -> None:
        failed, score = outcome(), normal(400)
        with pytest.raises(DataError, match="a baseline beside them"):
            held({"mass": score}, failed)
        with pytest.raises(DataError, match="'margin' has shape \\(399,\\)"):
            held({"mass": score, "margin": score[1:]}, failed)
        with pytest.raises(NotFiniteError, match="NaN in 'margin' at 2 inputs"):
            held({"mass": score, "margin": score.index_fill(0, torch.tensor([1, 2]), math.nan)}, failed)


def target(name: str, verdict: str) -> TargetAgreement:
    gain = NOTHING if verdict == "undecidable" else Estimate(value=0.0, low=-0.1, high=0.1)
    base = held({"mass": normal(20), "margin": normal(20)}, torch.arange(20) < 10)
    shown = "inconclusive" if verdict == "undecidable" else verdict
    return base.model_copy(update={"name": name, "verdict": shown, "gain": gain})


class TestOverall:
    @pytest.mark.parametrize(
        ("verdicts", "expected"),
        [
            (["pass"], "pass"),
            (["fail"], "fail"),
            (["pass"] + ["inconclusive"] * 11, "inconclusive"),  # one in twelve is luck: chance .26
            (["pass"] * 2 + ["inconclusive"] * 10, "pass"),  # two in twelve: chance .035
            (["fail"] * 2 + ["inconclusive"] * 10, "fail"),
            (["fail"] * 3 + ["pass"] * 2 + ["inconclusive"] * 7, "fail"),
            (["pass"] * 2 + ["fail"] * 2, "inconclusive"),
            (["fail"] + ["undecidable"] * 11, "fail"),
            (["undecidable"], "inconclusive"),
            ([], "inconclusive"),
        ],
    )
    def test_verdict(self, verdicts: list[str], expected: str) -> None:
        assert overall([target(str(i), v) for i, v in enumerate(verdicts)], 20).verdict == expected

    def test_the_sentence_names_wins_and_losses(self) -> None:
        targets = [target(n, v) for n, v in (("blur", "fail"), ("noise", "fail"), ("natural errors", "inconclusive"))]
        agreement = overall(targets, 20)
        assert agreement.sentence == (
            "Our score predicts failures worse than what a user would compute anyway: of 3 kinds of failure it beats "
            "the best baseline on none, falls behind it on 2 (blur, noise), and neither is shown on 1."
        )
        assert (agreement.inputs, agreement.targets) == (20, targets)
        named = targets[0].model_copy(
            update={"scores": [s.model_copy(update={"name": "entropy"}) for s in targets[0].scores]}
        )
        assert overall([named, *targets], 20).meanings == {"entropy": MEANINGS["entropy"]}

    def test_every_score_has_a_meaning(self) -> None:
        torch.manual_seed(0)
        subject = subject_of(nn.Linear(6, 4), 6, 4)
        ours = {
            "kernel machine",
            "late path",
            "late path at the reference",
            "lack of support",
            "predicted severity",
            "predicted distance",
            "reach",
        }
        assert {
            *baselines(subject, queries_of(subject)),
            "extrapolated margin",
            *ours,
            "predicted severity",
            "predicted distance",
        } == set(MEANINGS)


class TestRates:
    def test_calibration_recovers_a_logistic_rate(self) -> None:
        score = normal(20_000)
        truth = torch.sigmoid(1.5 * score - 1)
        failed = torch.rand(20_000, generator=seeded(3), dtype=torch.float64) < truth
        at = torch.linspace(-2, 2, 9, dtype=torch.float64)
        torch.testing.assert_close(calibrate(score, failed)(at), torch.sigmoid(1.5 * at - 1), atol=0.06, rtol=0)

    def test_calibration_recovers_a_cliff(self) -> None:
        """Failures that begin at once keep their rates on either side: no slope is taken for granted."""
        score = normal(2000)
        failed = torch.rand(2000, generator=seeded(3), dtype=torch.float64) < torch.where(score > 1, 0.95, 0.1)
        found = calibrate(score, failed)(torch.tensor([-1.0, 0.5, 1.5, 2.5]))
        torch.testing.assert_close(found, torch.tensor([0.1, 0.1, 0.95, 0.95]).double(), atol=0.06, rtol=0)

    def test_three_failures_are_no_certainty_and_no_score_is_no_rate(self) -> None:
        rate = calibrate(torch.arange(30.0), torch.arange(30) >= 27)
        assert 0.7 < rate(torch.tensor([40.0])).item() < 0.9
        assert rate(torch.zeros(0)).shape == (0,)

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 1000), st.sampled_from([lambda s: s, torch.exp, lambda s: s**3]))
    def test_rates_rise_with_the_score_and_add_up(self, seed: int, change: Callable[[Tensor], Tensor]) -> None:
        score = normal(120, seed=seed)
        failed = normal(120, seed=seed + 1) + score > 1
        failed[:2] = torch.tensor([True, False])
        rate = calibrate(change(score), failed)
        assert rate(change(score)).mean().item() == pytest.approx(failed.double().mean().item(), abs=1 / 120)
        along = rate(change(torch.linspace(-9, 9, 50, dtype=torch.float64)))
        assert (along.diff() >= -1e-12).all()
        assert ((along > 0) & (along < 1)).all()

    def test_infinite_scores_rank_last(self) -> None:
        """Inputs never predicted to fail have score minus infinity, and a lower rate than all others."""
        score = torch.cat([torch.full((50,), -math.inf), torch.linspace(-3, 0, 50)])
        failed = torch.rand(100, generator=seeded()) < torch.cat(
            [torch.full((50,), 0.05), torch.linspace(0.3, 0.9, 50)]
        )
        rate = calibrate(score, failed)(torch.tensor([-math.inf, -1.5, 0.0, math.inf]))
        assert (rate.diff()[:2] > 0).all()
        assert rate[0] < 0.15

    @pytest.mark.parametrize(
        ("score", "failed", "expected"),
        [
            ([1.0, 2.0, 3.0], [True] * 3, 3.5 / 4),
            ([1.0, 2.0, 3.0], [False] * 3, 0.5 / 4),
            ([1.0, 2.0, 3.0, 4.0], [True, True, False, False], 2.5 / 5),  # backwards
            ([2.0, 2.0, 2.0], [True, False, False], 1.5 / 4),
            ([math.inf] * 3, [True, False, False], 1.5 / 4),
        ],
    )
    def test_a_score_that_says_nothing_gives_the_base_rate(
        self, score: list[float], failed: list[bool], expected: float
    ) -> None:
        rate = calibrate(torch.tensor(score), torch.tensor(failed))
        assert rate(torch.tensor([-5.0, 2.0, math.inf])).tolist() == [pytest.approx(expected)] * 3

    def test_calibration_refuses_what_it_cannot_use(self) -> None:
        with pytest.raises(DataError, match="at least one input"):
            calibrate(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
        with pytest.raises(NotFiniteError, match="NaN at 1 inputs"):
            calibrate(torch.tensor([math.nan, 1.0]), torch.tensor([True, False]))

    def test_calibration_error_by_hand(self) -> None:
        """Two rates, so two bins of ten: one failure where 2 were predicted, seven where 5 were."""
        rate = torch.tensor([0.2] * 10 + [0.5] * 10, dtype=torch.float64)
        failed = torch.tensor([True] + [False] * 9 + [True] * 7 + [False] * 3)
        held = reliability("blur", "mass", rate, failed, (50, 9), seeded())
        assert held.error.value == pytest.approx((1 + 2) / 20)
        assert [(b.inputs, b.failures, b.predicted) for b in held.bins] == [
            (10, 1, pytest.approx(0.2)),
            (10, 7, pytest.approx(0.5)),
        ]
        assert held.bins[1].observed == wilson(7, 10)
        assert (held.predicted, held.observed) == (pytest.approx(0.35), wilson(8, 20))
        assert (held.fitted_inputs, held.fitted_failures, held.verdict) == (50, 9, "inconclusive")
        assert held.sentence == (
            "Blur: rates fitted on 9 failures among 50 inputs predict 35.0% of the sealed ones to fail, 40.0% did; by "
            f"bin they are off by 15.0%, no more than chance would explain ({held.error_if_right:.1%}), with too few "
            "failures to conclude from."
        )

    def test_bins_have_equal_numbers_and_keep_equal_rates_together(self) -> None:
        assert bins(normal(500).sigmoid()).bincount().tolist() == [100] * 5
        assert bins(torch.full((7,), 0.3)).unique().numel() == 1
        tied = torch.cat([torch.zeros(60), torch.linspace(0.1, 0.9, 40)]).double()
        assert bins(tied)[:60].unique().numel() == 1

    def test_right_rates_seldom_fail_and_wrong_ones_do(self) -> None:
        """Of 100 draws at the predicted rates about 5 lie above the 95th percentile; at twice the odds nearly all."""
        verdicts = []
        for seed in range(100):
            score = normal(400, seed=seed) - 1
            chance = torch.rand(400, generator=seeded(1000 + seed), dtype=torch.float64)
            for odds in (0, 1):
                failed = chance < torch.sigmoid(score + odds)
                verdicts.append(reliability("", "", score.sigmoid(), failed, (1, 1), seeded(seed), 200).verdict)
        assert verdicts[::2].count("fail") <= 11
        assert verdicts[1::2].count("fail") >= 95

"""The report: the view says what the findings say, nothing on the page can run or reach out, nothing is cut off."""

import base64
import dataclasses
import io
import math
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Literal

import matplotlib
import numpy as np
import pytest
import torch
from findings_cases import Case, digits_case, renamed, weights_only_case
from markupsafe import escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from sklearn.metrics import roc_auc_score

from brittle.findings import NOTHING, Estimate, Findings, HealthCheck, PerturbationResult, Verdict
from brittle.report import curves, page, render
from brittle.report.charts import Chart, Curves, Dot, Dots, Heat, Points, Scale, Waterfall
from brittle.report.figures import draw, paint
from brittle.report.figures.style import STYLE
from brittle.report.formatting import NONE, amount, percent, with_unit
from brittle.report.pictures import Album
from brittle.report.view import SECTIONS, View, view_of
from brittle.report.view.agreement import FIGURES
from brittle.report.view.holes import counted

HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(2)'>",
    "$\\frac{1}{0}$",
    "{{ 7 * 7 }}{% raw %}",
    "a\x00b\nc",
    "Ankle boot, worn by somebody for many years without any end",
    "</style></title>",
    "日本語",
    "&lt;b&gt;",
    "w" * 80,
]


@pytest.fixture(scope="module")
def case() -> Case:
    return digits_case()


@pytest.fixture(scope="module")
def view(case: Case) -> View:
    return view_of(case.findings, case.arrays)


@pytest.fixture(scope="module")
def hostile() -> Case:
    """Few figures, hostile names: of classes, inputs, scores, families, the subject, and in sentences."""
    case = renamed(digits_case(), HOSTILE)
    f, evil = case.findings, HOSTILE[0]
    target = f.agreement.targets[0]
    scores = [s.model_copy(update={"name": HOSTILE[k]}) for k, s in enumerate(target.scores)]
    target = target.model_copy(update={"name": evil, "sentence": evil, "scores": scores, "best_ours": HOSTILE[0]})
    family = f.prediction.families[0].model_copy(update={"name": evil, "unit": evil})
    flip = f.prediction.flips[0]
    leaving = [e.model_copy(update={"name": "id\"onload='alert(3)'"}) for e in flip.leaving]
    findings = f.model_copy(
        update={
            "subject": f.subject.model_copy(update={"name": evil, "spec": evil}),
            "prediction": f.prediction.model_copy(
                update={"families": [family], "flips": [flip.model_copy(update={"leaving": leaving, "how": evil})]}
            ),
            "holes": [f.holes[0].model_copy(update={"title": evil, "from_group": HOSTILE[1], "families": [evil]})],
            "agreement": f.agreement.model_copy(update={"targets": [target], "sentence": evil}),
            "warnings": HOSTILE,
        }
    )
    arrays = dict(case.arrays) | {"shift.rate": case.arrays["shift.rate"][:1]}
    return Case(findings, arrays, case.pictures)


# The view equals the findings


def test_headline_figures_are_those_of_the_findings(case: Case, view: View) -> None:
    cards = {card.title: card for card in view.headline.cards}
    assert view.headline.statement == case.findings.fidelity.statement
    assert cards["Clean accuracy"].amounts[0].value == "95.6%"
    assert cards["Clean accuracy"].amounts[0].interval == "[93.8, 97.4]"
    assert cards["The account closes"].amounts[0].value == f"{100 * case.findings.fidelity.relative_residual:.2f}%"
    assert cards["The account closes"].verdict == case.findings.fidelity.verdict
    assert cards["The map is faithful"].amounts[0].value == "0.987"
    assert cards["Predicted to fail"].amounts[0].value == "71.0%"
    assert "margin gradient" in cards["Predicted to fail"].note
    assert [a.label for a in cards["Median adversarial distance"].amounts] == ["L2", "L∞"]
    passed = sum(t.verdict == "pass" for t in case.findings.agreement.targets)
    assert cards["Beats the baselines"].amounts[0].value == f"{passed} of 13"
    assert cards["Beats the baselines"].verdict == case.findings.agreement.verdict


@pytest.mark.parametrize(("cosine", "verdict"), [(0.95, "pass"), (0.949, "fail")])
def test_the_map_passes_from_its_bar_on(case: Case, cosine: float, verdict: str) -> None:
    memory = case.findings.fidelity.memory.model_copy(update={"shift_cosine": cosine})
    fidelity = case.findings.fidelity.model_copy(update={"memory": memory})
    view = view_of(case.findings.model_copy(update={"fidelity": fidelity}), {})
    assert next(c for c in view.headline.cards if c.title == "The map is faithful").verdict == verdict


def test_shift_panels_hold_the_rates_family_by_family(case: Case, view: View) -> None:
    panels = view.failing.shift.panels
    assert [p.title.split(" at ")[0] for p in panels] == [f.name for f in case.findings.prediction.families]
    np.testing.assert_array_equal([p.values for p in panels], case.arrays["shift.rate"].numpy())
    assert panels[0].columns == tuple(case.findings.subject.class_names)
    assert panels[0].rows[3] == "3 (27)"
    assert {p.limit for p in panels} == {view.failing.shift.scale.limit}


def test_the_strongest_cell_is_named(case: Case) -> None:
    rate = torch.zeros_like(case.arrays["shift.rate"])
    rate[5, 7, 4] = -2.5  # rotation, predicted 7, training examples of 4
    text = view_of(case.findings, {"shift.rate": rate}).failing.shift.example
    assert (
        text == "under rotation at 30°, training examples of “4” arrive with 2.50 logits against the predictions of “7”"
    )
    rate[5, 7, 7] = -3
    text = view_of(case.findings, {"shift.rate": rate}).failing.shift.example
    assert text == "under rotation at 30°, 3.00 logits of support from their own class leave the predictions of “7”"


def test_a_map_of_many_classes_shows_those_that_move_most(case: Case) -> None:
    names = [f"c{i}" for i in range(30)]
    subject = case.findings.subject.model_copy(update={"class_names": names})
    rate = torch.zeros(len(case.findings.prediction.families), 30, 30)
    rate[:, 5:25, 5:25] = -1
    shift = view_of(case.findings.model_copy(update={"subject": subject}), {"shift.rate": rate}).failing.shift
    assert shift.panels[0].columns == tuple(names[5:25])
    assert shift.note.startswith("The 10 classes")


def test_families_stand_beside_what_was_observed(case: Case, view: View) -> None:
    observed = {t.name: t.prevalence for t in case.findings.agreement.targets}
    for row, family in zip(view.failing.families, case.findings.prediction.families, strict=True):
        assert row.predicted == f"{100 * family.predicted_failing:.1f}%"
        assert row.observed == f"{100 * observed[family.name]:.1f}%"
        assert (row.median == "not reached") == (family.median_severity is None)


def test_predicted_failures_at_the_reference_are_read_off_the_severities(case: Case, view: View) -> None:
    for series in view.failing.reach.series[:5]:
        family = next(f for f in case.findings.prediction.families if f.name == series.label)
        at = series.x.index(1.0)
        assert series.y[at] == (case.arrays[f"severity.{series.label}"] <= family.reference).double().mean().item()


def test_hole_cards_keep_order_and_numbers(case: Case, view: View) -> None:
    for rank, (shown, hole) in enumerate(zip(view.holes, case.findings.holes, strict=True), start=1):
        assert (shown.rank, shown.title, shown.support) == (rank, hole.title, str(hole.support))
        predicted, *observed = shown.rates.rows
        assert (predicted.value, predicted.low, predicted.high) == tuple(hole.predicted_rate.model_dump().values())
        keys = [key for key, _ in shown.members]
        assert len(keys) == min(8, len(hole.members) - 1)
        assert shown.exemplar not in keys
        if hole.test is None:
            assert (observed, shown.verdict, shown.observed) == ([], None, "not tested")
        else:
            assert observed[0].value == hole.test.failures / hole.test.members
            assert shown.rates.reference == hole.test.base_rate
            assert shown.verdict == hole.test.verdict
            assert [row.value for row in observed[1:]] == [hole.test.random.value, hole.test.least_confident.value]
            rates = {row.name: row.rate for row in shown.beside}
            assert rates["Least confident"] == percent(hole.test.least_confident.value)


def test_holes_that_did_not_pass_are_no_findings(case: Case, view: View) -> None:
    findings = [hole.title for hole in view.holes if hole.finding]
    assert 0 < len(findings) < len(view.holes)
    assert findings == [hole.title for hole in case.findings.holes if hole.test and hole.test.verdict == "pass"]
    assert dict(view.headline.facts)["Holes"] == counted(case.findings.holes)
    assert [region.finding for region in view.missing.regions] == [hole.finding for hole in view.holes[:4]]
    assert counted(case.findings.holes[:1]) == "1 finding, 0 untested hypotheses"
    html = render(case.findings, case.arrays, case.pictures)
    above, below = html[html.index('<section id="holes">') : html.index('<section id="why">')].split(
        "Untested hypotheses"
    )
    for hole in view.holes:
        assert (hole.title in above, hole.title in below) == (hole.finding, not hole.finding)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {},
            "84% were predicted to. Random regions of the same class and confidence fail as often in 0.1% of draws",
        ),
        ({"verdict": "inconclusive", "corrected": 0.2}, "corrected for all holes: 20.0%): that may be chance."),
        ({"verdict": "inconclusive"}, "reaches down to the rate of all inputs."),
        ({"verdict": "inconclusive", "corrected": None}, "too few or too much alike to tell."),
        ({"verdict": "inconclusive", "members": 4}, "Fewer than 5 lie in it, too few to tell."),
        ({"verdict": "fail"}, "the prediction is refuted."),
    ],
)
def test_a_hole_says_why_it_is_a_finding_or_not(case: Case, change: dict[str, object], says: str) -> None:
    hole = case.findings.holes[0]
    assert hole.test is not None
    holes = [hole.model_copy(update={"test": hole.test.model_copy(update=change)})]
    assert says in view_of(case.findings.model_copy(update={"holes": holes}), {}).holes[0].told


def test_a_natural_hole_names_no_probe_and_no_severity(case: Case) -> None:
    usual = case.findings.holes[0]
    natural = usual.model_copy(update={"opened_by": "nothing", "families": [], "severity": NOTHING})
    findings = case.findings.model_copy(update={"holes": [natural]})
    shown = view_of(findings, {}).holes[0]
    assert (shown.families, shown.severity) == ((), "")
    assert shown.rates.x_label == "failure rate as they are, 95% interval"
    assert not any("families" in beside.what for beside in shown.beside)
    text = "".join(Page(render(findings, {}, {})).text)
    assert f"held up by cluster {natural.to_group}, against {natural.from_group}" in text
    assert "Opens at" not in text


def test_flips_show_contributions_before_and_after(case: Case, view: View) -> None:
    flip, shown = case.findings.prediction.flips[0], view.flips[0]
    assert (shown.before, shown.after) == (flip.picture_before, flip.picture_after)
    assert (shown.margin_before, shown.margin_after) == ("+3.42", "−0.31")
    first = shown.leaving[0]
    assert (first.before, first.after, first.change, first.share) == ("+0.410", "−0.210", "−0.620", 1.0)
    assert first.picture == f"train:{flip.leaving[0].id}"


def test_every_target_shows_every_score(case: Case, view: View) -> None:
    for shown, target in zip(view.agreement.targets, case.findings.agreement.targets, strict=True):
        assert shown.sentence == target.sentence
        ranked = target.kind == "attack"
        value = {s.name: (s.spearman if ranked else s.auroc).value for s in target.scores}
        best_first = sorted(value, key=value.__getitem__, reverse=True)
        role = {s.name: "ours" if s.ours else "baseline" for s in target.scores}
        assert [(row.label, row.value, row.role) for row in shown.deciding.rows] == [
            (name, value[name], role[name]) for name in best_first
        ]
        assert [row.name for row in shown.rows] == best_first
        assert {row.name for row in shown.rows if row.best} == {target.best_ours, target.best_baseline}
        assert shown.figure[0] == ("Spearman" if ranked else "AUROC")
        columns = [name for name, _ in shown.columns]
        assert set(columns) == {name for name, _ in FIGURES.values()} - {shown.figure[0]}
        for row in shown.rows:
            [score] = [s for s in target.scores if s.name == row.name]
            assert row.deciding == str(amount(score.spearman if ranked else score.auroc))
            assert row.others[columns.index("FPR95")] == str(amount(score.fpr95))
            assert (row.gain, row.chance) == (("", "") if not row.ours else (str(amount(score.gain, "signed")), "0.04"))
            assert row.meaning == case.findings.agreement.meanings.get(row.name, "")
    gains = view.agreement.gains.rows
    assert [(g.value, g.role) for g in gains] == [(t.gain.value, t.verdict) for t in case.findings.agreement.targets]


def test_predicted_rates_stand_beside_observed_ones(case: Case, view: View) -> None:
    for shown, target in zip(view.agreement.targets, case.findings.agreement.targets, strict=True):
        held = target.calibration
        assert (shown.rates is None) == (held is None)
        if shown.rates and held:
            assert (shown.rates.sentence, shown.rates.verdict) == (held.sentence, held.verdict)
            assert [count for *_, count in shown.rates.rows] == [f"{b.failures} of {b.inputs}" for b in held.bins]
    assert view.agreement.targets[0].rates


def test_the_seal_and_the_scores_meanings_are_told(case: Case, view: View, digits_page: str) -> None:
    assert view.agreement.sealed == (
        "The labels of these inputs were sealed. They were opened once, after scores and holes were fixed "
        "(SHA-256 0123456789abcdef…)."
    )
    ours = {s.name for t in case.findings.agreement.targets for s in t.scores if s.ours}
    assert {name for name, own, _ in view.agreement.meanings if own} == ours & set(case.findings.agreement.meanings)
    for _, _, meaning in view.agreement.meanings:
        assert str(escape(meaning)) in digits_page


def test_an_audit_of_before_the_seal_is_still_shown(case: Case) -> None:
    """Findings written without the newer figures."""
    document = case.findings.model_dump()
    for name in ("sealed", "meanings"):
        del document["agreement"][name]
    for target in document["agreement"]["targets"]:
        del target["calibration"]
        for score in target["scores"]:
            for name in ("kendall", "fpr95", "e_aurc", "augrc", "gain", "p", "p_holm"):
                del score[name]
    shown = view_of(Findings.model_validate(document), case.arrays).agreement
    assert (shown.sealed, shown.meanings) == ("", ())
    assert {row.others[2] for target in shown.targets for row in target.rows} == {NONE}


def test_one_target_of_each_kind_is_open(view: View) -> None:
    assert [t.name for t in view.agreement.targets if t.open] == ["natural errors", "brightness", "attacks, L2"]


def test_area_under_the_drawn_roc_is_the_reported_auroc(case: Case, view: View) -> None:
    for shown, target in zip(view.agreement.targets, case.findings.agreement.targets, strict=True):
        ours, baseline, *_ = shown.roc.series
        assert (ours.role, baseline.role) == ("ours", "baseline")
        reported = {s.name: s.auroc.value for s in target.scores}
        for series in (ours, baseline):
            assert np.trapezoid(series.y, series.x) == pytest.approx(reported[series.label], abs=2e-3)


def test_accuracy_under_attack_starts_clean_and_ends_with_those_that_withstood(case: Case, view: View) -> None:
    for curve in view.agreement.distances:
        (series,) = curve.series
        assert series.y[0] == 238 / 250
        assert series.y[-1] == pytest.approx(4 / 250)  # 4 of 238 have no finite distance
        assert all(a >= b for a, b in zip(series.y, series.y[1:], strict=False))


def test_the_waterfall_adds_up_to_the_mean_output(case: Case, view: View) -> None:
    assert sum(view.account.waterfall.amounts) == pytest.approx(case.arrays["ledger.output"].mean().item())


def test_the_closing_points_miss_the_diagonal_by_the_residual(case: Case, view: View) -> None:
    points = view.account.closing
    missed = np.array(points.x) - np.array(points.y)
    np.testing.assert_allclose(missed, case.arrays["ledger.rows"][-1].numpy(), atol=1e-9)


def test_suggestions_link_to_holes_that_exist(case: Case) -> None:
    region = case.findings.suggestions.regions[0].model_copy(update={"hole": 99})
    suggestions = case.findings.suggestions.model_copy(update={"regions": [region]})
    missing = view_of(case.findings.model_copy(update={"suggestions": suggestions}), {}).missing
    assert (missing.regions[0].hole, missing.regions[0].finding) == ("", False)
    assert missing.examples[0].hole == "hole-0"


def test_findings_read_back_from_json_give_the_same_view(case: Case, view: View) -> None:
    assert view_of(Findings.model_validate_json(case.findings.model_dump_json()), case.arrays) == view


# What is missing is left out with a word


@pytest.mark.parametrize("prefix", ["shift", "severity", "agreement", "distance", "ledger", ""])
def test_a_missing_array_leaves_out_its_own_figure_only(case: Case, view: View, prefix: str) -> None:
    kept = {key: array for key, array in case.arrays.items() if not key.startswith(prefix)}
    shown = view_of(case.findings, kept)
    left_out = {
        "shift": not shown.failing.shift.panels,
        "severity": shown.failing.reach is None,
        "agreement": all(t.roc is None and t.against is None for t in shown.agreement.targets),
        "distance": not shown.agreement.distances,
        "ledger": shown.account.closing is None,
    }
    assert left_out == {key: key.startswith(prefix) for key in left_out}
    assert shown.holes == view.holes


def test_a_model_without_a_path_claims_no_account() -> None:
    case = weights_only_case()
    view = view_of(case.findings, case.arrays)
    cards = {card.title: card for card in view.headline.cards}
    assert cards["The account closes"].amounts[0].value == NONE
    assert cards["The account closes"].verdict == "inconclusive"
    assert (view.account.waterfall, view.account.closing, view.account.memory, view.holes) == (None, None, (), ())
    assert view.account.missing


def test_a_target_without_failures_has_no_curve(case: Case) -> None:
    target = case.findings.agreement.targets[0]
    nothing = Estimate(value=None, low=None, high=None)
    scores = [
        s.model_copy(update={"auroc": nothing, "average_precision": nothing, "spearman": nothing})
        for s in target.scores
    ]
    target = target.model_copy(update={"scores": scores, "failures": 0, "prevalence": 0.0, "gain": nothing})
    agreement = case.findings.agreement.model_copy(update={"targets": [target]})
    arrays = dict(case.arrays) | {"agreement.0.failed": torch.zeros(250, dtype=torch.bool)}
    (shown,) = view_of(case.findings.model_copy(update={"agreement": agreement}), arrays).agreement.targets
    assert shown.roc is None
    assert {row.deciding for row in shown.rows} == {NONE}
    assert draw(shown.deciding).uri


def test_a_median_beyond_reach_is_infinite(case: Case) -> None:
    result = case.findings.attacks.results[0]
    gone = Estimate(value=None, low=None, high=None)
    result = result.model_copy(
        update={"success": result.success.model_copy(update={"value": 0.3}), "median_distance": gone}
    )
    attacks = case.findings.attacks.model_copy(update={"results": [result]})
    assert view_of(case.findings.model_copy(update={"attacks": attacks}), {}).attacks.rows[0].median == "∞"


def test_a_failed_check_of_the_attacks_is_told_first_and_everywhere(case: Case) -> None:
    verdicts: list[Literal["pass", "fail", "warn"]] = ["pass", "fail", "warn"]
    health = [
        HealthCheck(name=f"check {v}", norm=norm, verdict=v, value=0.5, sentence=f"what {v} says")
        for norm in ("l2", "linf")
        for v in verdicts
        if norm == "l2" or v == "pass"
    ]
    view = view_of(_with_health(case, health, "inconclusive"), {})
    assert view.attacks.verdict == "inconclusive"
    assert "check fail failed" in view.attacks.sentence
    assert [panel.verdict for panel in view.attacks.panels] == ["inconclusive", "pass"]
    assert [check.verdict for check in view.attacks.panels[0].checks] == ["fail", "warn", "pass"]
    assert view.attacks.panels[0].passed == "1 of 3 passed"
    (card,) = (card for card in view.headline.cards if card.title == "Median adversarial distance")
    assert card.verdict == "inconclusive"
    assert "check fail" in card.note
    sound = view_of(_with_health(case, [check for check in health if check.verdict != "fail"], "pass"), {})
    assert sound.attacks.sentence == "3 checks of the attacks, none failed, 1 warned."
    (card,) = (card for card in sound.headline.cards if card.title == "Median adversarial distance")
    assert card.verdict is None


def test_a_failure_severity_stands_with_its_unit_or_was_not_reached(case: Case) -> None:
    told = PerturbationResult(
        name="rotation",
        unit="degrees",
        reference=20,
        most=40,
        inputs=90,
        failing=Estimate(value=0.6, low=0.5, high=0.7),
        median_severity=Estimate(value=31.25, low=28, high=35),
        evaluations=12.0,
    )
    never = told.model_copy(update={"median_severity": NOTHING})
    attacks = case.findings.attacks.model_copy(update={"perturbations": [told, never]})
    rows = view_of(case.findings.model_copy(update={"attacks": attacks}), {}).attacks.perturbations
    assert (rows[0].most, rows[0].median) == (with_unit("degrees", 40), with_unit("degrees", 31.25))
    assert rows[1].median == "not reached"


def _with_health(case: Case, health: list[HealthCheck], verdict: Verdict) -> Findings:
    attacks = case.findings.attacks.model_copy(update={"health": health, "verdict": verdict})
    return case.findings.model_copy(update={"attacks": attacks})


# Numbers and curves


@pytest.mark.parametrize(
    ("estimate", "style", "text"),
    [
        ((0.9123, 0.88, 0.94), "plain", "0.912 [0.880, 0.940]"),
        ((0.91, 0.7, 1.0), "plain", "0.91 [0.70, 1.00]"),
        ((0.959, 0.938, 0.974), "share", "95.9% [93.8, 97.4]"),
        ((-0.01, -0.05, 0.03), "signed", "−0.010 [−0.050, +0.030]"),
        ((1.0, 1.0, 1.0), "share", "100% [100, 100]"),
        ((1.2, 1.1, math.inf), "plain", "1.20 [1.10, ∞]"),
        ((0.5, None, None), "share", "50.0%"),
        ((None, None, None), "plain", NONE),
    ],
)
def test_intervals_decide_the_digits(estimate: tuple[float | None, ...], style: str, text: str) -> None:
    value, low, high = estimate
    assert str(amount(Estimate(value=value, low=low, high=high), style)) == text


def test_the_roc_curve_counts_ties_by_half() -> None:
    rng = np.random.default_rng(0)
    scores, failed = rng.integers(0, 5, 400).astype(float), rng.random(400) < 0.3
    x, y = curves.roc(scores, failed)
    assert np.trapezoid(y, x) == pytest.approx(roc_auc_score(failed, scores), abs=1e-12)
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)


def test_survival_and_reach_of_known_values() -> None:
    values = np.array([2.0, 1.0, np.inf, np.nan, 2.0])
    at, above = curves.survival(values)
    assert at.tolist() == [0, 1, 2, 2]
    assert above.tolist() == [1, 0.75, 0.25, 0.25]
    assert curves.reached(values, np.array([0.5, 1, 2, 9])).tolist() == [0, 0.25, 0.75, 0.75]


# Figures


def charts(value: object) -> Iterator[Chart]:
    """Every chart inside a view."""
    if isinstance(value, (Dots, Curves, Points, Heat, Scale, Waterfall)):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from charts(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from charts(item)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_nothing_is_cut_off_any_figure(view: View, hostile: Case) -> None:
    drawn = [*[*charts(view)][::3], *charts(view_of(hostile.findings, hostile.arrays))]
    assert {type(chart) for chart in drawn} == {Dots, Curves, Points, Heat, Scale, Waterfall}
    for chart in drawn:
        figure = paint(chart)
        with matplotlib.rc_context(STYLE):
            FigureCanvasSVG(figure).print_svg(io.StringIO())
            box = figure.get_tightbbox()
        width, height = figure.get_size_inches()
        assert min(box.x0, box.y0) >= -0.01, chart.alt
        assert box.x1 <= width + 0.01, chart.alt
        assert box.y1 <= height + 0.01, chart.alt


def test_equal_charts_give_equal_bytes_and_leave_no_trace(view: View) -> None:
    before = dict(matplotlib.rcParams)
    assert draw(view.holes[0].rates) == draw(view.holes[0].rates)
    assert dict(matplotlib.rcParams) == before


def test_a_class_without_queries_is_a_hatched_row() -> None:
    values = ((math.nan, math.nan), (-1.0, 1.0))
    heat = Heat("t", ("a (0)", "b (3)"), ("a", "b"), values, 1.0, "alt")
    axes = paint(heat).axes[0]
    assert axes.patch.get_hatch()
    assert [t.get_text() for t in axes.texts] == ["−", "+"]


def test_dots_that_were_not_estimated_say_so() -> None:
    axes = paint(Dots((Dot("a", None, None, None), Dot("b", 0.5, 0.4, 0.6)), "x", "alt")).axes[0]
    assert [t.get_text() for t in axes.texts] == ["not estimated"]


# Pictures


def test_pictures_keep_their_pixels() -> None:
    image = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
    album = Album({"a": image, "b": image.expand(3, 2, 2)}, (0.0, 1.0), 32)
    assert decoded(album.picture("a").uri).tolist() == [[[0, 255], [128, 64]]]
    assert decoded(album.picture("b").uri).shape == (3, 2, 2)
    assert album.picture("c") is None


def test_large_pictures_shrink_by_averaging() -> None:
    checks = (torch.arange(64)[:, None] + torch.arange(128)) % 2.0
    picture = Album({"a": checks}, (0.0, 1.0), 32).picture("a")
    assert (picture.width, picture.height) == (32, 16)
    assert decoded(picture.uri).unique().tolist() == [128]


def test_a_vector_becomes_bars_of_its_heights() -> None:
    picture = decoded(Album({"v": torch.tensor([0.0, 5.0, 10.0])}, (0.0, 10.0), 32).picture("v").uri)[0]
    dark = (picture < 128).sum(0).reshape(3, 4)
    assert dark.tolist() == [[0, 0, 0, 0], [24, 24, 24, 0], [48, 48, 48, 0]]


def test_a_difference_lies_around_grey() -> None:
    album = Album({"a": torch.tensor([[0.5, 0.5, 0.5]]), "b": torch.tensor([[0.5, 0.6, 0.45]])}, (0.0, 1.0), 32)
    assert decoded(album.difference("a", "b").uri).flatten().tolist() == [128, 255, 64]


def decoded(uri: str) -> torch.Tensor:
    from torchvision.io import decode_png

    return decode_png(torch.frombuffer(bytearray(base64.b64decode(uri.split(",")[1])), dtype=torch.uint8))


# The page


class Page(HTMLParser):
    """Tags, attributes, text and style of a page, as a browser would split them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def images(self) -> list[str]:
        return [attrs["src"] or "" for tag, attrs in self.tags if tag == "img"]


@pytest.fixture(scope="module")
def digits_page(case: Case) -> str:
    return render(case.findings, case.arrays, case.pictures)


@pytest.fixture(scope="module")
def hostile_page(hostile: Case) -> str:
    return render(hostile.findings, hostile.arrays, hostile.pictures)


def test_the_page_is_small_and_has_every_section(digits_page: str) -> None:
    assert len(digits_page.encode()) <= page.LIMIT
    found = [attrs["id"] for tag, attrs in Page(digits_page).tags if tag == "section" and "id" in attrs]
    assert found == [anchor for anchor, _ in SECTIONS]


def test_the_page_asks_nothing_of_the_network(digits_page: str, hostile_page: str) -> None:
    for text in (digits_page, hostile_page):
        for tag, attrs in Page(text).tags:
            for name in ("src", "href", "srcset", "poster", "action", "data", "background"):
                value = attrs.get(name)
                assert value is None or value.startswith(("data:", "#")), (tag, name, value)
        assert "url(" not in text
        assert "@import" not in text
        assert "default-src 'none'" in text


def test_hostile_names_are_inert(hostile_page: str) -> None:
    parsed = Page(hostile_page)
    assert not [tag for tag, _ in parsed.tags if tag in ("script", "iframe", "object", "embed", "base")]
    assert not [name for _, attrs in parsed.tags for name in attrs if name.startswith("on")]
    assert HOSTILE[0] in parsed.text  # shown as it is, as text
    assert "{{ 7 * 7 }}{% raw %}" in parsed.text
    assert sum(tag == "title" for tag, _ in parsed.tags) == 1


def test_hostile_names_are_inert_inside_figures(hostile_page: str) -> None:
    figures = [src for src in Page(hostile_page).images() if src.startswith("data:image/svg+xml")]
    assert figures
    texts = set()
    for src in figures:
        for element in ET.fromstring(base64.b64decode(src.split(",")[1])).iter():
            kind = element.tag.split("}")[-1]
            assert kind not in ("script", "foreignObject", "a"), kind
            for name, value in element.attrib.items():
                assert not name.startswith("on")
                assert not name.endswith("href") or value.startswith(("#", "data:image/png"))
            if kind == "text":
                texts.add("".join(element.itertext()))
    assert "<script>alert(1)</script>" in texts
    assert "$\\frac{1}{0}$" in texts


def test_large_pictures_are_made_smaller_until_the_page_fits(case: Case) -> None:
    noise = torch.rand(3, 160, 160, generator=torch.Generator().manual_seed(0))
    findings = case.findings.model_copy(
        update={"agreement": case.findings.agreement.model_copy(update={"targets": []})}
    )
    text = render(findings, {}, dict.fromkeys(case.pictures, noise))
    assert len(text.encode()) <= page.LIMIT
    pictures = [src for src in Page(text).images() if src.startswith("data:image/png")]
    assert len(pictures) > 100
    assert decoded(pictures[0]).shape == (3, 64, 64)


def test_a_page_without_path_arrays_or_pictures_still_renders() -> None:
    case = weights_only_case()
    text = "".join(Page(render(case.findings, {}, {})).text)
    assert case.findings.fidelity.statement in text
    assert "No hole was found" in text
    assert "There is no ledger" in text
    assert "not checked by retraining" in text

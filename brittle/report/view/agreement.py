"""Is that true? Predicted against observed, one kind of failure at a time, beside the baselines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from brittle.findings import AttackResult, Findings, ScoreResult, TargetAgreement, Verdict
from brittle.report.charts import Curves, Dot, Dots, Points, Role, Series
from brittle.report.curves import read, roc, survival, thin
from brittle.report.formatting import amount, norm_name, number, percent
from brittle.report.view.headline import distance

KINDS = {"natural": "natural error", "probe": "under a probe", "attack": "by attack"}
MOST_POINTS = 400


@dataclass(frozen=True)
class ScoreRow:
    """One score on one target; `best` marks the best of ours and the best baseline."""

    name: str
    ours: bool
    best: bool
    auroc: str
    average_precision: str
    spearman: str


@dataclass(frozen=True)
class TargetView:
    """One kind of failure: sentence first, then table and figures."""

    anchor: str
    kind: str
    name: str
    verdict: Verdict
    sentence: str
    counts: str
    rows: tuple[ScoreRow, ...]
    ranked: bool  # a distance, which every input may have reached: rank correlation decides
    deciding: Dots
    roc: Curves | None
    against: Points | None
    open: bool


@dataclass(frozen=True)
class AgreementView:
    """The section `Is that true?`."""

    verdict: Verdict
    sentence: str
    inputs: str
    gains: Dots | None
    targets: tuple[TargetView, ...]
    distances: tuple[Curves, ...]


def agreement_of(findings: Findings, arrays: Mapping[str, Tensor]) -> AgreementView:
    """Every target in the order of the findings, and the adversarial distance curves."""
    agreement = findings.agreement
    opened = _opened(agreement.targets)
    return AgreementView(
        verdict=agreement.verdict,
        sentence=agreement.sentence,
        inputs=number(agreement.inputs),
        gains=_gains(agreement.targets) if agreement.targets else None,
        targets=tuple(_target(k, target, arrays, k in opened) for k, target in enumerate(agreement.targets)),
        distances=_distances(findings, arrays),
    )


def _opened(targets: list[TargetAgreement]) -> set[int]:
    """The first target of each kind is shown open; the others wait behind their sentence."""
    first: dict[str, int] = {}
    for k, target in enumerate(targets):
        first.setdefault(target.kind, k)
    return set(first.values())


def _gains(targets: list[TargetAgreement]) -> Dots:
    rows = tuple(Dot(target_name(t), t.gain.value, t.gain.low, t.gain.high, t.verdict) for t in targets)
    return Dots(
        rows,
        x_label="our score minus the best baseline: AUROC, Spearman for distances",
        alt="Gain over the best baseline, one row a kind of failure",
        reference=0.0,
        reference_label="no gain",
    )


def target_name(target: TargetAgreement) -> str:
    """`natural errors`, the probe family, or the norm as readers know it."""
    return f"attacks, {norm_name(target.name)}" if target.kind == "attack" else target.name


def _target(k: int, target: TargetAgreement, arrays: Mapping[str, Tensor], opened: bool) -> TargetView:
    best = {target.best_ours, target.best_baseline}
    return TargetView(
        anchor=f"target-{k}",
        kind=KINDS[target.kind],
        name=target_name(target),
        verdict=target.verdict,
        sentence=target.sentence,
        counts=f"{number(target.failures)} of {number(target.inputs)} inputs failed ({percent(target.prevalence)})",
        rows=tuple(_row(score, score.name in best) for score in target.scores),
        ranked=target.decided_by == "spearman",
        deciding=_deciding(target),
        roc=_roc(k, target, arrays),
        against=_against(k, target, arrays),
        open=opened,
    )


def _row(score: ScoreResult, best: bool) -> ScoreRow:
    texts = [str(amount(e)) for e in (score.auroc, score.average_precision, score.spearman)]
    return ScoreRow(score.name, score.ours, best, *texts)


def _role(score: ScoreResult) -> Role:
    return "ours" if score.ours else "baseline"


def _deciding(target: TargetAgreement) -> Dots:
    """The figure that decides, of every score."""
    ranks = target.decided_by == "spearman"
    figures = [(s, s.spearman if ranks else s.auroc) for s in target.scores]
    name = "Spearman" if ranks else "AUROC"
    return Dots(
        tuple(Dot(s.name, e.value, e.low, e.high, _role(s)) for s, e in figures),
        x_label=f"{name}, 95% interval",
        alt=f"{name} of every score for {target_name(target)}",
        reference=0.0 if ranks else 0.5,
        reference_label="chance",
    )


def _roc(k: int, target: TargetAgreement, arrays: Mapping[str, Tensor]) -> Curves | None:
    """Best of ours and best baseline by name, the other scores thin."""
    scores, failed = read(arrays, f"agreement.{k}.scores"), read(arrays, f"agreement.{k}.failed")
    if scores is None or failed is None or len(scores) != len(target.scores):
        return None
    others: list[Series] = []
    named: list[Series] = []
    for score, row in zip(target.scores, scores, strict=True):
        curve = roc(row, failed)
        if curve is None:
            return None
        x, y = (tuple(axis.tolist()) for axis in curve)
        if score.name in (target.best_ours, target.best_baseline):
            named.append(Series(score.name, x, y, _role(score)))
        else:
            others.append(Series("" if others else "other scores", x, y))
    return Curves(
        tuple(sorted(named, key=lambda s: s.role != "ours") + others),
        x_label="false alarms, share of inputs that held",
        y_label="caught, share of failures",
        alt=f"ROC curves for {target_name(target)}: {target.best_ours} beside {target.best_baseline}",
        guide="diagonal",
        guide_label="chance",
        percent_x=True,
        square=True,
    )


def _against(k: int, target: TargetAgreement, arrays: Mapping[str, Tensor]) -> Points | None:
    """Our best score against the observed distance or severity, over the inputs that failed."""
    scores, severity = read(arrays, f"agreement.{k}.scores"), read(arrays, f"agreement.{k}.severity")
    ours = [row for row, score in enumerate(target.scores) if score.name == target.best_ours]
    if scores is None or severity is None or not ours or len(scores) != len(target.scores):
        return None
    x, y = scores[ours[0]], severity
    finite = (abs(x) < float("inf")) & (abs(y) < float("inf"))
    if finite.sum() < 3:
        return None
    kept = thin(int(finite.sum()), MOST_POINTS)
    what = (
        f"observed {norm_name(target.name).removesuffix(' distance')} distance"
        if target.kind == "attack"
        else "observed failure severity"
    )
    return Points(
        tuple(x[finite][kept].tolist()),
        tuple(y[finite][kept].tolist()),
        x_label=f"{target.best_ours} (higher: brittler)",
        y_label=what,
        alt=f"{target.best_ours} against the {what}, one point an input that failed",
    )


def _distances(findings: Findings, arrays: Mapping[str, Tensor]) -> tuple[Curves, ...]:
    """Robust accuracy against distance, one figure a norm: 1 minus the share fooled within the distance."""
    attacks = findings.attacks
    clean = attacks.inputs / max(attacks.inputs + attacks.wrong_when_clean, 1)
    envelopes = {r.norm: r for r in attacks.results if r.kind == "envelope"}
    curves = []
    for norm in ("l2", "linf"):
        values = read(arrays, f"distance.{norm}")
        if values is None or not len(values):
            continue
        at, above = survival(values)
        name, median = norm_name(norm), _median(envelopes.get(norm))
        curves.append(
            Curves(
                (Series("smallest over all attacks", tuple(at.tolist()), tuple((clean * above).tolist()), "ours"),),
                x_label=f"{name} distance, in units of the input ({' to '.join(map(number, findings.subject.bounds))})",
                y_label=f"accuracy under attack, {name}",
                alt=f"Accuracy against {name} distance: {percent(clean)} at 0"
                + (f", median distance {distance(envelopes[norm])}" if norm in envelopes else ""),
                guide=median,
                guide_label="median distance",
                steps=True,
            )
        )
    return tuple(curves)


def _median(envelope: AttackResult | None) -> float | None:
    """The median distance where it is a finite number."""
    median = envelope.median_distance.value if envelope else None
    return median if median is not None and math.isfinite(median) else None

"""The figures of `Is that true?`: every score, ROC curves, a score against what was observed, accuracy under attack."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from brittle.findings import AttackResult, Estimate, Findings, ScoreResult, TargetAgreement
from brittle.report.charts import Curves, Dot, Dots, Points, Role, Series
from brittle.report.curves import read, roc, survival, thin
from brittle.report.formatting import norm_name, number, percent
from brittle.report.view.headline import distance

MOST_POINTS = 400


def target_name(target: TargetAgreement) -> str:
    """`natural errors`, the probe family, or the norm as readers know it."""
    norm = " ".join(map(norm_name, target.name.split()))
    return f"attacks, {norm}" if target.kind == "attack" else target.name


def by_figure(target: TargetAgreement) -> list[ScoreResult]:
    """All scores, from the highest deciding figure down; those without one last."""

    def last_first(score: ScoreResult) -> float:
        value = deciding_figure(score, target).value
        return math.inf if value is None else -value

    return sorted(target.scores, key=last_first)


def deciding_figure(score: ScoreResult, target: TargetAgreement) -> Estimate:
    """AUROC, or Spearman's coefficient where distances are ranked."""
    return score.spearman if target.decided_by == "spearman" else score.auroc


def gains(targets: list[TargetAgreement]) -> Dots:
    """Our named score's gain over the best baseline, one row a kind of failure."""
    rows = tuple(Dot(target_name(t), t.gain.value, t.gain.low, t.gain.high, t.verdict) for t in targets)
    return Dots(
        rows,
        x_label="our score minus the best baseline: AUROC, Spearman for distances",
        alt="Gain over the best baseline, one row a kind of failure",
        reference=0.0,
        reference_label="no gain",
    )


def deciding(target: TargetAgreement) -> Dots:
    """The figure that decides, of every score, the best first."""
    ranks = target.decided_by == "spearman"
    name = "Spearman" if ranks else "AUROC"
    figures = [(s, deciding_figure(s, target)) for s in by_figure(target)]
    return Dots(
        tuple(Dot(s.name, e.value, e.low, e.high, _role(s)) for s, e in figures),
        x_label=f"{name}, 95% interval",
        alt=f"{name} of every score for {target_name(target)}",
        reference=0.0 if ranks else 0.5,
        reference_label="chance",
    )


def roc_curves(k: int, target: TargetAgreement, arrays: Mapping[str, Tensor]) -> Curves | None:
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


def against(k: int, target: TargetAgreement, arrays: Mapping[str, Tensor]) -> Points | None:
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
        f"observed {norm_name(target.name.removesuffix(' distance'))} distance"
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


def distance_curves(findings: Findings, arrays: Mapping[str, Tensor]) -> tuple[Curves, ...]:
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


def _role(score: ScoreResult) -> Role:
    return "ours" if score.ours else "baseline"

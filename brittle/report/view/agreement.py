"""Is that true? Predicted against observed, one kind of failure at a time, beside the baselines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from brittle.findings import Calibration, Findings, ScoreResult, SealedPart, TargetAgreement, Verdict
from brittle.report.charts import Curves, Dots, Points
from brittle.report.formatting import NONE, amount, number, percent
from brittle.report.view.proof import (
    against,
    by_figure,
    deciding,
    deciding_figure,
    distance_curves,
    gains,
    roc_curves,
    target_name,
)

KINDS = {"natural": "natural error", "probe": "under a probe", "attack": "by attack"}

FIGURES = {
    "auroc": ("AUROC", "chance that a failure scores higher than another input"),
    "average_precision": ("Average precision", "prevalence is its value under guessing"),
    "fpr95": ("FPR95", "share of false alarms where 95% of failures are caught; lower is better"),
    "e_aurc": ("E-AURC", "failure rate of what is kept, mean over coverage, above that of the ideal; lower is better"),
    "augrc": ("AUGRC", "share of inputs kept and failing, mean over coverage; lower is better"),
    "spearman": ("Spearman", "rank correlation with the observed distance or severity, or with the error"),
    "kendall": ("Kendall", "tau-b, with the same"),
    "spearman_given_margin": ("Spearman given the margin", "the same where the logit margin's ranks are held fixed"),
    "auroc_confident_half": ("AUROC of the sure half", "among the half of the inputs of highest softmax confidence"),
}
"""Every figure of a score, and what it says; which of them decides depends on the kind of failure."""


@dataclass(frozen=True)
class ScoreRow:
    """One score on one target; `best` marks the best of ours and the best baseline."""

    name: str
    ours: bool
    best: bool
    meaning: str
    deciding: str
    gain: str  # of ours over the best baseline
    chance: str  # its p-value by Holm's correction
    others: tuple[str, ...]  # in the order of the target's columns


@dataclass(frozen=True)
class RatesView:
    """Predicted failure rates of one target beside observed ones."""

    verdict: Verdict
    sentence: str
    rows: tuple[tuple[str, str, str], ...]  # predicted, observed, failures of inputs


@dataclass(frozen=True)
class TargetView:
    """One kind of failure: sentence first, then table and figures."""

    anchor: str
    kind: str
    name: str
    verdict: Verdict
    sentence: str
    counts: str
    figure: tuple[str, str]  # the deciding one, and what it says
    rows: tuple[ScoreRow, ...]  # best first
    columns: tuple[tuple[str, str], ...]  # the other figures, and what they say
    together: tuple[str, Verdict] | None  # what ours add to all baselines together
    rates: RatesView | None
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
    sealed: str
    gains: Dots | None
    targets: tuple[TargetView, ...]
    distances: tuple[Curves, ...]
    meanings: tuple[tuple[str, bool, str], ...]  # score, whether it is ours, what it says


def agreement_of(findings: Findings, arrays: Mapping[str, Tensor]) -> AgreementView:
    """Every target in the order of the findings, and the adversarial distance curves."""
    agreement = findings.agreement
    opened = _opened(agreement.targets)
    ours = {score.name for target in agreement.targets for score in target.scores if score.ours}
    meanings = agreement.meanings
    return AgreementView(
        verdict=agreement.verdict,
        sentence=agreement.sentence,
        inputs=number(agreement.inputs),
        sealed=_sealed(agreement.sealed) if agreement.sealed else "",
        gains=gains(agreement.targets) if agreement.targets else None,
        targets=tuple(_target(k, t, arrays, k in opened, meanings) for k, t in enumerate(agreement.targets)),
        distances=distance_curves(findings, arrays),
        meanings=tuple((name, name in ours, meanings[name]) for name in sorted(meanings, key=lambda n: n not in ours)),
    )


def _opened(targets: list[TargetAgreement]) -> set[int]:
    """The first target of each kind is shown open; the others wait behind their sentence."""
    first: dict[str, int] = {}
    for k, target in enumerate(targets):
        first.setdefault(target.kind, k)
    return set(first.values())


def _sealed(part: SealedPart) -> str:
    *first, last = part.fixed_before
    fixed = f"{', '.join(first)} and {last}" if first else last
    before = f" {' and '.join(part.observed_before)} had been asked for before, alone." if part.observed_before else ""
    return (
        f"The labels of these inputs were sealed. They were opened once, after {fixed} were fixed "
        f"(SHA-256 {part.digest[:16]}…).{before}"
    )


def _target(
    k: int, target: TargetAgreement, arrays: Mapping[str, Tensor], opened: bool, meanings: Mapping[str, str]
) -> TargetView:
    best = {target.best_ours, target.best_baseline}
    others = [name for name in FIGURES if name != target.decided_by]
    return TargetView(
        anchor=f"target-{k}",
        kind=KINDS[target.kind],
        name=target_name(target),
        verdict=target.verdict,
        sentence=target.sentence,
        counts=f"{number(target.failures)} of {number(target.inputs)} inputs failed ({percent(target.prevalence)})",
        figure=FIGURES[target.decided_by],
        rows=tuple(_row(s, target, others, s.name in best, meanings.get(s.name, "")) for s in by_figure(target)),
        columns=tuple(FIGURES[name] for name in others),
        together=(target.increment.sentence, target.increment.verdict) if target.increment else None,
        rates=_rates(target.calibration) if target.calibration else None,
        ranked=target.decided_by == "spearman",
        deciding=deciding(target),
        roc=roc_curves(k, target, arrays),
        against=against(k, target, arrays),
        open=opened,
    )


def _row(score: ScoreResult, target: TargetAgreement, others: list[str], best: bool, meaning: str) -> ScoreRow:
    return ScoreRow(
        name=score.name,
        ours=score.ours,
        best=best,
        meaning=meaning,
        deciding=str(amount(deciding_figure(score, target))),
        gain=str(amount(score.gain, "signed")) if score.gain else "",
        chance="" if not score.ours else NONE if score.p_holm is None else number(score.p_holm, 2),
        others=tuple(str(amount(getattr(score, name))) for name in others),
    )


def _rates(held: Calibration) -> RatesView:
    return RatesView(
        verdict=held.verdict,
        sentence=held.sentence,
        rows=tuple(
            (percent(b.predicted), str(amount(b.observed, "share")), f"{number(b.failures)} of {number(b.inputs)}")
            for b in held.bins
        ),
    )

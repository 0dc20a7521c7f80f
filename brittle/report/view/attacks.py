"""The attacks' section: what each attack found, whether they can be believed, and perturbations that people meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from brittle.findings import AttackResult, Findings, HealthCheck, PerturbationResult, Verdict
from brittle.report.formatting import amount, norm_name, number, percent, with_unit
from brittle.report.view.headline import distance


@dataclass(frozen=True)
class AttackRow:
    """One attack in words."""

    name: str
    norm: str
    kind: str
    envelope: bool
    epsilon: str
    inputs: str
    success: str
    median: str
    smallest: str
    evaluations: str


@dataclass(frozen=True)
class PanelView:
    """The checks of the attacks in one norm, the worst first."""

    norm: str
    verdict: Verdict
    checks: tuple[HealthCheck, ...]
    passed: str


@dataclass(frozen=True)
class PerturbationRow:
    name: str
    most: str
    failing: str
    median: str


@dataclass(frozen=True)
class AttacksView:
    """`sentence` says what the verdict means, `skipped` why there are no perturbations."""

    verdict: Verdict
    sentence: str
    panels: tuple[PanelView, ...]
    rows: tuple[AttackRow, ...]
    perturbations: tuple[PerturbationRow, ...]
    skipped: str


def attacks_of(findings: Findings) -> AttacksView:
    """Attacks, checks and perturbations in the order of the findings."""
    found = findings.attacks
    images = found.perturbations or any(family.name == "rotation" for family in findings.prediction.families)
    norms = list(dict.fromkeys(check.norm for check in found.health))
    return AttacksView(
        verdict=found.verdict,
        sentence=_sentence(found.health),
        panels=tuple(_panel([check for check in found.health if check.norm == norm]) for norm in norms),
        rows=tuple(_attack(result) for result in found.results),
        perturbations=tuple(_perturbation(result) for result in found.perturbations),
        skipped=""
        if images
        else "Perturbations that people meet, such as JPEG, are for images; these inputs are none.",
    )


def _sentence(health: Sequence[HealthCheck]) -> str:
    failed = list(dict.fromkeys(check.name for check in health if check.verdict == "fail"))
    if not health:
        return "No check of the attacks was run, so that nothing says whether the distances can be believed."
    if failed:
        return (
            f"The attacks cannot be believed: {', '.join(failed)} failed. "
            "The true distances may be smaller than the ones below; mend what failed and audit again."
        )
    warned = sum(check.verdict == "warn" for check in health)
    said = f"{len(health)} checks of the attacks, none failed"
    return f"{said}, {warned} warned." if warned else f"{said}."


def _panel(checks: Sequence[HealthCheck]) -> PanelView:
    order = ("fail", "warn", "pass")
    failed = any(check.verdict == "fail" for check in checks)
    passed = sum(check.verdict == "pass" for check in checks)
    return PanelView(
        norm=norm_name(checks[0].norm),
        verdict="inconclusive" if failed else "pass",
        checks=tuple(sorted(checks, key=lambda check: order.index(check.verdict))),
        passed=f"{passed} of {len(checks)} passed",
    )


def _attack(result: AttackResult) -> AttackRow:
    return AttackRow(
        name=result.name,
        norm=norm_name(result.norm),
        kind={"minimal": "minimal", "fixed": "fixed budget", "envelope": "envelope"}[result.kind],
        envelope=result.kind == "envelope",
        epsilon="" if result.epsilon is None else number(result.epsilon),
        inputs=number(result.inputs),
        success=str(amount(result.success, "share")),
        median="" if result.kind == "fixed" else str(distance(result)),
        smallest="" if result.smallest_share is None else percent(result.smallest_share),
        evaluations=number(result.evaluations),
    )


def _perturbation(result: PerturbationResult) -> PerturbationRow:
    median = result.median_severity.value
    return PerturbationRow(
        name=result.name,
        most=with_unit(result.unit, result.most),
        failing=str(amount(result.failing, "share")),
        median="not reached" if median is None else with_unit(result.unit, median),
    )

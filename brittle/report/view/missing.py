"""What data is missing: regions, examples of the pool, and whether retraining with them helps."""

from __future__ import annotations

from dataclasses import dataclass

from brittle.findings import Findings, RetrainCheck, Verdict
from brittle.report.charts import Dot, Dots
from brittle.report.formatting import amount, number, percent
from brittle.report.view.holes import anchor

MOST_EXAMPLES = 48


@dataclass(frozen=True)
class RegionView:
    title: str
    wanted: str
    share: str
    hole: str
    finding: bool


@dataclass(frozen=True)
class PoolExample:
    picture: str
    name: str
    class_name: str
    gain: str
    hole: str


@dataclass(frozen=True)
class CheckView:
    """Retraining with the suggested examples against random ones."""

    verdict: Verdict
    sentence: str
    facts: tuple[tuple[str, str], ...]
    gains: Dots


@dataclass(frozen=True)
class Missing:
    """The section `What data is missing`."""

    regions: tuple[RegionView, ...]
    examples: tuple[PoolExample, ...]
    more_examples: int
    check: CheckView | None
    note: str


def missing_of(findings: Findings) -> Missing:
    """Suggestions in the order of the findings."""
    suggestions = findings.suggestions
    anchors = {hole.id: anchor(hole.id) for hole in findings.holes}
    link = lambda hole: "" if hole is None else anchors.get(hole, "")  # noqa: E731
    found = {hole.id for hole in findings.holes if hole.status == "finding"}
    return Missing(
        regions=tuple(
            RegionView(
                region.title,
                region.wanted,
                "" if region.share_of_failures is None else percent(region.share_of_failures),
                link(region.hole),
                region.hole in found,
            )
            for region in suggestions.regions
        ),
        examples=tuple(
            PoolExample(f"pool:{e.pool_id}", e.name, e.class_name, number(e.gain, 2), link(e.hole))
            for e in suggestions.examples[:MOST_EXAMPLES]
        ),
        more_examples=max(len(suggestions.examples) - MOST_EXAMPLES, 0),
        check=_check(suggestions.check) if suggestions.check else None,
        note=suggestions.note,
    )


def _check(check: RetrainCheck) -> CheckView:
    clean, robust = amount(check.clean_gain, "signed"), amount(check.robust_gain, "signed")
    rows = (
        Dot("clean accuracy", check.clean_gain.value, check.clean_gain.low, check.clean_gain.high, "series"),
        Dot("accuracy under probes", check.robust_gain.value, check.robust_gain.low, check.robust_gain.high, "series"),
    )
    return CheckView(
        verdict=check.verdict,
        sentence=check.sentence,
        facts=(
            ("Examples added", number(check.added)),
            ("Seeds", number(check.seeds)),
            ("Clean accuracy before", percent(check.base_clean)),
            ("with random additions", percent(check.random_clean)),
            ("with the suggested ones", percent(check.suggested_clean)),
            ("Gain over random, clean", f"{clean} points"),
            ("Gain over random, under probes", f"{robust} points"),
        ),
        gains=Dots(
            rows,
            x_label="gain over random additions, percentage points, 95% interval",
            alt=f"Gain over random additions: clean {clean}, under probes {robust} points",
            reference=0.0,
            reference_label="no gain",
        ),
    )

"""Hole cards: place, direction, size and support of each predicted failure region, and whether it held."""

from __future__ import annotations

from dataclasses import dataclass

from brittle.findings import Findings, Hole, Verdict
from brittle.report.charts import Dot, Dots
from brittle.report.formatting import amount, number, percent

MOST_MEMBERS = 8


@dataclass(frozen=True)
class HoleView:
    """A hole as the page shows it; picture keys name entries of `pictures`."""

    anchor: str
    rank: int
    title: str
    from_class: str
    to_class: str
    from_group: str
    to_group: str
    families: tuple[str, ...]
    exemplar: str
    exemplar_name: str
    members: tuple[tuple[str, str], ...]
    more_members: int
    support: str
    severity: str
    predicted: str
    observed: str
    tested: str
    base_rate: str
    lift: str
    verdict: Verdict | None
    rates: Dots


def holes_of(findings: Findings) -> tuple[HoleView, ...]:
    """The holes in the order of the findings: by predicted failure rate times support."""
    return tuple(_hole(hole, rank) for rank, hole in enumerate(findings.holes, start=1))


def _hole(hole: Hole, rank: int) -> HoleView:
    others = [member for member in hole.members if member != hole.exemplar]
    test = hole.test
    return HoleView(
        anchor=anchor(hole.id),
        rank=rank,
        title=hole.title,
        from_class=hole.from_class,
        to_class=hole.to_class,
        from_group=hole.from_group,
        to_group=hole.to_group,
        families=tuple(hole.families),
        exemplar=f"test:{hole.exemplar}",
        exemplar_name=f"test input {hole.exemplar}",
        members=tuple((f"test:{i}", f"test input {i}") for i in others[:MOST_MEMBERS]),
        more_members=max(len(others) - MOST_MEMBERS, 0),
        support=number(hole.support),
        severity=str(amount(hole.severity)),
        predicted=str(amount(hole.predicted_rate, "share")),
        observed=str(amount(test.observed_rate, "share")) if test else "not tested",
        tested=f"{number(test.failures)} of {number(test.members)} held-out members failed" if test else "",
        base_rate=percent(test.base_rate) if test else "",
        lift=f"{number(test.lift, 2)} ×" if test and test.lift is not None else "",
        verdict=test.verdict if test else None,
        rates=_rates(hole),
    )


def anchor(hole_id: int) -> str:
    """The hole's place on the page."""
    return f"hole-{hole_id}"


def _rates(hole: Hole) -> Dots:
    p, test = hole.predicted_rate, hole.test
    rows = [Dot("predicted", p.value, p.low, p.high, "ours")]
    if test:
        o = test.observed_rate
        rows.append(Dot("observed", o.value, o.low, o.high, "series"))
    observed = f", observed {amount(test.observed_rate, 'share')}" if test else ", not tested"
    return Dots(
        tuple(rows),
        x_label="failure rate at the reference severity, 95% interval",
        alt=f"Failure rate of hole {hole.id}: predicted {amount(p, 'share')}{observed}",
        reference=test.base_rate if test else None,
        reference_label="all inputs",
        limits=(0.0, 1.0),
        percent=True,
    )

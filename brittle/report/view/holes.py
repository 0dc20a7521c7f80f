"""Hole cards: place, direction, size and support of each predicted failure region, and whether it held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from brittle.findings import FALSE_DISCOVERY_RATE, FEWEST_MEMBERS, NOTHING, Estimate, Findings, Hole, HoleTest, Verdict
from brittle.report.charts import Dot, Dots, Role
from brittle.report.formatting import amount, fixed, number, percent

MOST_MEMBERS = 8
WORDS: dict[Verdict, str] = {"pass": "finding", "fail": "refuted", "inconclusive": "not shown"}


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
    beside: tuple[Beside, ...]
    verdict: Verdict | None
    word: str
    finding: bool
    told: str
    rates: Dots


@dataclass(frozen=True)
class Beside:
    """A failure rate that the observed one is held against, and how many times as high that is."""

    name: str
    what: str
    rate: str
    lift: str


def holes_of(findings: Findings) -> tuple[HoleView, ...]:
    """The holes in the order of the findings: by predicted failure rate times support."""
    return tuple(_hole(hole, rank) for rank, hole in enumerate(findings.holes, start=1))


def counted(holes: Sequence[Hole]) -> str:
    """How many holes are findings, and how many are not."""
    found = sum(hole.status == "finding" for hole in holes)
    open_ = len(holes) - found
    return (
        f"{number(found)} finding{'s' * (found != 1)}, "
        f"{number(open_)} untested {'hypothesis' if open_ == 1 else 'hypotheses'}"
    )


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
        severity=str(amount(hole.severity)) if hole.families else "",
        predicted=str(amount(hole.predicted_rate, "share")),
        observed=str(amount(test.observed_rate, "share")) if test else "not tested",
        beside=_beside(test, hole) if test else (),
        verdict=test.verdict if test else None,
        word=WORDS[test.verdict] if test else "not tested",
        finding=hole.status == "finding",
        told=_told(test),
        rates=_rates(hole),
    )


def anchor(hole_id: int) -> str:
    """The hole's place on the page."""
    return f"hole-{hole_id}"


def _beside(test: HoleTest, hole: Hole) -> tuple[Beside, ...]:
    of_all = "the same families over all inputs that are right when clean" if hole.families else "all sealed inputs"
    under = ", under the same families" if hole.families else ""
    rates = (
        ("All inputs", f"failure rate of {of_all}", test.base_rate),
        (
            "Least confident",
            "failure rate of as many of the least confident inputs" + under,
            test.least_confident.value,
        ),
        (
            "Random regions",
            "mean failure rate of random regions of the same size, class and confidence" + under,
            test.random.value,
        ),
    )
    observed = test.observed_rate.value
    return tuple(
        Beside(name, what, percent(rate), f"{fixed(observed / rate, 1)} ×" if observed is not None and rate else "")
        for name, what, rate in rates
        if rate is not None
    )


def _told(test: HoleTest | None) -> str:
    """What the test says, in two sentences."""
    if test is None:
        return "Not held against failures."
    found = f"{number(test.failures)} of {number(test.members)} held-out members failed"
    if test.predicted_rate is not None:
        found += f", {percent(test.predicted_rate, 0)} were predicted to"
    return f"{found}. {_why(test)}"


def _why(test: HoleTest) -> str:
    """Why the verdict is what it is."""
    if test.verdict == "fail":
        return "They fail less often than inputs at large: the prediction is refuted."
    if test.members < FEWEST_MEMBERS:
        return f"Fewer than {FEWEST_MEMBERS} lie in it, too few to tell."
    if test.corrected is None or test.p_value is None:
        return "Whatever had happened, inputs of their class and confidence are too few or too much alike to tell."
    chance = f"in {percent(test.p_value)} of draws (corrected for all holes: {percent(test.corrected)})"
    if test.verdict == "pass":
        return f"Random regions of the same class and confidence fail as often {chance}."
    if test.corrected > FALSE_DISCOVERY_RATE:
        return f"Random regions of the same class and confidence fail as often {chance}: that may be chance."
    return "The interval of the observed rate reaches down to the rate of all inputs."


def _rates(hole: Hole) -> Dots:
    p, test = hole.predicted_rate, hole.test
    rows = [Dot("predicted", p.value, p.low, p.high, "ours")]
    if test:
        rows += [
            _dot("observed", test.observed_rate, "series"),
            *(_dot(name, rate) for name, rate in _rivals(test).items() if rate != NOTHING),
        ]
    observed = f", observed {amount(test.observed_rate, 'share')}" if test else ", not tested"
    return Dots(
        tuple(rows),
        x_label=f"failure rate {'at the reference severity' if hole.families else 'as they are'}, 95% interval",
        alt=f"Failure rate of hole {hole.id}: predicted {amount(p, 'share')}{observed}",
        reference=test.base_rate if test else None,
        reference_label="all inputs",
        limits=(0.0, 1.0),
        percent=True,
    )


def _rivals(test: HoleTest) -> dict[str, Estimate]:
    return {"random regions": test.random, "least confident": test.least_confident}


def _dot(label: str, rate: Estimate, role: Role = "other") -> Dot:
    return Dot(label, rate.value, rate.low, rate.high, role)

"""Why there: the worst flips, and the training examples whose contribution leaves and arrives."""

from __future__ import annotations

from dataclasses import dataclass

from brittle.findings import ExampleShift, Findings, Flip
from brittle.report.formatting import number, signed, with_unit


@dataclass(frozen=True)
class ExampleView:
    """A training example: its contribution before and after the flip; `share` of the flip's largest change."""

    picture: str
    name: str
    class_name: str
    before: str
    after: str
    change: str
    share: float


@dataclass(frozen=True)
class FlipView:
    """One flip, with the keys of its pictures."""

    query: str
    how: str
    size: str
    true_class: str
    before_class: str
    after_class: str
    margin_before: str
    margin_after: str
    before: str
    after: str
    account: str
    note: str
    leaving: tuple[ExampleView, ...]
    arriving: tuple[ExampleView, ...]


def flips_of(findings: Findings) -> tuple[FlipView, ...]:
    """The flips in the order of the findings."""
    return tuple(_flip(flip) for flip in findings.prediction.flips)


def _flip(flip: Flip) -> FlipView:
    largest = max((abs(e.change) for e in [*flip.leaving, *flip.arriving]), default=0.0) or 1.0
    return FlipView(
        query=number(flip.query),
        how=flip.how,
        size=with_unit(flip.unit, flip.size),
        true_class=flip.true_class,
        before_class=flip.before_class,
        after_class=flip.after_class,
        margin_before=signed(flip.margin_before, 2),
        margin_after=signed(flip.margin_after, 2),
        before=flip.picture_before,
        after=flip.picture_after,
        account=flip.account,
        note=_note(flip),
        leaving=tuple(_example(e, largest) for e in flip.leaving),
        arriving=tuple(_example(e, largest) for e in flip.arriving),
    )


def _example(example: ExampleShift, largest: float) -> ExampleView:
    return ExampleView(
        picture=f"train:{example.id}",
        name=example.name,
        class_name=example.class_name,
        before=signed(example.before),
        after=signed(example.after),
        change=signed(example.change),
        share=abs(example.change) / largest,
    )


def _note(flip: Flip) -> str:
    """What to make of arrivals that are not of the class that wins."""
    if any(example.class_name == flip.after_class for example in flip.arriving):
        return ""
    return (
        f"No example of {flip.after_class} speaks louder than before: support and opposition both fade here, and the "
        "support fades faster."
    )

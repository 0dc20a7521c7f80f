"""Where it will fail: the shift map as matrices, the probe families as a table, the flows between classes.

A cell of the map is the change of one class's mass, in logits towards the predicted class, extrapolated to the
family's reference severity. Below 0 it works against the prediction: of the predicted class itself support leaves,
of another class mass arrives that speaks for the rival. Above 0 it works for the prediction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from brittle.findings import FamilyPrediction, Findings
from brittle.report.charts import Curves, Dot, Dots, Heat, Scale, Series
from brittle.report.curves import Array, reached, read
from brittle.report.formatting import amount, fixed, number, percent, with_unit
from brittle.report.view.headline import observed_share

MOST_CLASSES = 20
"""A map of more classes shows those whose mass moves most."""
NAMED_CURVES = 5
WORST_CLASSES = 12


@dataclass(frozen=True)
class ShiftView:
    """One matrix a family on one colour scale; `missing` says why there is none."""

    panels: tuple[Heat, ...] = ()
    scale: Scale | None = None
    example: str = ""
    note: str = ""
    missing: str = ""


@dataclass(frozen=True)
class FamilyRow:
    """A probe family in words."""

    name: str
    reference: str
    predicted: str
    share: float
    observed: str
    median: str
    looked_at: str


@dataclass(frozen=True)
class FlowRow:
    family: str
    from_class: str
    to_class: str
    queries: str
    leaving: str
    arriving: str


@dataclass(frozen=True)
class Failing:
    """The section `Where it will fail` without its holes."""

    shift: ShiftView
    families: tuple[FamilyRow, ...]
    reach: Curves | None
    flows: tuple[FlowRow, ...]
    classes: Dots
    class_rows: tuple[tuple[str, str, str], ...]


def failing_of(findings: Findings, arrays: Mapping[str, Tensor]) -> Failing:
    """The shift map, the families, the flows and the accuracy class by class."""
    return Failing(
        shift=_shift(findings, read(arrays, "shift.rate"), read(arrays, "shift.queries")),
        families=tuple(_family(findings, family) for family in findings.prediction.families),
        reach=_reach(findings, arrays),
        flows=tuple(
            FlowRow(f.family, f.from_class, f.to_class, number(f.queries), number(f.leaving), number(f.arriving))
            for f in findings.prediction.flows
        ),
        classes=_classes(findings),
        class_rows=tuple(
            (c.class_name, number(c.inputs), str(amount(c.accuracy, "share"))) for c in findings.clean.per_class
        ),
    )


def _shift(findings: Findings, rate: Array | None, queries: Array | None) -> ShiftView:
    """rate: (F, C, C), queries: (C,)."""
    families, names = findings.prediction.families, findings.subject.class_names
    expected = (len(families), len(names), len(names))
    if rate is None or rate.shape != expected or not np.isfinite(rate).any():
        return ShiftView(missing="The shift map was not kept in this run, so its picture is left out.")
    shown = _most_moved(rate)
    cells = np.abs(rate[np.isfinite(rate)])
    limit = float(np.quantile(cells, 0.98)) or float(cells.max()) or 1.0
    counts = [f" ({queries[c]:.0f})" if queries is not None else "" for c in range(len(names))]
    panels = tuple(
        Heat(
            title=_at_reference(family),
            rows=tuple(names[c] + counts[c] for c in shown),
            columns=tuple(names[c] for c in shown),
            values=tuple(map(tuple, rate[f][np.ix_(shown, shown)].tolist())),
            limit=limit,
            alt=f"Shift map under {family.name}: {_strongest(rate[f : f + 1], [family], names)}",
        )
        for f, family in enumerate(families)
    )
    left_out = len(names) - len(shown)
    return ShiftView(
        panels,
        Scale(
            limit,
            "change of mass, logits towards the prediction",
            "against the prediction",
            "for the prediction",
            f"Colour scale from {fixed(-limit)} to {fixed(limit)} logits: orange against, purple for the prediction",
        ),
        example=_strongest(rate, families, names),
        note=f"The {left_out} classes whose mass moves least are not drawn." if left_out else "",
    )


def _most_moved(rate: Array) -> list[int]:
    """The classes with the largest changes in their rows or columns, in class order."""
    size = np.nan_to_num(np.abs(rate)).max(0)
    moved = np.maximum(size.max(0), size.max(1))
    return sorted(np.argsort(-moved, kind="stable")[:MOST_CLASSES].tolist())


def _strongest(rate: Array, families: list[FamilyPrediction], names: list[str]) -> str:
    """The cell that works most against its prediction, as a sentence."""
    if not np.isfinite(rate).any():
        return "no query"
    f, a, g = np.unravel_index(np.nanargmin(rate), rate.shape)
    if rate[f, a, g] >= 0:
        return "no class works against a prediction"
    where, lost = f"under {_at_reference(families[f])}", f"{fixed(-rate[f, a, g])} logits"
    if a == g:
        return f"{where}, {lost} of support from their own class leave the predictions of “{names[a]}”"
    return f"{where}, training examples of “{names[g]}” arrive with {lost} against the predictions of “{names[a]}”"


def _at_reference(family: FamilyPrediction) -> str:
    return f"{family.name} at {with_unit(family.unit, family.reference)}"


def _family(findings: Findings, family: FamilyPrediction) -> FamilyRow:
    never = family.median_severity is None or not np.isfinite(family.median_severity)
    return FamilyRow(
        name=family.name,
        reference=with_unit(family.unit, family.reference),
        predicted=percent(family.predicted_failing),
        share=family.predicted_failing,
        observed=percent(observed_share(findings, family.name).value),
        median="not reached" if never else with_unit(family.unit, family.median_severity),
        looked_at=with_unit(family.unit, *family.map_severities),
    )


def _reach(findings: Findings, arrays: Mapping[str, Tensor]) -> Curves | None:
    """Share of queries predicted to fail against severity, the worst families by name."""
    at = np.linspace(0, 1.5, 61)
    ordered = sorted(findings.prediction.families, key=lambda f: -f.predicted_failing)
    series: list[Series] = []
    for family in ordered:
        severity = read(arrays, f"severity.{family.name}")
        if severity is None:
            continue
        named = len(series) < NAMED_CURVES
        label = family.name if named else "other families" if len(series) == NAMED_CURVES else ""
        share = reached(severity, at * family.reference)
        series.append(Series(label, tuple(at.tolist()), tuple(share.tolist()), "series" if named else "other"))
    if not series:
        return None
    return Curves(
        tuple(series),
        x_label="severity, as a share of the family's reference",
        y_label="share of queries predicted to fail",
        alt=f"Share of queries predicted to fail against severity; worst is {series[0].label}",
        guide=1.0,
        guide_label="reference",
    )


def _classes(findings: Findings) -> Dots:
    worst = sorted(findings.clean.per_class, key=lambda c: (c.accuracy.value is None, c.accuracy.value))
    shown = worst[:WORST_CLASSES]
    return Dots(
        tuple(Dot(c.class_name, c.accuracy.value, c.accuracy.low, c.accuracy.high, "series") for c in shown),
        x_label="clean accuracy, 95% interval",
        alt="Clean accuracy class by class, worst first",
        reference=findings.clean.accuracy.value,
        reference_label="all classes",
        percent=True,
    )

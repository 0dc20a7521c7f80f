"""Dots with whiskers, curves, clouds of points, and amounts that add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from brittle.report.charts import Curves, Dot, Dots, Points, Series, Waterfall
from brittle.report.figures.style import (
    BLUE,
    FITS,
    GREY,
    INK,
    LINES,
    MARKS,
    RED,
    SQUARE,
    WIDTH,
    canvas,
    guide,
    in_percent,
    plain,
    wrapped,
)
from brittle.report.formatting import fixed, signed


def dots(chart: Dots) -> Figure:
    figure, axes = canvas(WIDTH, 0.75 + 0.27 * len(chart.rows) + (0.25 if _named_roles(chart.rows) else 0))
    for y, row in enumerate(chart.rows):
        marker, face, edge, _ = MARKS[row.role]
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [y, y], color=edge, lw=1.6, solid_capstyle="butt")
        if row.value is not None:
            axes.plot(row.value, y, marker, mfc=face, mec=edge, mew=1.3, ms=6.5, ls="none")
        else:
            axes.annotate("not estimated", (0, y), (6, 0), ("axes fraction", "data"), "offset points", va="center")
    axes.set_yticks(range(len(chart.rows)), [plain(row.label, 28) for row in chart.rows])
    axes.set_ylim(len(chart.rows) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    if len(chart.x_label) <= FITS:
        axes.set_xlabel(plain(chart.x_label, FITS))
    else:  # too long for the axis: below the whole figure
        figure.supxlabel(wrapped(chart.x_label), size=9.5)
    if chart.limits:
        span = chart.limits[1] - chart.limits[0]
        axes.set_xlim(chart.limits[0] - 0.02 * span, chart.limits[1] + 0.02 * span)
    if chart.reference is not None:
        guide(axes, chart.reference, chart.reference_label)
    if chart.percent:
        in_percent(axes.xaxis)
    _role_legend(figure, axes, chart.rows)
    return figure


def curves(chart: Curves) -> Figure:
    figure, axes = canvas(*_size(chart))
    for series in reversed(chart.series):  # the first lies on top
        axes.plot(series.x, series.y, drawstyle="steps-post" if chart.steps else "default", **_line(series, chart))
    if chart.guide == "diagonal":
        axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":", label=chart.guide_label, zorder=1)
        axes.set_xlim(-0.01, 1.01)
    else:
        axes.set_xlim(left=0, right=max(max(s.x) for s in chart.series) * 1.02 or 1)
        if chart.guide is not None:
            guide(axes, float(chart.guide), chart.guide_label)
    axes.set_ylim(-0.015, 1.015)
    in_percent(axes.yaxis)
    if chart.percent_x:
        in_percent(axes.xaxis)
    axes.grid()
    axes.set_xlabel(wrapped(chart.x_label))
    axes.set_ylabel(wrapped(chart.y_label, 36))
    _series_legend(figure, axes, chart)
    return figure


def points(chart: Points) -> Figure:
    figure, axes = canvas(SQUARE, 3.0)
    axes.plot(chart.x, chart.y, "o", ms=4.5, mfc=BLUE, mec="white", mew=0.4, alpha=0.75)
    if chart.diagonal:
        ends = [min(*chart.x, *chart.y), max(*chart.x, *chart.y)]
        axes.plot(ends, ends, color=GREY, lw=1, ls=":", zorder=1, label="equal")
        figure.legend(loc="outside upper right")
    axes.grid()
    axes.set_xlabel(wrapped(chart.x_label, 44))
    axes.set_ylabel(wrapped(chart.y_label, 44))
    return figure


def waterfall(chart: Waterfall) -> Figure:
    amounts = np.array(chart.amounts)
    ends = np.cumsum(amounts)
    starts = ends - amounts
    total = float(ends[-1])
    figure, axes = canvas(WIDTH, 0.8 + 0.32 * (len(amounts) + 1))
    names = [*chart.names, chart.total_name]
    for y, (start, amount) in enumerate(zip([*starts, 0.0], [*amounts, total], strict=True)):
        last = y == len(amounts)
        axes.barh(y, amount, left=start, height=0.62, color=INK if last else BLUE if amount >= 0 else RED)
        if not last:
            axes.plot([start + amount] * 2, [y - 0.31, y + 1.31], color=GREY, lw=0.8)
        text = fixed(amount) if last else signed(amount, 2)
        axes.annotate(text, (max(start, start + amount), y), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(names)), [plain(name, 20) for name in names])
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.axvline(0, color=GREY, lw=0.8, zorder=0)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlabel(chart.x_label)
    return figure


def _named_roles(rows: Sequence[Dot]) -> list[str]:
    """The roles that a legend must name, in the order of `MARKS`."""
    found = [role for role in MARKS if MARKS[role][3] and any(row.role == role for row in rows)]
    return found if any(row.role != "ours" for row in rows if row.role in found) else []


def _role_legend(figure: Figure, axes: Axes, rows: Sequence[Dot]) -> None:
    roles = _named_roles(rows)
    for role in roles:
        marker, face, edge, name = MARKS[role]
        axes.plot([], [], marker, mfc=face, mec=edge, mew=1.3, ms=6.5, ls="none", label=name)
    if roles:
        figure.legend(loc="outside upper right", ncols=len(roles), handletextpad=0.2, columnspacing=1.2)


def _size(chart: Curves) -> tuple[float, float]:
    """Inches; a legend below takes its own room."""
    named = sum(bool(series.label) for series in chart.series)
    legend = 0.2 * ((named + 2) // 2) if named > 1 else 0.0
    return (SQUARE, SQUARE + legend) if chart.square else (WIDTH, 2.45 + legend)


def _line(series: Series, chart: Curves) -> dict[str, Any]:
    label = plain(series.label, 34) or None
    if series.role == "series":
        order = [s for s in chart.series if s.role == "series"].index(series)
        colour, dashes = LINES[order % len(LINES)]
        return {"color": colour, "ls": dashes, "lw": 1.8, "label": label, "zorder": 3}
    if series.role == "ours":
        return {"color": BLUE, "ls": "-", "lw": 2.2, "label": label, "zorder": 4}
    if series.role == "baseline":
        return {"color": RED, "ls": "--", "lw": 1.8, "label": label, "zorder": 3}
    return {"color": "#b9bdc4", "ls": "-", "lw": 1.0, "label": label, "zorder": 2}


def _series_legend(figure: Figure, axes: Axes, chart: Curves) -> None:
    """Below the figure, in the order of the series."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) < 2:
        return
    order = [plain(s.label, 34) for s in chart.series] + [chart.guide_label]
    pairs = sorted(zip(labels, handles, strict=True), key=lambda pair: order.index(pair[0]))
    columns = 2 if max(map(len, labels)) > 14 else 3
    figure.legend([h for _, h in pairs], [label for label, _ in pairs], loc="outside lower center", ncols=columns)

"""How every figure looks: colours, marks, text that cannot break a figure, and room for all of it.

Colours: M. Okabe, K. Ito, Color Universal Design (2008), https://jfly.uni-koeln.de/color/. No colour speaks alone:
shapes, dashes and signs say the same.
"""

from __future__ import annotations

import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PINK, INK, GREY, FAINT = "#56B4E9", "#CC79A7", "#23272f", "#8a8f98", "#e3e5e8"

STYLE: Any = {  # the names of settings differ from one matplotlib to the next
    "svg.fonttype": "none",
    "svg.hashsalt": "brittle",
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 9.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "hatch.linewidth": 0.5,
}
MARKS = {
    "ours": ("D", BLUE, BLUE, "ours"),
    "baseline": ("o", "white", "#5b616b", "baseline"),
    "other": ("o", GREY, GREY, ""),
    "series": ("o", INK, INK, ""),
    "pass": ("o", GREEN, GREEN, "pass"),
    "fail": ("X", RED, RED, "fail"),
    "inconclusive": ("^", "white", "#8a6100", "inconclusive"),
}
"""Role -> marker, face, edge, name in the legend."""

LINES = ((BLUE, "-"), (RED, "--"), (GREEN, "-."), (PINK, (0, (1, 1.2))), (ORANGE, (0, (5, 1, 1, 1, 1, 1))), (SKY, "-"))
PIXELS_PER_INCH = 96
WIDTH, SQUARE = 4.7, 3.7
"""Inches; drawn at this size, and smaller on a telephone."""

FITS = 36
"""Characters of a label that fit below the axis itself."""


def plain(text: str, most: int) -> str:
    """A name as one short line that neither XML nor mathematics mode can trip over."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    short = line if len(line) <= most else line[: most - 1] + "…"
    return short.replace("$", r"\$")


def wrapped(text: str, width: int = 60) -> str:
    """A label in lines short enough for its axis."""
    return "\n".join(textwrap.wrap(plain(text, 3 * width), width))


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of inches `width` x `height` with one set of axes, laid out so that nothing is cut off."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator(6))
    return figure, axes


def in_percent(axis: Axis) -> None:
    """Shares written as percentages."""
    axis.set_major_formatter(lambda value, _: f"{round(100 * value, 6):g}%")


def guide(axes: Axes, x: float, label: str) -> None:
    """A named vertical line."""
    axes.axvline(x, color=INK, lw=1, ls=(0, (4, 2)), zorder=1)
    axes.annotate(label, (x, 1), (0, 2), ("data", "axes fraction"), "offset points", ha="center", va="bottom", size=8.5)

"""The shift map: one matrix a family, and the colour scale that all of them share.

The diverging colours are ColorBrewer's PuOr, C. Brewer, M. Harrower, 2002, https://colorbrewer2.org.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from brittle.report.charts import Heat, Scale
from brittle.report.figures.style import INK, WIDTH, canvas, plain
from brittle.report.formatting import signed


def heat(chart: Heat) -> Figure:
    values = np.ma.masked_invalid(np.array(chart.values))  # shape: (A, G)
    rows, columns = values.shape
    side = float(np.clip(0.24 * max(rows, columns), 1.5, 4.6))
    figure, axes = canvas(side + 1.3, side + 1.05)
    if values.mask.any():
        axes.patch.set(facecolor="#f1f1f1", hatch="/////", edgecolor="#c9ccd1")
    axes.pcolormesh(values, cmap="PuOr", vmin=-chart.limit, vmax=chart.limit, edgecolor="white", linewidth=0.6)
    _mark_strong(axes, values, chart.limit)
    for own in range(min(rows, columns)):
        axes.add_patch(Rectangle((own, own), 1, 1, fill=False, edgecolor=INK, linewidth=1.1))
    axes.set_aspect("equal")
    axes.set_ylim(rows, 0)
    axes.set_xticks(
        np.arange(columns) + 0.5,
        [plain(name, 12) for name in chart.columns],
        rotation=90 if max(map(len, chart.columns)) > 2 else 0,
    )
    axes.set_yticks(np.arange(rows) + 0.5, [plain(name, 18) for name in chart.rows])
    axes.tick_params(length=0, labelsize=8.5)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("class of the training examples")
    axes.set_ylabel("predicted class")
    return figure


def scale(chart: Scale) -> Figure:
    figure, axes = canvas(WIDTH, 0.85)
    colours = ScalarMappable(Normalize(-chart.limit, chart.limit), "PuOr")
    bar = figure.colorbar(colours, cax=axes, orientation="horizontal", extend="both")
    bar.outline.set_visible(False)
    bar.set_label(chart.label)
    ticks = np.array([-1, -0.5, 0, 0.5, 1]) * chart.limit
    bar.set_ticks(ticks.tolist(), labels=[signed(tick) if tick else "0" for tick in ticks.tolist()])
    for x, text, side in ((0.0, f"← {chart.low}", "left"), (1.0, f"{chart.high} →", "right")):
        axes.annotate(text, (x, 1), (0, 3), "axes fraction", "offset points", ha=side, va="bottom", weight="bold")
    return figure


def _mark_strong(axes: Axes, values: Any, limit: float) -> None:
    """A sign on cells of at least half the scale, so that no colour speaks alone. values: (A, G)."""
    for a, g in np.argwhere(np.ma.filled(abs(values) >= limit / 2, False)):
        value = values[a, g]
        colour, sign = "white" if abs(value) > 0.6 * limit else INK, "+" if value > 0 else "−"
        axes.text(g + 0.5, a + 0.5, sign, ha="center", va="center", color=colour, weight="bold", size=9)

"""Charts drawn as SVG, the only place where matplotlib is used.

Figures are made through the object-oriented API, without pyplot, and are equal bit for bit for equal charts.
Their text stays text, in the reader's own fonts. They enter the page as images in data URIs: whatever a class
name holds, nothing in an image runs.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from brittle.report.charts import Chart, Curves, Dots, Heat, Points, Scale, Waterfall
from brittle.report.figures.maps import heat, scale
from brittle.report.figures.plots import curves, dots, points, waterfall
from brittle.report.figures.style import PIXELS_PER_INCH, STYLE

__all__ = ["Drawing", "draw", "paint"]

PAINTERS: dict[type, Callable[[Any], Figure]] = {
    Dots: dots,
    Curves: curves,
    Points: points,
    Heat: heat,
    Scale: scale,
    Waterfall: waterfall,
}


@dataclass(frozen=True)
class Drawing:
    """A figure ready for an `img`: its data URI, what it shows in words, its size in CSS pixels."""

    uri: str
    alt: str
    width: int
    height: int


def draw(chart: Chart) -> Drawing:
    """Draw one chart as an SVG image in a data URI."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's fonts draw it, not ours
        figure = paint(chart)
        with matplotlib.rc_context(STYLE):
            FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    width, height = figure.get_size_inches() * PIXELS_PER_INCH
    uri = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Drawing(uri, chart.alt, round(width), round(height))


def paint(chart: Chart) -> Figure:
    """The matplotlib figure of a chart, as large as its text needs in the fonts at hand."""
    with matplotlib.rc_context(STYLE):
        figure = PAINTERS[type(chart)](chart)
        for _ in range(3):
            if not _grown(figure):
                break
    return figure


def _grown(figure: Figure) -> bool:
    """Enlarge a figure whose text sticks out; a label is centred on its axes, so it gives way by half of the growth."""
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    wider = max(-box.x0, 0.0) + max(box.x1 - width, 0.0)
    taller = max(-box.y0, 0.0) + max(box.y1 - height, 0.0)
    if max(wider, taller) <= 0.005:
        return False
    figure.set_size_inches(width + 2 * wider, height + 2 * taller)
    return True

"""What each figure shows, as plain data: the view makes these, `figures` draws them, tests look at them.

Every chart carries its own words: axis labels with units, and `alt`, the figure in one sentence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["ours", "baseline", "other", "series", "pass", "fail", "inconclusive"]
"""How a mark is drawn: colour and shape say the same thing. `series` takes the next colour."""


@dataclass(frozen=True)
class Dot:
    """One estimated value with its interval."""

    label: str
    value: float | None
    low: float | None
    high: float | None
    role: Role = "other"


@dataclass(frozen=True)
class Dots:
    """Dot-and-whisker rows against one axis, with a named reference value."""

    rows: tuple[Dot, ...]
    x_label: str
    alt: str
    reference: float | None = None
    reference_label: str = ""
    limits: tuple[float, float] | None = None
    percent: bool = False


@dataclass(frozen=True)
class Series:
    """One curve."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    role: Role = "other"


@dataclass(frozen=True)
class Curves:
    """Several curves over one axis; `guide` draws the diagonal or a vertical line at a named x."""

    series: tuple[Series, ...]
    x_label: str
    y_label: str
    alt: str
    guide: Literal["diagonal"] | float | None = None
    guide_label: str = ""
    percent_x: bool = False
    square: bool = False
    steps: bool = False


@dataclass(frozen=True)
class Points:
    """A cloud of (x, y), with the diagonal where both axes measure the same thing."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    x_label: str
    y_label: str
    alt: str
    diagonal: bool = False


@dataclass(frozen=True)
class Heat:
    """Signed changes: row a is a predicted class, column g a class of training examples, in the same order."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    limit: float
    alt: str


@dataclass(frozen=True)
class Scale:
    """The colour scale that all heat maps of a page share."""

    limit: float
    label: str
    low: str
    high: str
    alt: str


@dataclass(frozen=True)
class Waterfall:
    """Signed amounts that add up to a total."""

    names: tuple[str, ...]
    amounts: tuple[float, ...]
    total_name: str
    x_label: str
    alt: str


Chart = Dots | Curves | Points | Heat | Scale | Waterfall

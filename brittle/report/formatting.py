"""Numbers as a reader wants them: few digits, true minus signs, intervals beside what was estimated.

The interval's width decides the digits: it is shown with two of them, and so is the value.

    >>> from brittle.findings import Estimate
    >>> str(amount(Estimate(value=0.9123, low=0.8811, high=0.9444)))
    '0.912 [0.881, 0.944]'
    >>> str(amount(Estimate(value=0.588, low=0.423, high=0.754), "share"))
    '59% [42, 75]'
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from brittle.findings import Estimate

NONE = "–"
"""Stands where nothing could be estimated."""

NORMS = {"l2": "L2", "linf": "L∞"}

Style = Literal["plain", "share", "signed"]


@dataclass(frozen=True)
class Amount:
    """One number, its interval where it was estimated, and a label where several stand together."""

    value: str
    interval: str = ""
    label: str = ""

    def __str__(self) -> str:
        return f"{self.value} {self.interval}".rstrip()


def amount(estimate: Estimate, style: Style = "plain", label: str = "") -> Amount:
    """An estimate with the digits that its interval leaves sensible."""
    low, high = estimate.low, estimate.high
    if estimate.value is None or low is None or high is None:
        text = {"plain": number, "share": percent, "signed": signed}[style](estimate.value)
        return Amount(text, label=label)
    scale = 100 if style == "share" else 1
    decimals = _decimals(scale * (high - low), most=1 if style == "share" else 6)
    as_text = {"plain": fixed, "share": percent, "signed": signed}[style]
    ends = (as_text(end, decimals).removesuffix("%") for end in (low, high))
    return Amount(as_text(estimate.value, decimals), f"[{', '.join(ends)}]", label)


def number(value: float | None, digits: int = 3) -> str:
    """`value` with `digits` significant digits and thousands separated; `NONE` for None and NaN.

    >>> number(1234567), number(0.000731), number(-2.5), number(None)
    ('1,234,567', '0.000731', '−2.5', '–')
    >>> number(120.3), number(10.5, 2), number(99.96)
    ('120', '10', '100')
    """
    if value is None or not math.isfinite(value):
        return _not_finite(value)
    if value and not 1e-4 <= abs(value) < 1e9:
        return _minus(f"{value:.{digits - 1}e}")
    if float(value).is_integer() or abs(value) >= 10**digits:
        return _minus(f"{value:,.0f}")
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    text = f"{value:,.{decimals}f}"
    return _minus(text.rstrip("0").rstrip(".") if "." in text else text)


def fixed(value: float | None, decimals: int = 2) -> str:
    """`value` with a fixed number of decimals.

    >>> fixed(0.9), fixed(-0.128, 1), fixed(-0.001)
    ('0.90', '−0.1', '0.00')
    """
    if value is None or not math.isfinite(value):
        return _not_finite(value)
    return _minus(f"{value:,.{decimals}f}")


def signed(value: float | None, decimals: int = 3) -> str:
    """`value` with its sign always shown, for changes and gains.

    >>> signed(0.021), signed(-0.021), signed(0.0001)
    ('+0.021', '−0.021', '0.000')
    """
    text = fixed(value, decimals)
    return f"+{text}" if value is not None and value > 0 and text.strip("0.,") else text


def percent(value: float | None, decimals: int = 1) -> str:
    """A share as a percentage.

    >>> percent(0.9725), percent(1.0)
    ('97.2%', '100%')
    """
    if value is None or not math.isfinite(value):
        return _not_finite(value)
    return f"{100 * value:.0f}%" if value in (0, 1) else _minus(f"{100 * value:.{decimals}f}%")


def with_unit(unit: str, *values: float | None) -> str:
    """Severities or distances with their unit.

    >>> with_unit("share of the range", 0.35), with_unit("degrees", 5.0, 20.0), with_unit("L2", 0.74)
    ('35% of the range', '5 and 20°', '0.74 in L2')
    """
    scale = 100 if unit.startswith("share of ") else 1
    text = " and ".join(number(None if value is None else scale * value) for value in values)
    if scale == 100:
        return f"{text}% {unit.removeprefix('share ')}"
    if unit == "degrees":
        return f"{text}°"
    if norm_name(unit) in NORMS.values():
        return f"{text} in {norm_name(unit)}"
    return f"{text} {unit.removesuffix('s') if text == '1' else unit}".rstrip()


def duration(seconds: float) -> str:
    """A time span in the two largest units.

    >>> duration(7.24), duration(74), duration(3905)
    ('7.2 s', '1 min 14 s', '1 h 5 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def norm_name(norm: str) -> str:
    """L2 and L∞ as readers know them."""
    return NORMS.get(norm.lower(), norm)


def _decimals(width: float, most: int) -> int:
    """Decimals that show two digits of an interval's width."""
    if not (math.isfinite(width) and width > 0):
        return min(2, most)
    return min(max(1 - math.floor(math.log10(width)), 0), most)


def _not_finite(value: float | None) -> str:
    if value is None or math.isnan(value):
        return NONE
    return "∞" if value > 0 else "−∞"


def _minus(text: str) -> str:
    """A true minus sign, and none before a number that was rounded to zero."""
    return text.replace("-", "−") if text.strip("-0.,%") else text.replace("-", "")

"""What figures are held against: bars at most, and bars at least."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Bars = Mapping[str, float]


def shown(at_most: Bars, at_least: Bars) -> dict[str, str]:
    """The bars for a table, by key."""
    return {key: f"<= {bar:g}" for key, bar in at_most.items()} | {key: f">= {bar:g}" for key, bar in at_least.items()}


def missed(found: Mapping[str, Any], at_most: Bars, at_least: Bars) -> list[str]:
    """The bars that are missed."""
    high = [f"{key} {found[key]:.3f} > {bar}" for key, bar in at_most.items() if not found[key] <= bar]
    return high + [f"{key} {found[key]:.4f} < {bar}" for key, bar in at_least.items() if not found[key] >= bar]

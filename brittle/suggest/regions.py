"""Regions to collect data for: one sentence for each hole, in the words of its probe families."""

from __future__ import annotations

from collections.abc import Sequence

from brittle.findings import Hole, RegionSuggestion
from brittle.probes import Family

WANTED = {
    "brightness": "brighter or darker by {size}",
    "contrast": "paler by {size}",
    "noise": "noisy, by {size}",
    "blur": "out of focus by {size}",
    "rotation": "turned by {size}",
    "translation": "off centre by {size}",
    "occlusion": "partly covered, over {size}",
    "random direction": "varied at random by {size}",
    "margin gradient": "between the two classes, by {size}",
}
"""How an example looks that a family's hole lacks; {size} is a severity with its unit."""


def regions(holes: Sequence[Hole], families: Sequence[Family], failures: int | None = None) -> list[RegionSuggestion]:
    """What kind of example each hole lacks, in one sentence; holes that failed their test are left out.

    Args:
        families: give severities their unit.
        failures: observed failures of all held-out inputs, of which each tested hole holds a share.
    """
    by_name = {family.name: family for family in families}
    return [
        RegionSuggestion(
            hole=hole.id,
            title=hole.title,
            wanted=_wanted(hole, by_name),
            share_of_failures=hole.test.failures / failures if hole.test and failures else None,
        )
        for hole in holes
        if hole.test is None or hole.test.verdict != "fail"
    ]


def _wanted(hole: Hole, families: dict[str, Family]) -> str:
    kinds = [_kind(name, families, hole.severity.value) for name in hole.families[:2]]
    looks = " or ".join(kinds) if kinds else "like its members"
    return (
        f"Collect examples of {hole.from_class} {looks}, close to test input {hole.exemplar}: "
        f"there the model drifts to {hole.to_class}."
    )


def _kind(name: str, families: dict[str, Family], share: float | None) -> str:
    family = families.get(name)
    if family is None or share is None or name not in WANTED:
        return f"under {name}"
    return WANTED[name].format(size=_size(share * family.reference, family.unit))


def _size(severity: float, unit: str) -> str:
    if unit.startswith("share "):
        return f"about {100 * severity:.0f}% {unit.removeprefix('share ')}"
    return f"about {severity:.2g} in L2" if unit == "L2" else f"about {severity:.2g} {unit}"

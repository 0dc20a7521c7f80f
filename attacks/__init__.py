"""Attacks: the nearest input that the model gets wrong, found in several ways and verified.

`suite.run` runs them all, `envelope.envelope` is the nearest of all; `seek_holes` is ours and follows the mass map.
Each attack is a function of a `Problem` and returns `AttackRows`; `reach` predicts how far the nearest input is without
finding it; `HoleSeekingAttack` is ours for foolbox's models.
"""

from typing import Any

from brittle.attacks.apgd import auto_pgd
from brittle.attacks.apgd_targets import auto_pgd_targets
from brittle.attacks.bisection import auto_pgd_minimal
from brittle.attacks.ddn import ddn
from brittle.attacks.fab import fab
from brittle.attacks.fmn import fmn
from brittle.attacks.foolbox_suite import pgd
from brittle.attacks.hole_seeking import seek_holes, seek_holes_within
from brittle.attacks.isolation import attacked
from brittle.attacks.neighbours import Neighbours, from_neighbours
from brittle.attacks.problem import Problem
from brittle.attacks.reach import reach
from brittle.attacks.route import Guide, Route
from brittle.attacks.square import square
from brittle.attacks.vicinity import Vicinity, by_vicinity

__all__ = [
    "Guide",
    "HoleSeekingAttack",
    "Neighbours",
    "Problem",
    "Route",
    "Vicinity",
    "attacked",
    "auto_pgd",
    "auto_pgd_minimal",
    "auto_pgd_targets",
    "by_vicinity",
    "ddn",
    "fab",
    "fmn",
    "from_neighbours",
    "pgd",
    "reach",
    "seek_holes",
    "seek_holes_within",
    "square",
]


def __getattr__(name: str) -> Any:
    """`HoleSeekingAttack`, whose module imports foolbox."""
    if name == "HoleSeekingAttack":
        from brittle.attacks.foolbox_attack import HoleSeekingAttack

        return HoleSeekingAttack
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Attacks: the nearest input that the model gets wrong, found in several ways and verified.

`suite.run` runs them all, `envelope.envelope` is the nearest of all; `seek_holes` is ours and follows the mass map.
Each attack is a function of a `Problem` and returns `AttackRows`.
"""

from brittle.attacks.apgd import auto_pgd
from brittle.attacks.bisection import auto_pgd_minimal
from brittle.attacks.hole_seeking import seek_holes
from brittle.attacks.problem import Problem
from brittle.attacks.route import Guide, Route

__all__ = ["Guide", "Problem", "Route", "auto_pgd", "auto_pgd_minimal", "seek_holes"]

"""One input at which an attack breaks does not cost the others their result.

A block in which an attack raises is halved until the inputs at fault stand alone: log2(B) further calls for each.
Those become failures, and one warning names the first error. An attack that breaks at every input raises.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from brittle.attacks.problem import Problem
from brittle.attacks.search import Search
from brittle.blame import described
from brittle.records import AttackRows

Attack = Callable[[Problem], AttackRows]


@dataclass(frozen=True)
class Broken:
    """One input at which an attack raised."""

    problem: Problem
    error: Exception


def isolated(attack: Attack, problem: Problem) -> list[AttackRows | Broken]:
    """What the attack found, in order: in one piece or, where it raised, in halves of halves."""
    try:
        return [attack(problem)]
    except Exception as error:
        if len(problem) == 1:
            return [Broken(problem, error)]
    half = len(problem) // 2
    return isolated(attack, problem[slice(0, half)]) + isolated(attack, problem[slice(half, None)])


def joined(parts: Sequence[AttackRows | Broken]) -> AttackRows:
    """One record on the CPU; a broken input is a failure whose evaluations count as none.

    Raises whatever the attack raised, if it broke at every input.
    """
    broken = [part for part in parts if isinstance(part, Broken)]
    whole = [part for part in parts if isinstance(part, AttackRows)]
    if not whole:
        raise broken[0].error
    first = whole[0]
    if broken:
        warnings.warn(
            f"{first.attack} ({first.norm}) broke at {len(broken)} inputs, which count as failures of the attack; "
            f"the first error: {described(broken[0].error)}",
            stacklevel=2,
        )
    nothing = lambda one: Search(one.problem).rows(first.attack, first.kind, first.epsilon)  # noqa: E731
    rows = [nothing(part) if isinstance(part, Broken) else part for part in parts]
    column = lambda name: torch.cat([getattr(r, name) for r in rows]).cpu()  # noqa: E731
    return replace(
        first,
        adversarials=column("adversarials"),
        distance=column("distance"),
        success=column("success"),
        new_class=column("new_class"),
        evaluations=column("evaluations"),
    )

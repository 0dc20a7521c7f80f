"""How an attack is run: inputs that are wrong before it are set apart, and one at which it breaks costs no other.

A block in which an attack raises is halved until the inputs at fault stand alone: log2(B) further calls for each.
Those are marked, and one warning names the first error. An attack that breaks at every input raises.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from brittle.attacks.problem import Problem
from brittle.attacks.search import Search
from brittle.blame import described
from brittle.records import OUTCOMES, AttackRows

Attack = Callable[[Problem], AttackRows]

COLUMNS = ("adversarials", "distance", "success", "new_class", "evaluations", "backwards")
"""Fields of `AttackRows` with one row an input, but for the outcome."""


@dataclass(frozen=True)
class Broken:
    """One input at which an attack raised."""

    problem: Problem
    error: Exception


def attacked(attack: Attack, problem: Problem) -> AttackRows:
    """What an attack comes to at every input: rows on the CPU whose `outcome` says which of `OUTCOMES` it was.

    Inputs that are wrong beforehand (that are the target already) are not attacked: their distance is 0, their new
    class the one predicted, and they are no successes. Cost: one evaluation an input besides the attack's.

    Raises:
        Exception: whatever the attack raised, where it broke at every input.
    """
    return joined(isolated(lambda part: _but_the_wrong(attack, part), problem))


def _but_the_wrong(attack: Attack, problem: Problem) -> AttackRows:
    search = Search(problem)
    wrong = problem.fooled(search.look(problem.inputs))
    right = (~wrong).nonzero()[:, 0]
    whole = replace(search.rows("", "minimal"), success=torch.zeros_like(wrong))
    cap = None if problem.cap is None else max(problem.cap - 1, 1)
    found = attack(replace(problem[right], cap=cap)) if len(right) else whole
    outcome = wrong.long() * OUTCOMES.index("wrong")
    outcome[right] = found.success.long()[: len(right)]
    mixed: dict[str, Any] = {name: getattr(whole, name).clone() for name in COLUMNS}
    for name in COLUMNS if len(right) else ():
        mixed[name][right] = getattr(found, name).to(mixed[name])
    mixed["evaluations"][right] += bool(len(right))  # the look at the clean input
    return replace(found, **mixed, outcome=outcome)


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
    first = next((part for part in whole if part.attack), whole[0])
    if broken:
        warnings.warn(
            f"{first.attack} ({first.norm}) broke at {len(broken)} inputs, which count as failures of the attack; "
            f"the first error: {described(broken[0].error)}",
            stacklevel=2,
        )
    rows = [_nothing(part, first) if isinstance(part, Broken) else part for part in parts]
    columns: dict[str, Any] = {name: torch.cat([getattr(r, name) for r in rows]).cpu() for name in COLUMNS}
    outcome = [r.success.long() if r.outcome is None else r.outcome for r in rows]
    return replace(first, **columns, outcome=torch.cat(outcome).cpu())


def _nothing(part: Broken, first: AttackRows) -> AttackRows:
    found = Search(part.problem).rows(first.attack, first.kind, first.epsilon)
    return replace(found, outcome=torch.tensor([OUTCOMES.index("broken")], device=found.success.device))

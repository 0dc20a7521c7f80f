"""The attacks alone, in the run folder of an audit: as the audit runs them, or those that are asked for.

    brittle attack SPEC --out RUN                                      the audit's own stage; `audit` goes on from it
    brittle attack SPEC --out RUN --norm linf --eps 0.1 --attack fab   besides it

Rows go into the run's failures.csv, in place of those of the same attack and norm; with --eps, names say how far.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from brittle.agreement import wilson
from brittle.assemble.estimates import median
from brittle.attacks.envelope import envelope
from brittle.attacks.geometry import reached
from brittle.attacks.plan import members
from brittle.bounds import Bounds
from brittle.errors import DataError
from brittle.findings import Estimate, HealthCheck
from brittle.kernel.memory import Memory
from brittle.outcomes import attack_rows
from brittle.pipeline.context import NORMS, Context
from brittle.pipeline.mapping import memory
from brittle.pipeline.observing import attacks, examined, health, run_suite
from brittle.records import AttackRows, Norm, Progress
from brittle.stages import Spend


@dataclass(frozen=True)
class Wish:
    """Which attacks; all None for those of the audit."""

    norms: tuple[Norm, ...] | None = None
    epsilon: float | None = None
    names: tuple[str, ...] | None = None
    cap: int | None = None  # evaluations of one attack an input

    @property
    def plain(self) -> bool:
        return self == Wish()

    @property
    def stage(self) -> str:
        """Where the result lies: a folder name for each wish."""
        told = json.dumps([self.norms, self.epsilon, self.names, self.cap])
        return f"attacks/{hashlib.sha256(told.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Attacked:
    """What a run of attacks found."""

    inputs: int
    wrong_when_clean: int
    rows: list[AttackRows]
    health: list[HealthCheck]
    epsilon: float | None
    bounds: Bounds

    @property
    def verdict(self) -> str:
        """Inconclusive where a health check failed."""
        return "inconclusive" if any(check.verdict == "fail" for check in self.health) else "pass"

    def norms(self) -> list[Norm]:
        return list(dict.fromkeys(r.norm for r in self.rows))

    def nearest(self, norm: Norm) -> tuple[Estimate, Estimate | None]:
        """Median distance over all attacks, and the share that holds within epsilon, where one was named."""
        far = envelope(self.rows, norm).distance.double()
        beyond = None if self.epsilon is None else int((far > reached(self.epsilon, self.bounds)).sum())
        held = None if beyond is None else wilson(beyond, len(far))
        return median(far), held


def attack(c: Context, wish: Wish) -> Attacked:
    """Run the attacks that are asked for on the sealed queries, and note them in the failures table.

    Raises:
        DataError: where no sealed query is right when clean.
        UsageError: an attack that does not exist, or that does not know a norm.
    """
    c = replace(c, split=c.seal.open({}))  # nothing is predicted here
    sealed = c.split.sealed
    right = sealed[sealed.right]
    if not len(right):
        raise DataError(
            f"some sealed queries must be right to be attacked, found none of {len(sealed)}; train the model"
        )
    for norm in wish.norms or NORMS:
        members(c.preset, norm, wish.names)  # refused before anything is computed
    built = memory(c)
    if wish.plain:
        rows = attacks(c, built)
        checks = health(c, rows)
    else:
        rows, checks = _wished(c, wish, built)
    c.stages.run.add_failures(attack_rows(c.subject, right, rows, [[]] * len(right)))
    return Attacked(len(right), len(sealed) - len(right), rows, checks, wish.epsilon, c.subject.bounds)


def _wished(c: Context, wish: Wish, built: Memory) -> tuple[list[AttackRows], list[HealthCheck]]:
    """The attacks of a wish, led by the map, and their checks."""
    norms = wish.norms or NORMS
    limits: Mapping[Norm, float] = {} if wish.epsilon is None else {norm: wish.epsilon for norm in norms}
    generator = c.stages.generator(wish.stage)

    def compute(tick: Progress, spend: Spend) -> dict[str, Any]:
        asked = {"attacks": wish.names, "epsilons": limits, "cap": wish.cap}
        rows = run_suite(c, built, generator, tick, spend, norms, **asked)
        checks = [check for norm in norms for check in examined(c, rows, norm, generator, spend)]
        return {"rows": [_named(r, wish.epsilon) for r in rows], "health": checks}

    kept = c.stages(wish.stage, "attacking", compute)
    return kept["rows"], [HealthCheck.model_validate(check) for check in kept["health"]]


def _named(rows: AttackRows, epsilon: float | None) -> AttackRows:
    """An attack within a distance of the user's choice says so in its name."""
    return rows if epsilon is None or rows.kind == "minimal" else replace(rows, attack=f"{rows.attack} at {epsilon:g}")

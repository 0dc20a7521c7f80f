"""The stages that observe: the model under probes, attacks, the worst flips."""

from __future__ import annotations

import math
from typing import Any

from brittle.attacks import suite
from brittle.attacks.envelope import envelope
from brittle.attacks.health import Check, examine
from brittle.findings import HealthCheck
from brittle.flips import Flips, worst_flips
from brittle.kernel.differentiable import differentiable_mass
from brittle.kernel.memory import Memory
from brittle.mass import class_groups
from brittle.outcomes import Observed, observe
from brittle.pipeline.context import NORMS, Context
from brittle.records import AttackRows, Norm, Progress
from brittle.stages import Spend


def probes(c: Context) -> Observed:
    """What the model really says under every probe."""
    return c.stages("probes", "probing", lambda tick, _: observe(c.subject, c.split.both, c.families, c.draws, tick))


def attacks(c: Context, memory: Memory) -> list[AttackRows]:
    sealed = c.split.sealed
    right = sealed[sealed.right]
    by_class = class_groups(c.subject)
    route = memory.by_class(c.groups, c.subject.classes).merged(c.effort.route)
    generator = c.stages.generator("attacks")

    def compute(tick: Progress, spend: Spend) -> list[AttackRows]:
        rows = suite.run(
            c.subject,
            right,
            mass=differentiable_mass(route, c.subject, c.device),
            mass_evaluations=2 * route.evaluations,  # with its backward pass
            groups=by_class,
            generator=generator,
            preset=c.preset,
            norms=NORMS,
            progress=tick,
        )
        spend(sum(int(r.evaluations.sum()) for r in rows))
        return rows

    return c.stages("attacks", "attacking", compute)


def health(c: Context, attacked: list[AttackRows]) -> list[HealthCheck]:
    """Whether the attacks can be believed, norm by norm."""
    right = c.split.sealed[c.split.sealed.right]
    generator = c.stages.generator("attacks/health")

    def compute(tick: Progress, spend: Spend) -> list[dict[str, Any]]:
        found = []
        for k, norm in enumerate(NORMS):
            checks = examine(suite.problem_of(c.subject, right, norm), attacked, generator=generator)
            spend(sum(check.cost for check in checks))
            found += [health_finding(check, norm) for check in checks]
            tick(k + 1, len(NORMS))
        return [check.model_dump() for check in found]

    checks = c.stages("attacks/health", "checking the attacks", compute)
    return [HealthCheck.model_validate(check) for check in checks]


def flips(c: Context, observed: Observed, attacked: list[AttackRows]) -> Flips:
    sealed = c.split.sealed
    envelopes = [envelope(attacked, norm) for norm in NORMS]
    return worst_flips(
        sealed,
        sealed.right.nonzero()[:, 0],
        envelopes,
        observed[len(c.split.predict) :],
        c.families,
        c.sealed_draws(),
    )


def health_finding(check: Check, norm: Norm) -> HealthCheck:
    """A check as it stands in the findings."""
    value = check.value if math.isfinite(check.value) else None
    return HealthCheck(name=check.name, norm=norm, verdict=check.verdict, value=value, sentence=check.sentence)

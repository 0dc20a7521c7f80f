"""The stages that observe: the model under probes, attacks, the worst flips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from brittle.attacks import suite
from brittle.attacks.envelope import envelope
from brittle.attacks.health import examine
from brittle.attacks.perturbations import Severities, failure_severities, perturbations
from brittle.attacks.returned import Check
from brittle.findings import HealthCheck
from brittle.flips import Flips, worst_flips
from brittle.kernel.differentiable import differentiable_mass
from brittle.kernel.memory import Memory
from brittle.mass import class_groups
from brittle.outcomes import Observed, observe
from brittle.pipeline.context import NORMS, Context
from brittle.probes import is_image
from brittle.records import AttackRows, Norm, Progress
from brittle.stages import Spend


def probes(c: Context) -> Observed:
    """What the model really says under every probe."""
    return c.stages("probes", "probing", lambda tick, _: observe(c.subject, c.split.both, c.families, c.draws, tick))


def attacks(c: Context, memory: Memory) -> list[AttackRows]:
    generator = c.stages.generator("attacks")
    return c.stages("attacks", "attacking", lambda tick, spend: run_suite(c, memory, generator, tick, spend))


def health(c: Context, attacked: list[AttackRows]) -> list[HealthCheck]:
    """Whether the attacks can be believed, norm by norm."""
    generator = c.stages.generator("attacks/health")

    def compute(tick: Progress, spend: Spend) -> list[dict[str, Any]]:
        found = []
        for k, norm in enumerate(NORMS):
            found += examined(c, attacked, norm, generator, spend)
            tick(k + 1, len(NORMS))
        return found

    checks = c.stages("attacks/health", "checking the attacks", compute)
    return [HealthCheck.model_validate(check) for check in checks]


def severities(c: Context) -> list[Severities]:
    """Where each sealed query that is right first fails under perturbations that people meet; none of what no image is.

    The families of the probes keep their draws, so that both look at the same pictures.
    """
    right = c.split.sealed.right
    if not is_image(c.subject.test.inputs.shape[1:]):
        return []
    families = perturbations(c.subject.test.inputs.shape[1:], c.subject.bounds)
    draws = {name: drawn[right] for name, drawn in c.sealed_draws().items()}
    generator = c.stages.generator("severities")

    def compute(tick: Progress, spend: Spend) -> list[Severities]:
        found = failure_severities(
            c.subject, c.split.sealed[right], families, generator=generator, draws=draws, progress=tick
        )
        spend(sum(int(f.evaluations.sum()) for f in found))
        return found

    return c.stages("severities", "perturbing", compute)


def run_suite(
    c: Context,
    memory: Memory,
    generator: torch.Generator,
    tick: Progress,
    spend: Spend,
    norms: Sequence[Norm] = NORMS,
    **asked: Any,
) -> list[AttackRows]:
    """Attack the sealed queries that are right when clean, led by the map of the whole path as one segment.

    asked: of `suite.run` besides.
    """
    route = memory.merged(1).by_class(c.groups, c.subject.classes)
    rows = suite.run(
        c.subject,
        c.split.sealed[c.split.sealed.right],
        mass=differentiable_mass(route, c.subject, c.device),
        mass_evaluations=2 * route.evaluations,  # with its backward pass
        groups=class_groups(c.subject),
        generator=generator,
        preset=c.preset,
        norms=norms,
        progress=tick,
        **asked,
    )
    spend(sum(int(r.evaluations.sum()) for r in rows))
    return rows


def examined(
    c: Context, attacked: Sequence[AttackRows], norm: Norm, generator: torch.Generator, spend: Spend
) -> list[dict[str, Any]]:
    """The checks of attacks in one norm, as they stand in the findings, as plain data."""
    right = c.split.sealed[c.split.sealed.right]
    checks = examine(suite.problem_of(c.subject, right, norm), attacked, generator=generator)
    spend(sum(check.cost for check in checks))
    return [_finding(check, norm).model_dump() for check in checks]


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


def _finding(check: Check, norm: Norm) -> HealthCheck:
    """A check as it stands in the findings."""
    value = check.value if math.isfinite(check.value) else None
    return HealthCheck(name=check.name, norm=norm, verdict=check.verdict, value=value, sentence=check.sentence)

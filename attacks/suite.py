"""The suite: every attack of a preset on the same queries, block by block, each result verified.

hole-seeking     minimal   L2, Linf   led by the mass map
DDN              minimal   L2
APGD bisection   minimal   L2, Linf
PGD              fixed     L2, Linf
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from brittle.attacks.bisection import auto_pgd_minimal
from brittle.attacks.foolbox_suite import ddn, pgd
from brittle.attacks.hole_seeking import seek_holes
from brittle.attacks.isolation import Attack, isolated, joined
from brittle.attacks.problem import Problem
from brittle.attacks.route import Guide
from brittle.attacks.verify import verified
from brittle.errors import DataError, UsageError
from brittle.records import AttackRows, Groups, Norm, Queries
from brittle.shift import MassMap
from brittle.subject import Subject

BLOCK = 256
"""Inputs attacked at once."""


@dataclass(frozen=True)
class Budget:
    """Evaluations an input may cost, by attack; the mass map's come on top."""

    hole_seeking: int
    tracks: int
    candidates: int  # rivals that the map is asked about
    ddn: int
    rounds: int  # of the bisection
    apgd: int  # in each round
    pgd: int


BUDGETS: dict[str, Budget] = {
    "quick": Budget(hole_seeking=100, tracks=3, candidates=3, ddn=100, rounds=8, apgd=15, pgd=20),
    "standard": Budget(hole_seeking=300, tracks=5, candidates=5, ddn=300, rounds=10, apgd=50, pgd=50),
    "thorough": Budget(hole_seeking=1000, tracks=9, candidates=9, ddn=1000, rounds=12, apgd=100, pgd=200),
}


def run(
    subject: Subject,
    queries: Queries,
    *,
    mass: MassMap | None,
    groups: Groups | None,
    generator: torch.Generator,
    preset: str = "quick",
    norms: Sequence[Norm] = ("l2", "linf"),
    mass_evaluations: int | None = None,
    epsilons: Mapping[Norm, float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[AttackRows]:
    """Attack every query with every attack of the preset: verified records, one an attack and norm.

    Args:
        queries: right when clean.
        mass: leads the hole-seeking attack; without one the margin's gradient does.
        groups: those that the mass map tells apart.
        generator: of all random choices.
        preset: quick, standard or thorough.
        norms: in which to attack.
        mass_evaluations: what one call of `mass` and its backward pass cost an input; where left out, the map's
            attribute of this name.
        epsilons: budget of the fixed attacks by norm; `default_epsilon` where left out.
        progress: called with (done, total) after each block.

    Raises:
        DataError: a query that is wrong when clean, or none at all; a mass map without its groups or its cost.
        UsageError: a preset that does not exist.
    """
    _check(queries, preset)
    guide = _guide(mass, groups, mass_evaluations)
    of_norm = lambda norm: _attacks(subject, preset, norm, guide, epsilons or {}, generator)  # noqa: E731
    plan = [(norm, attack) for norm in norms for attack in of_norm(norm)]
    blocks = [queries[slice(k, k + BLOCK)] for k in range(0, len(queries), BLOCK)]
    found = []
    for k, (norm, attack) in enumerate(plan):
        parts = []
        for b, block in enumerate(blocks):
            parts += isolated(attack, _problem(subject, block, norm))
            if progress:
                progress(k * len(blocks) + b + 1, len(plan) * len(blocks))
        found.append(verified(joined(parts), subject, queries))
    return found


def default_epsilon(norm: Norm, subject: Subject) -> float:
    """A tenth of the bounds' width in Linf; in L2 half of the way to the corner of that cube.

    For 28 x 28 inputs in [0, 1] that is 1.4, for 8 x 8 ones 0.4: about the median distance of a plain network.
    """
    low, high = subject.bounds
    each = 0.1 * (high - low)
    return each if norm == "linf" else 0.5 * each * float(subject.test.inputs[0].numel()) ** 0.5


def _attacks(
    subject: Subject,
    preset: str,
    norm: Norm,
    guide: Guide | None,
    epsilons: Mapping[Norm, float],
    generator: torch.Generator,
) -> Iterator[Attack]:
    """The attacks of one norm."""
    budget = BUDGETS[preset]
    epsilon = epsilons[norm] if norm in epsilons else default_epsilon(norm, subject)
    yield lambda problem: seek_holes(
        problem,
        guide or "gradient",
        generator=generator,
        steps=budget.hole_seeking,
        tracks=budget.tracks,
        candidates=budget.candidates,
        traced=False,
    )[0]
    if norm == "l2":
        yield partial(ddn, generator=generator, steps=budget.ddn)
    yield partial(auto_pgd_minimal, generator=generator, rounds=budget.rounds, steps=budget.apgd)
    yield partial(pgd, epsilon=epsilon, generator=generator, steps=budget.pgd)


def _problem(subject: Subject, queries: Queries, norm: Norm) -> Problem:
    """The queries on the model's device."""
    device = next(subject.model.parameters()).device
    logits = partial(subject.class_logits, subject.model)
    return Problem(logits, queries.inputs.to(device), queries.targets.to(device), norm, subject.bounds)


def _guide(mass: MassMap | None, groups: Groups | None, evaluations: int | None) -> Guide | None:
    if mass is None:
        return None
    cost = evaluations if evaluations is not None else getattr(mass, "mass_evaluations", None)
    if groups is None or cost is None:
        missing = "groups" if groups is None else "cost (mass_evaluations)"
        raise DataError(f"a mass map comes with its groups and its cost, found no {missing}; pass both, or mass=None")
    return Guide(lambda inputs, pairs: mass(inputs, pairs).to(inputs.device), groups.classes, cost)


def _check(queries: Queries, preset: str) -> None:
    if preset not in BUDGETS:
        raise UsageError(f"preset must be one of {', '.join(BUDGETS)}, found {preset!r}")
    wrong = int((~queries.right).sum())
    if wrong or not len(queries):
        raise DataError(
            f"attacks need queries that are right when clean, found {wrong} wrong of {len(queries)}; "
            "pass queries[queries.right]"
        )

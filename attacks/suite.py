"""The suite: the attacks of a preset (`plan`) on the same queries, block by block, each result verified."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from brittle.attacks.isolation import COLUMNS, Attack, Broken, isolated, joined
from brittle.attacks.neighbours import Neighbours
from brittle.attacks.plan import BUDGETS, DENSE, SUITE, Setting, default_epsilon, members
from brittle.attacks.problem import Problem
from brittle.attacks.route import Guide
from brittle.attacks.search import Search
from brittle.attacks.verify import verified
from brittle.attacks.vicinity import Vicinity
from brittle.bounds import moved
from brittle.errors import DataError, UsageError
from brittle.records import AttackRows, Groups, Norm, Queries
from brittle.shift import MassMap
from brittle.subject import Subject

BLOCK = 256
"""Inputs attacked at once."""


def run(
    subject: Subject,
    queries: Queries,
    *,
    mass: MassMap | None,
    groups: Groups | None,
    generator: torch.Generator,
    preset: str = "quick",
    norms: Sequence[Norm] = DENSE,
    attacks: Sequence[str] | None = None,
    mass_evaluations: int | None = None,
    epsilons: Mapping[Norm, float] | None = None,
    enough: Mapping[Norm, float] | None = None,
    cap: int | None = None,
    draws: int = 1,
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
        attacks: names of `SUITE`; those of the preset where left out.
        mass_evaluations: what one call of `mass` and its backward pass cost an input; where left out, the map's
            attribute of this name.
        epsilons: budget of the fixed attacks by norm; `default_epsilon` where left out.
        enough: by norm, the distance within which a success settles an input: no further attack looks at it.
        cap: evaluations that one attack may spend on an input.
        draws: how often a random model is asked at each point.
        progress: called with (done, total) after each block.

    Raises:
        DataError: a query that is wrong when clean, or none at all; a mass map without its groups or its cost.
        UsageError: a preset or an attack that does not exist; an attack in a norm that it does not know.
    """
    _check(queries, preset)
    guide = _guide(mass, groups, mass_evaluations)
    near = Neighbours(subject.train.inputs, subject.train.targets)
    vicinity = Vicinity(subject.model, subject.class_logits)
    blocks = [slice(k, min(k + BLOCK, len(queries))) for k in range(0, len(queries), BLOCK)]
    plan = [(norm, name, steps) for norm in norms for name, steps in members(preset, norm, attacks).items()]
    done = {norm: torch.zeros(len(queries), dtype=torch.bool) for norm in norms}
    found = []
    for k, (norm, name, steps) in enumerate(plan):
        within = (enough or {}).get(norm)
        epsilon = (epsilons or {}).get(norm) or default_epsilon(norm, subject)
        setting, parts = Setting(norm, epsilon, guide, near, vicinity, generator), list[AttackRows | Broken]()
        for b, block in enumerate(blocks):
            problem = replace(problem_of(subject, queries[block], norm), cap=cap, draws=draws, enough=within)
            parts += _unsettled(SUITE[name].make(setting, steps), problem, done[norm][block])
            if progress:
                progress(k * len(blocks) + b + 1, len(plan) * len(blocks))
        joint = replace(joined(parts), attack=name, kind="fixed" if SUITE[name].fixed else "minimal")
        rows = verified(replace(joint, epsilon=epsilon if SUITE[name].fixed else None), subject, queries)
        if within is not None:
            done[norm] |= rows.distance <= within
        found.append(rows)
    return found


def _unsettled(attack: Attack, problem: Problem, done: Tensor) -> list[AttackRows | Broken]:
    """The attack on what is not settled yet; the rest stands as held, at no cost."""
    left = (~done).nonzero()[:, 0].to(problem.inputs.device)
    if len(left) == len(problem):
        return isolated(attack, problem)
    whole = Search(problem).rows("", "minimal")
    if not len(left):
        return [whole]
    part = joined(isolated(attack, problem[left]))
    put = lambda name: getattr(whole, name).cpu().index_copy(0, left.cpu(), getattr(part, name))  # noqa: E731
    columns: dict[str, Any] = {name: put(name) for name in COLUMNS}
    return [replace(part, **columns, outcome=None)]


def problem_of(subject: Subject, queries: Queries, norm: Norm) -> Problem:
    """The queries on the model's device."""
    device = next(subject.model.parameters()).device
    logits = partial(subject.class_logits, subject.model)
    bounds = moved(subject.bounds, device)
    return Problem(logits, queries.inputs.to(device), queries.targets.to(device), norm, bounds)


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

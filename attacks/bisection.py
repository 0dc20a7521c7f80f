"""The smallest distance at which Auto-PGD succeeds, found by bisection for each input.

A fixed-budget attack becomes a minimal-norm one; on adversarially trained networks this is among the best there are
(Cinà et al. 2024, "AttackBench", arXiv 2404.19460).
"""

from __future__ import annotations

import torch

from brittle.attacks.apgd import Climb, climb
from brittle.attacks.geometry import room
from brittle.attacks.problem import Problem
from brittle.attacks.route import Guide, take_bearing
from brittle.attacks.search import Search
from brittle.records import AttackRows

FIRST = 1.5
"""The first distance tried, in units of the first-order one."""

LINE_SEARCH = 6
"""Halvings at the end."""


def auto_pgd_minimal(
    problem: Problem, *, generator: torch.Generator, rounds: int = 8, steps: int = 30, candidates: int = 5
) -> AttackRows:
    """Bisect the distance within which APGD succeeds.

    The distance doubles until there is a success; then the gap between the largest failure and the smallest success
    is halved. Within a distance the cross entropy is raised first and then, where that failed, the DLR towards the
    rival that is nearest to first order; by the cross entropy alone linear models of five classes came out up to a
    quarter too far. Each climb starts where the one before it ended, drawn into the new ball.

    Args:
        steps: of both climbs of a round together.
        candidates: K, rivals among which the nearest is looked for.

    Cost: at most 1 + K + `rounds` x `steps` + 6 evaluations an input.
    """
    search = Search(problem)
    with search:
        bearing = take_bearing(search, Guide.margin(problem), search.look(problem.inputs), candidates, generator)
        farthest = room(problem.inputs, problem.bounds, problem.norm)
        radius = torch.minimum(FIRST * bearing.tip[:, 0], farthest)
        climbs = (
            (problem, Climb("ce", steps - steps // 2, early=True)),
            (problem.aimed(bearing.rivals[:, 0]), Climb("dlr", steps // 2, early=True)),
        )
        tops, failed = [problem.inputs, problem.inputs], torch.zeros_like(radius)
        for _ in range(rounds):
            before = search.best.clone()
            for k, (aimed, how) in enumerate(climbs):
                rows = (search.best >= before).nonzero()[:, 0]
                tops[k] = climb(aimed, search, how, tops[k], radius, rows, generator)
            failed = torch.where(search.best < before, failed, radius)
            radius = torch.where(search.best.isfinite(), (failed + search.best) / 2, (2 * radius).minimum(farthest))
        search.pull_in(LINE_SEARCH)
    return search.rows("APGD bisection", "minimal")

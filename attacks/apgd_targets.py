"""APGD-T: Auto-PGD on the targeted DLR, one rival class after the other.

Within epsilon, for the K classes of the largest logits, each input climbs the DLR towards that class; an input that
was fooled is not attacked any further. With three classes the DLR's scale falls back on the third logit, with two it is
the margin (`losses.dlr`): so it is defined for any number.

Source: Croce, Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks" (arXiv 2003.01690), section 5.
"""

from __future__ import annotations

import torch

from brittle.attacks.apgd import Climb, climb, random_start
from brittle.attacks.problem import Problem
from brittle.attacks.route import rank_by_logit
from brittle.attacks.search import Search
from brittle.records import AttackRows


def auto_pgd_targets(
    problem: Problem, epsilon: float, *, generator: torch.Generator, steps: int = 100, targets: int = 9
) -> AttackRows:
    """Climb towards each of the likeliest rivals within `epsilon`, until one is reached.

    Cost: at most 1 + `targets` x `steps` evaluations an input.
    """
    search = Search(problem, epsilon=epsilon)
    with search:
        ranked = rank_by_logit(problem, search.look(problem.inputs))[:, :targets]
        radius = problem.inputs.new_full((len(problem),), epsilon)
        for rival in ranked.unbind(1):
            rows = search.best.isinf().nonzero()[:, 0]
            if not len(rows):
                break
            start = random_start(problem, epsilon, generator)
            climb(problem.aimed(rival), search, Climb("dlr", steps, early=True), start, radius, rows, generator)
    return search.rows("APGD-T", "fixed", epsilon)

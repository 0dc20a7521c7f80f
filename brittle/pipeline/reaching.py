"""How far the nearest failure is, predicted of the sealed queries in each norm before anything attacks them.

    score = -log r,        r the last radius of `brittle.attacks.reach` in `REACH_PASSES` gradient passes

towards any class but the predicted one, so that no label is looked at. Searches begin at the first-order distance of
each query. Where the margin has no slope at the end the distance is undefined; undefined and infinite distances rank
last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from brittle.attacks.reach import reach
from brittle.attacks.suite import BLOCK, problem_of
from brittle.kernel.quadrature import blocks
from brittle.pipeline.context import NORMS, Context
from brittle.records import Norm, Queries
from brittle.stages import Spend
from brittle.subject import Subject

REACH_PASSES, STEPS = 10, (1.0, 0.2)
"""Gradient passes; first and last length of a step, in units of the radius. Steps of (2, .5) are a little better on a
plainly trained network and much worse on an adversarially trained one."""


def reach_scores(c: Context, spend: Spend) -> dict[Norm, Tensor]:
    """The score of the sealed queries in each norm, each (M,) float64."""
    spend(len(NORMS) * REACH_PASSES * len(c.split.sealed))
    generator = c.stages.generator("reach")
    return {norm: reach_score(c.subject, c.split.sealed, norm, generator) for norm in NORMS}


def reach_score(subject: Subject, queries: Queries, norm: Norm, generator: torch.Generator) -> Tensor:
    """Minus the log of the predicted distance, (M,) float64. generator: of directions where a gradient vanishes.

    Cost: `REACH_PASSES` gradient passes a query, and one forward pass.
    """
    asked = Queries(queries.ids, queries.inputs, queries.pairs.predicted, queries.logits, queries.pairs)
    score = torch.empty(len(queries), dtype=torch.float64)
    for rows in blocks(len(queries), BLOCK):
        found = reach(problem_of(subject, asked[rows], norm), REACH_PASSES, length=STEPS, generator=generator)
        radius = torch.where(found.slope[-1] > 0, found.radius, torch.inf).nan_to_num(torch.inf, torch.inf)
        score[rows] = -radius.double().log().cpu()
    return score

"""Starts from training neighbours: go to where the model already says something else, and come back.

For each input the K nearest training examples of other classes (of the target, where there is one) are lines on which
the prediction must change if the model has learned them. The change is found by halving the line; from the nearest of
these points a descent (`descent`) goes on. It needs no gradient to begin with, so that it works where gradients at the
clean input are masked. (foolbox 3.3.4's `DatasetAttack` draws its starts from the first batch alone.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.attacks.descent import Descent, descend
from brittle.attacks.geometry import size
from brittle.attacks.problem import Problem
from brittle.attacks.search import Search
from brittle.records import AttackRows

HALVINGS = 6
"""Of each line, and of the gap at the end."""

BLOCK = 64
"""Inputs whose distances to all training examples are held at once."""

NEAR = Descent(step=(0.5, 0.01))
"""Steps of the descent: short, to stay near the start."""


@dataclass(frozen=True)
class Neighbours:
    """Training examples to start from."""

    inputs: Tensor  # shape: (N, *input)
    classes: Tensor  # shape: (N,) int64

    def unlike(self, problem: Problem, count: int) -> Tensor:
        """The `count` nearest (in L2) of another class, or of the target, (B, count, *input); fewer if there are fewer.

        Where an input has none, itself.
        """
        known = self.inputs.flatten(1).to(problem.inputs)
        classes = self.classes.to(problem.labels)
        found = []
        for k in range(0, len(problem), BLOCK):
            part = problem[slice(k, k + BLOCK)]
            far = torch.cdist(part.inputs.flatten(1), known)  # shape: (B', N)
            same = classes == part.labels[:, None] if part.targets is None else classes != part.targets[:, None]
            nearest = far.masked_fill(same, torch.inf).topk(min(count, len(known)), dim=1, largest=False)
            points = known[nearest.indices].reshape(len(part), -1, *part.inputs.shape[1:])
            none = nearest.values.isinf().reshape(*nearest.values.shape, *[1] * (points.dim() - 2))
            found.append(torch.where(none, part.inputs[:, None], points))
        return torch.cat(found)


def from_neighbours(
    problem: Problem, near: Neighbours, *, generator: torch.Generator, steps: int = 60, count: int = 3
) -> AttackRows:
    """A minimal-norm attack in L2 or Linf that starts at training examples.

    Args:
        steps: in all, of which 1 + `count` x 7 go to the lines and 6 to the gap at the end.
        count: lines that are looked at.

    Cost: at most `steps` evaluations an input (more where the lines alone cost more).
    """
    search = Search(problem)
    with search:
        clean = search.look(problem.inputs)
        for point in near.unlike(problem, count).unbind(1):
            _along(search, point)
        if steps > 1 + count * (1 + HALVINGS) + HALVINGS:
            left = steps - 1 - count * (1 + HALVINGS) - HALVINGS
            descend(problem, search, search.inputs.clone(), problem.margin(clean).abs(), NEAR, left, generator)
        search.pull_in(HALVINGS)
    return search.rows("neighbours", "minimal")


def _along(search: Search, ends: Tensor) -> None:
    """Halve the line from each input to its end, if the end succeeds and may bring the best nearer."""
    problem = search.problem
    rows = (size(ends - problem.inputs, problem.norm) > 0).nonzero()[:, 0]
    part, ends = problem[rows], ends[rows]
    if not len(rows):
        return
    reached = part.fooled(search.look(ends, rows))
    search.halve(rows[reached], ends[reached], HALVINGS)

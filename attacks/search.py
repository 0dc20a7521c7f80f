"""An attack's questions to the model, counted, and the best of what it has found.

Attacks reach the model only through a `Search`. It counts what each input cost and keeps, of all points that it was
ever asked about, the best success, so that no attack can lose its best iterate or hide a question.

One *evaluation* is one forward pass of one input, with the backward pass through it where there is one. A forward
pass alone counts as much, so that no attack looks cheaper than it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from brittle.attacks.geometry import distance, size, spread
from brittle.attacks.problem import Problem, Rows
from brittle.records import AttackRows

EVERY = slice(None)


class Search:
    """The search for a success near each input of a problem.

    Args:
        keep: what makes a success the best: that it is the nearest, or the surest (the largest margin of error).
    """

    def __init__(self, problem: Problem, keep: Literal["nearest", "surest"] = "nearest") -> None:
        self.problem, self._keep = problem, keep
        self.inputs = problem.inputs.clone()  # shape: (B, *input), the best success; the input itself before
        self.classes = problem.labels.clone()  # shape: (B,) predicted there
        self.best = problem.inputs.new_full((len(problem),), torch.inf)  # shape: (B,) distance or margin there
        self.evaluations = torch.zeros(len(problem), dtype=torch.int64, device=problem.inputs.device)

    @torch.no_grad()
    def look(self, points: Tensor, rows: Rows = EVERY) -> Tensor:
        """Logits (B', C) at `points`, which stand for the given rows of the problem. One evaluation each."""
        self.charge(1, rows)
        logits = self.problem.logits(points)
        self._see(points, logits, rows)
        return logits

    def gradient(
        self, points: Tensor, loss: Callable[[Tensor], Tensor], rows: Rows = EVERY
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B', C), loss (B',) and the loss's gradient (B', *input) at `points`. One evaluation each."""
        self.charge(1, rows)
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            logits = self.problem.logits(points)
            values = loss(logits)
            (gradient,) = torch.autograd.grad(values.sum(), points)
        self._see(points.detach(), logits.detach(), rows)
        return logits.detach(), values.detach(), gradient

    def charge(self, evaluations: int, rows: Rows = EVERY) -> None:
        """Count what was spent elsewhere than here, such as on the mass map."""
        self.evaluations[rows] += evaluations

    def pull_in(self, steps: int) -> None:
        """Halve the gap between each success and its input `steps` times. Cost: `steps` evaluations."""
        rows = self.best.isfinite().nonzero()[:, 0]
        problem = self.problem[rows]
        way = self.inputs[rows] - problem.inputs
        low, high = torch.zeros_like(self.best[rows]), torch.ones_like(self.best[rows])
        for _ in range(steps if len(rows) else 0):
            half = (low + high) / 2
            fooled = problem.fooled(self.look((problem.inputs + spread(half, way) * way).clamp(*problem.bounds), rows))
            low, high = torch.where(fooled, low, half), torch.where(fooled, half, high)

    def rows(self, attack: str, kind: Literal["minimal", "fixed"], epsilon: float | None = None) -> AttackRows:
        """What was found, as the record that every attack returns."""
        success = self.best.isfinite()
        far = distance(self.problem.inputs, self.inputs, self.problem.norm)
        return AttackRows(
            attack=attack,
            norm=self.problem.norm,
            kind=kind,
            adversarials=self.inputs,
            distance=torch.where(success, far, torch.inf),
            success=success,
            new_class=self.classes,
            evaluations=self.evaluations,
            epsilon=epsilon,
        )

    def _see(self, points: Tensor, logits: Tensor, rows: Rows) -> None:
        problem = self.problem[rows]
        nearest = self._keep == "nearest"
        cost = size(points - problem.inputs, problem.norm) if nearest else problem.margin(logits)
        better = problem.fooled(logits) & (cost < self.best[rows])
        self.inputs[rows] = torch.where(spread(better, points), points, self.inputs[rows])
        self.classes[rows] = torch.where(better, logits.argmax(1), self.classes[rows])
        self.best[rows] = torch.where(better, cost, self.best[rows])

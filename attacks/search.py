"""An attack's questions to the model, counted and capped, and the best of what it has found.

Attacks reach the model only through a `Search`. It counts what each input cost and keeps, of all points that it was
ever asked about, the best success, so that no attack can lose its best iterate or hide a question. An input that has
spent its cap, or that has enough, is not asked about any more; once no input is left the attack's `with` block ends:

    search = Search(problem)
    with search:
        ...
    return search.rows("name", "minimal")

One *evaluation* is one forward pass of one input, with the backward pass through it where there is one. A forward
pass alone counts as much, so that no attack looks cheaper than it is; backward passes are counted apart as well.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor

from brittle.attacks.geometry import distance, reached, size, spread
from brittle.attacks.problem import EVERY, Problem, Rows, doubt
from brittle.bounds import within
from brittle.records import AttackRows


class Spent(Exception):  # noqa: N818
    """No input may be asked about any more."""


class Search:
    """The search for a success near each input of a problem.

    Args:
        keep: what makes a success the best: that it is the nearest, or the surest (the largest margin of error).
        epsilon: successes farther than that do not count. Where the surest is kept, all points that are asked about
            must have been drawn within it: only the best one's distance is measured, at the end.
    """

    def __init__(
        self, problem: Problem, keep: Literal["nearest", "surest"] = "nearest", epsilon: float | None = None
    ) -> None:
        self.problem, self._keep = problem, keep
        self._farthest = torch.inf if epsilon is None else reached(epsilon, problem.bounds)
        self.inputs = problem.inputs.clone()  # shape: (B, *input), the best success; the input itself before
        self.classes = problem.labels.clone()  # shape: (B,) predicted there
        self.best = problem.inputs.new_full((len(problem),), torch.inf)  # shape: (B,) distance or margin there
        self.evaluations = torch.zeros(len(problem), dtype=torch.int64, device=problem.inputs.device)
        self.backwards = torch.zeros_like(self.evaluations)
        self._done = torch.zeros_like(self.evaluations, dtype=torch.bool)
        self._here, self._offset = torch.empty_like(self.inputs), torch.empty_like(self.inputs)  # what `_see` looks at
        self._every = torch.arange(len(problem), device=problem.inputs.device)

    def __enter__(self) -> Search:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        return isinstance(error, Spent)

    @torch.no_grad()
    def look(self, points: Tensor, rows: Rows = EVERY) -> Tensor:
        """Logits (B', C) at `points`, which stand for the given rows of the problem. One evaluation each.

        Of an input that may not be asked about any more they are 0.
        """
        return self.graph(points, rows).logits

    def gradient(
        self, points: Tensor, loss: Callable[[Tensor], Tensor], rows: Rows = EVERY
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B', C), loss (B',) and the loss's gradient (B', *input) at `points`. One evaluation each.

        Of an input that may not be asked about any more logits and gradient are 0.
        """
        with torch.enable_grad():
            asked = self.graph(points, rows)
            values = loss(asked.logits)
            gradient = asked.pull_back(values.sum())
        return asked.logits.detach(), values.detach(), gradient

    def graph(self, points: Tensor, rows: Rows = EVERY) -> Asked:
        """Logits at `points` that can be pulled back to them. One evaluation each, one backward pass included."""
        some = self._open(rows)
        asked = points[some].detach().requires_grad_()
        drawn = [self.problem.logits(asked) for _ in range(self.problem.draws)]
        logits = drawn[0] if len(drawn) == 1 else torch.stack(drawn).mean(0)
        found = Asked(self, rows, some, asked, _placed(logits, some, len(points)))
        self._see(points.detach(), found.logits.detach(), rows)
        return found

    def charge(self, evaluations: int, rows: Rows = EVERY, backwards: int = 0) -> None:
        """Count what is about to be spent elsewhere than here, such as on the mass map.

        Ends the attack where not a single input can afford it any more.
        """
        cap = self.problem.cap
        if cap is not None and bool((self.evaluations[rows] + evaluations > cap).all()):
            raise Spent
        _count(self.evaluations, rows, evaluations)
        _count(self.backwards, rows, backwards)

    def pull_in(self, steps: int) -> None:
        """Halve the gap between each success and its input `steps` times. Cost: `steps` evaluations."""
        rows = self.best.isfinite().nonzero()[:, 0]
        self.halve(rows, self.inputs[rows], steps)

    def halve(self, rows: Tensor, ends: Tensor, steps: int) -> None:
        """Halve the line from some inputs to successes, (B', *input), `steps` times. Cost: `steps` evaluations."""
        problem = self.problem[rows]
        way = ends - problem.inputs
        low, high = torch.zeros_like(self.best[rows]), torch.ones_like(self.best[rows])
        for _ in range(steps if len(rows) else 0):
            half = (low + high) / 2
            point = within(problem.inputs + spread(half, way) * way, problem.bounds)
            fooled = problem.fooled(self.look(point, rows))
            low, high = torch.where(fooled, low, half), torch.where(fooled, half, high)

    def rows(self, attack: str, kind: Literal["minimal", "fixed"], epsilon: float | None = None) -> AttackRows:
        """What was found, as the record that every attack returns."""
        far = distance(self.problem.inputs, self.inputs, self.problem.norm)
        success = self.best.isfinite() & (far <= self._farthest)
        return AttackRows(
            attack=attack,
            norm=self.problem.norm,
            kind=kind,
            adversarials=torch.where(spread(success, self.inputs), self.inputs, self.problem.inputs),
            distance=torch.where(success, far, torch.inf),
            success=success,
            new_class=torch.where(success, self.classes, self.problem.labels),
            evaluations=self.evaluations,
            epsilon=epsilon,
            backwards=self.backwards,
        )

    def _open(self, rows: Rows) -> Rows:
        """Which of the rows may still be asked about; charges them. Raises `Spent` where none may."""
        problem = self.problem
        if problem.cap is None and problem.enough is None:
            some: Rows = EVERY
        else:
            some = ~self._done[rows]
            if problem.cap is not None:
                some = some & (self.evaluations[rows] + problem.draws <= problem.cap)
            if len(some) and not some.any():
                raise Spent
            some = EVERY if some.all() else some
        _count(self.evaluations, rows, self._price(rows, some))
        return some

    def _price(self, rows: Rows, some: Rows) -> Tensor | int:
        if isinstance(some, slice):
            return self.problem.draws
        each = torch.zeros_like(self.evaluations[rows])
        each[some] = self.problem.draws
        return each

    def _see(self, points: Tensor, logits: Tensor, rows: Rows) -> None:
        """Keep what is better than the best so far."""
        problem, margin = self.problem, self.problem.margin(logits, rows)
        wrong = margin < -doubt(logits)
        if self._keep == "nearest":
            kept, cost = self._nearer(points, wrong.nonzero()[:, 0], rows)
        else:
            kept = (wrong & (margin < self.best[rows])).nonzero()[:, 0]
            cost = margin[kept]
        if not len(kept):
            return
        ours = self._every[rows][kept]
        self.inputs.index_copy_(0, ours, torch.index_select(points, 0, kept, out=self._here[: len(kept)]))
        self.classes[ours] = logits[kept].argmax(1)
        self.best[ours] = cost
        if problem.enough is not None:
            far = cost if self._keep == "nearest" else self._far(points, kept, ours)
            self._done[ours[far <= reached(problem.enough, problem.bounds)]] = True

    def _nearer(self, points: Tensor, wrong: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Which of the wrong points are nearer than the best so far, and their distances."""
        ours = self._every[rows][wrong]
        far = self._far(points, wrong, ours)
        nearer = (far < self.best[ours]) & (far <= self._farthest)
        return wrong[nearer], far[nearer]

    def _far(self, points: Tensor, some: Tensor, ours: Tensor) -> Tensor:
        """Distance of some of the points to the inputs that they stand for, (B',)."""
        here = torch.index_select(points, 0, some, out=self._here[: len(some)])
        offset = torch.index_select(self.problem.inputs, 0, ours, out=self._offset[: len(some)])
        return size(torch.sub(here, offset, out=offset), self.problem.norm)


class Asked:
    """Logits (B', C) of one question, with their way back to its points."""

    def __init__(self, search: Search, rows: Rows, some: Rows, points: Tensor, logits: Tensor) -> None:
        self.logits = logits
        self._search, self._rows, self._some, self._points = search, rows, some, points
        self._pulled = False

    def pull_back(self, values: Tensor, upstream: Tensor | None = None) -> Tensor:
        """Gradient at the points, (B', *input), of what was computed from the logits.

        The first time it is part of the evaluation, after that an evaluation of its own.
        """
        price = self._search._price(self._rows, self._some)
        _count(self._search.backwards, self._rows, price)
        if self._pulled:
            _count(self._search.evaluations, self._rows, price)
        self._pulled = True
        (gradient,) = torch.autograd.grad(values, self._points, upstream, retain_graph=upstream is not None)
        return _placed(gradient, self._some, len(self.logits))


def _count(counter: Tensor, rows: Rows, more: Tensor | int) -> None:
    """Add to a counter at some rows; all of them without a copy."""
    if rows is EVERY:
        counter += more
    else:
        counter[rows] += more


def _placed(values: Tensor, some: Rows, count: int) -> Tensor:
    """Values of some rows at their places among `count`, 0 elsewhere."""
    if isinstance(some, slice):
        return values
    out = values.new_zeros(count, *values.shape[1:])
    out[some] = values
    return out

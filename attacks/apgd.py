"""Auto-PGD: projected gradient ascent within a fixed distance that finds its own step size.

With P the projection on the ball of radius epsilon within the bounds, s the steepest direction of the loss f and
a = 3/4 (1 in the first step),

    z       = P(x_k + eta s(x_k)),
    x_{k+1} = P(a z + (1 - a) (2 x_k - x_{k-1})),           eta = 2 epsilon at first.

At checkpoints ceil(p_j steps), p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06), eta is halved
and the search goes on from the best point so far, wherever either

    1. f rose in fewer than 3/4 of the steps since the last checkpoint, or
    2. neither eta changed at the last checkpoint nor the best f since.

Every input has its own eta and its own best point.

Source: Croce, Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks" (arXiv 2003.01690), section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from brittle.attacks.geometry import Projection, ball, put, spread, steepest
from brittle.attacks.losses import LOSSES
from brittle.attacks.problem import EVERY, Problem, Rows
from brittle.attacks.search import Search
from brittle.records import AttackRows, Norm

INERTIA = 0.75
"""The weight a of the new step against the last one's continuation."""

RISING = 0.75
"""Share of steps in which the loss must rise for eta to stay."""


@dataclass(frozen=True)
class Climb:
    """One run of Auto-PGD."""

    loss: Literal["ce", "dlr"]
    steps: int
    early: bool = False
    """Leave an input at its first success."""


def auto_pgd(
    problem: Problem,
    epsilon: float,
    *,
    generator: torch.Generator,
    steps: int = 100,
    loss: Literal["ce", "dlr"] = "ce",
    early: bool = False,
) -> AttackRows:
    """Raise the loss as far as it goes within distance `epsilon`, from a random point there.

    Of the successes the one with the largest margin is returned. Cost: `steps` evaluations an input; with `early` it
    is left at its first success.
    """
    search = Search(problem, keep="surest", epsilon=epsilon)
    radius = problem.inputs.new_full((len(problem),), epsilon)
    start = random_start(problem, epsilon, generator)
    rows = torch.arange(len(problem), device=radius.device)
    with search:
        climb(problem, search, Climb(loss, steps, early), start, radius, rows, generator)
    return search.rows(f"APGD-{loss.upper()}", "fixed", epsilon)


def random_start(problem: Problem, epsilon: float, generator: torch.Generator) -> Tensor:
    """A random point at distance `epsilon` of each input, not yet drawn into the bounds, (B, *input)."""
    noise = torch.randn(problem.inputs.shape, generator=generator).to(problem.inputs)
    return problem.inputs + epsilon * steepest(noise, problem.norm)


def climb(
    problem: Problem,
    search: Search,
    how: Climb,
    start: Tensor,
    radius: Tensor,
    rows: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Run Auto-PGD on some inputs, each within its own distance; the search keeps what is met on the way.

    Args:
        problem: what is climbed: that of the search, or the same aimed at other targets.
        start: (B, *input), drawn into the balls first.
        radius: (B,) epsilon of each input.
        rows: (B',) the inputs that climb, ascending.

    Returns:
        Each climbing input's point of largest loss in place of its start, (B, *input).

    Cost: `how.steps` evaluations an input, fewer where it leaves early.
    """
    tops, halving = start.clone(), checkpoints(how.steps)
    part, project = _room_of(problem, rows, radius[rows])
    state = _State.at(project(start[rows]), radius[rows], rows)
    for k in range(how.steps):
        if k:
            state = _move(state, project, part.norm, 1.0 if k == 1 else INERTIA, generator)
        logits, loss, gradient = search.gradient(state.points, partial(_loss, part, how.loss), _asked(state, problem))
        state = _arrive(state, loss, gradient)
        if k in halving:
            state = _halve(state, k - max([c for c in halving if c < k], default=0))
        if how.early and (through := search.problem.fooled(logits, state.rows)).any():
            tops[state.rows] = state.top
            state = state[~through]
            part, project = _room_of(problem, state.rows, state.radius)
            if not len(state.rows):
                break
    tops[state.rows] = state.top
    return tops


def checkpoints(steps: int) -> list[int]:
    """The steps after which eta is looked at."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return sorted({math.ceil(round(share * steps, 9)) for share in shares[1:] if share < 1})


def _loss(problem: Problem, loss: str, logits: Tensor) -> Tensor:
    return LOSSES[loss](logits, problem.labels, problem.targets)


@dataclass(frozen=True)
class _State:
    """Where the climb of each input that is still in it stands.

    Points, last, top, top_gradient and spare are the state's own and are written over: new tensors of the batch's size
    at every step cost as much as what is computed in them (benchmarks/attacks.md).
    """

    rows: Tensor  # shape: (B',) positions in the search
    radius: Tensor  # shape: (B',)
    points: Tensor  # shape: (B', *input) x_k
    last: Tensor  # shape: (B', *input) x_{k-1}
    loss: Tensor  # shape: (B',) at x_k
    gradient: Tensor  # shape: (B', *input) at x_k
    top: Tensor  # shape: (B', *input) the best point
    top_loss: Tensor  # shape: (B',)
    top_gradient: Tensor  # shape: (B', *input)
    eta: Tensor  # shape: (B',)
    rises: Tensor  # shape: (B',) since the last checkpoint
    halved: Tensor  # shape: (B',) bool, at the last checkpoint
    mark: Tensor  # shape: (B',) the best loss at the last checkpoint
    spare: Tensor  # shape: (B', *input) holds nothing

    @classmethod
    def at(cls, start: Tensor, radius: Tensor, rows: Tensor) -> _State:
        nothing = torch.full_like(radius, -torch.inf)
        return cls(
            rows=rows,
            radius=radius,
            points=start,
            last=start.clone(),
            loss=nothing,
            gradient=torch.zeros_like(start),
            top=start.clone(),
            top_loss=nothing,
            top_gradient=torch.zeros_like(start),
            eta=2 * radius,
            rises=torch.zeros_like(radius),
            halved=torch.ones_like(radius, dtype=torch.bool),
            mark=nothing,
            spare=torch.empty_like(start),
        )

    def __getitem__(self, rows: Tensor) -> _State:
        return _State(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


def _asked(state: _State, problem: Problem) -> Rows:
    """The rows of the state; all of them as a slice, which is read and written without indices."""
    return EVERY if len(state.rows) == len(problem) else state.rows


def _room_of(problem: Problem, rows: Tensor, radius: Tensor) -> tuple[Problem, Projection]:
    """Some inputs of the problem, and P for them. radius: (B',)."""
    part = problem[rows]
    return part, ball(part.inputs, radius, part.bounds, part.norm, over=True)


def _move(state: _State, project: Projection, norm: Norm, inertia: float, generator: torch.Generator) -> _State:
    """The state with its points at x_{k+1}, not yet asked about."""
    points, last, spare = state.points, state.last, state.spare
    way = steepest(state.gradient, norm, generator, out=spare)
    z = project(torch.addcmul(points, spread(state.eta, way), way, out=spare))
    if inertia == 1:
        return replace(state, points=z, last=points, spare=last)
    ahead = torch.lerp(torch.lerp(last, points, 2.0, out=last), z, inertia, out=last)
    return replace(state, points=project(ahead), last=points)


def _arrive(state: _State, loss: Tensor, gradient: Tensor) -> _State:
    """The state with what its points were answered."""
    better = loss > state.top_loss
    rows = better.nonzero()[:, 0]
    put(rows, state.points, state.top, state.spare)
    put(rows, gradient, state.top_gradient, state.spare)
    return replace(
        state,
        loss=loss,
        gradient=gradient,
        top_loss=torch.where(better, loss, state.top_loss),
        rises=state.rises + (loss > state.loss),
    )


def _halve(state: _State, window: int) -> _State:
    """Halve eta and go back to the best point wherever the last `window` steps ask for it."""
    oscillates = state.rises < RISING * window
    stalls = ~state.halved & (state.top_loss <= state.mark)
    halved = oscillates | stalls
    rows, gradient = halved.nonzero()[:, 0], state.gradient.clone()
    put(rows, state.top, state.points, state.spare)
    put(rows, state.top, state.last, state.spare)
    put(rows, state.top_gradient, gradient, state.spare)
    return replace(
        state,
        loss=torch.where(halved, state.top_loss, state.loss),
        gradient=gradient,
        eta=torch.where(halved, state.eta / 2, state.eta),
        rises=torch.zeros_like(state.rises),
        halved=halved,
        mark=state.top_loss,
    )

"""Walk the recorded path step by step; replay the steps between two stored states and check where they end.

A replayed step recomputes the gradients of its batches at w_j in training mode, gives them to torch's own optimizer
(`resume`), and so reaches w_{j+1}. At the next stored state the replay is compared with what training really
reached: `drift` is the distance between them, beyond rounding, over the length of the interval; the larger one of
weights and running statistics. Other data, another loss, or randomness that was not recorded shows there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from brittle.errors import PathMismatchError
from brittle.path.checkpoints import Checkpoints
from brittle.path.flat import FlatModel
from brittle.path.observed import Snapshot, Step
from brittle.path.optimizers import MOMENTS, Moments, step_rule
from brittle.path.recipe import OBSERVED, Recipe
from brittle.path.rerun import batch_gradient
from brittle.path.resume import Resumed
from brittle.path.rules import StepRule, scaled
from brittle.path.store import PathReader
from brittle.path.walked import Interval, WalkedStep, length_taken, share_of
from brittle.subject import Subject

DRIFT_LIMIT = 0.01
"""Drift above which a path is taken to belong to another training."""

NOISE = 1e-4
"""Share of the largest gradient below which Adam's steps may follow rounding errors."""

BESIDE = 1e-5
"""How far a factor may lie beside a power of two, in powers of two, to be put to it."""

Path = PathReader | Checkpoints
"""What can be walked: a recorded path, or the checkpoints that are left of one."""


def intervals(path: Path, reverse: bool = False) -> list[tuple[int, int]]:
    """The stretches [start, stop) between stored states, in or against the order of training."""
    found = list(pairwise(path.marks))
    return found[::-1] if reverse else found


def walk(
    path: Path,
    subject: Subject,
    flat: FlatModel,
    reverse: bool = False,
    part: tuple[int, int] | None = None,
) -> Iterator[Interval]:
    """The intervals of the path, replayed where a state was not stored. Raises `PathMismatchError` on drift.

    part: leave out the intervals that have no step in [start, stop).
    """
    first, last = part or (0, path.steps)
    for start, stop in intervals(path, reverse):
        if start >= last or stop <= first:
            continue
        if isinstance(path, Checkpoints):
            yield path.interval(subject, flat, start)
        else:
            yield replay(path, subject, flat, start, stop)


def replay(path: PathReader, subject: Subject, flat: FlatModel, start: int, stop: int) -> Interval:
    """The steps from `start` up to `stop`, two neighbouring marks of the path.

    A single step needs no replay: its end is stored, and with it what the optimizer holds. Under an optimizer whose
    rule is not known, the states between two stored ones are interpolated.
    """
    before, after = (path.snapshot(at).to(flat.state.device) for at in (start, stop))
    if stop == start + 1 or path.optimizer == OBSERVED:
        moments, length = moments_of(path, after, flat), stop - start
        states = [torch.lerp(before.state, after.state, k / length) for k in range(length)]
        steps = [_stored(path, subject, flat, start + k, state, moments) for k, state in enumerate(states)]
        return Interval(steps, after.state, 0.0)
    steps, drift = retrace(path, subject, flat, before, after)
    if not drift <= DRIFT_LIMIT:
        raise PathMismatchError(
            f"the path must replay: from step {start} to {stop} it ends {drift:.2%} of the way off; the model, loss, "
            "training data or their order differ from what was recorded, training drew random numbers outside the "
            "model, or it amplifies rounding errors (then record with a larger budget=)"
        )
    return Interval(steps, after.state, drift)


def retrace(
    path: PathReader, subject: Subject, flat: FlatModel, before: Snapshot, after: Snapshot
) -> tuple[list[WalkedStep], float]:
    """Replay from one stored state to the next: the steps, and how far off it ends."""
    flat.load(before.state)
    optimizer = Resumed(path.optimizer, path.step(before.step), flat, before)
    steps = []
    for index in range(before.step, after.step):
        seen, recipe, state = path.step(index), path.recipe(index).to(flat.state.device), flat.state.clone()
        moves = moves_of(recipe)
        total = step_gradient(subject, flat, seen, moves)  # the loss moves the running statistics
        recipe = known(recipe, seen, total)
        optimizer.spend(seen, clipped(recipe, seen, total))
        if seen.statistics is not None:
            flat.state[flat.parameters :] = seen.statistics.to(flat.state)
        steps.append(WalkedStep(index, state, seen, _rule(recipe, seen, optimizer.moments(), total), moves))
    noise = _noise(flat, moments_of(path, after, flat))
    return steps, drift_of(before.state, flat.state.clone(), after.state, flat.parameters, noise)


def step_gradient(subject: Subject, flat: FlatModel, seen: Step, moves: Tensor | None) -> Tensor:
    """The gradient that backward left behind for a step, added up over its batches, (P,)."""
    total = torch.zeros_like(flat.state)
    for batch in seen.batches:
        own = batch_gradient(subject, flat, batch, seen.manner.resting)
        total.add_(own, alpha=share_of(seen, batch, length_taken(own, moves)))
    return total


def clipped(recipe: Recipe, seen: Step, total: Tensor) -> Tensor:
    """A step's gradient (P,) as the optimizer got it: clamp(c g, -v, v)."""
    spent = scaled(recipe.where_held(recipe.factors, rest=1.0), total)
    if not seen.cut:
        return spent
    bound = torch.as_tensor(recipe.over(seen.bounds, rest=math.inf)).to(spent)
    return torch.minimum(torch.maximum(spent, -bound), bound)


def known(recipe: Recipe, seen: Step, total: Tensor) -> Recipe:
    """The recipe with its factor c, where only the length of what the optimizer got is known.

    So it is where clipping by value hid c, or where gradients were averaged over processes. |clamp(c g, -v, v)| grows
    with c, so bisect; c is put to a power of two where it lies beside one, as a gradient scaler's does.
    """
    if not seen.length:
        return recipe
    moves = moves_of(recipe)
    taken = total if moves is None else total * moves
    at = lambda c: replace(recipe, factors=torch.full_like(recipe.factors, c))  # noqa: E731
    low, high = -60.0, 60.0  # in powers of two
    if not seen.cut:
        low = high = math.log2(seen.length / taken.double().norm().clamp_min(1e-300).item())
    while high - low > 1e-9:
        middle = (low + high) / 2
        long = clipped(at(2.0**middle), seen, taken).double().norm().item() > seen.length
        low, high = (low, middle) if long else (middle, high)
    return at(2.0 ** (round(high) if abs(high - round(high)) < BESIDE else high))


def moves_of(recipe: Recipe) -> Tensor | None:
    """The coordinates whose gradients a step takes, (P,) bool; None where those are all that have gradients."""
    moved = recipe.over((recipe.factors != 0).double(), rest=0.0)
    return moved > 0 if isinstance(moved, Tensor) else None


def drift_of(before: Tensor, reached: Tensor, recorded: Tensor, parameters: int, noise: Tensor | None = None) -> float:
    """How far a replay from `before` ends off the recorded state, over the length of the way. All (P,).

    Steps that are shorter than the rounding of the weights, as at the end of a schedule, cannot be told apart: a
    distance of one rounding error a coordinate is left out, and so are coordinates that are `noise`.
    """
    off, way = (reached - recorded).double(), (recorded - before).double()
    if noise is not None:
        off, way = off * ~noise, way * ~noise
    parts = []
    for part in (slice(None, parameters), slice(parameters, None)):
        rounding = torch.finfo(recorded.dtype).eps * recorded[part].double().norm()
        parts.append(((off[part].norm() - rounding).clamp_min(0) / way[part].norm().clamp_min(1e-30)).item())
    return torch.tensor(parts).max().item()  # NaN, if either is


def moments_of(path: PathReader, snapshot: Snapshot, flat: FlatModel) -> Moments:
    """What the rule reads of a stored state, over the whole of it: each (P,)."""
    names = [name for name in MOMENTS.get(path.optimizer, ()) if name in snapshot.buffers]
    return {name: pad(snapshot.buffers[name], (0, len(flat) - flat.parameters)) for name in names}


def _stored(
    path: PathReader, subject: Subject, flat: FlatModel, index: int, state: Tensor, moments: Moments
) -> WalkedStep:
    """A step from a known state. Its gradient is needed only where it says how it was clipped."""
    seen, recipe = path.step(index), path.recipe(index).to(flat.state.device)
    moves, total = moves_of(recipe), None
    if seen.cut or seen.length:
        flat.load(state)
        total = step_gradient(subject, flat, seen, moves)
        recipe = known(recipe, seen, total)
    return WalkedStep(index, state, seen, _rule(recipe, seen, moments, total), moves)


def _rule(recipe: Recipe, seen: Step, moments: Moments, total: Tensor | None) -> StepRule:
    """The step's coefficients; where it was clipped by value, by how much each coordinate of its gradient (P,) was."""
    rule = step_rule(recipe, moments)
    if not seen.cut or total is None:
        return rule
    cut = torch.where(total == 0, 1.0, clipped(recipe, seen, total) / torch.where(total == 0, 1.0, total))
    return replace(rule, clip=recipe.where_held(recipe.sign, rest=1.0) * cut)


def _noise(flat: FlatModel, moments: Moments) -> Tensor | None:
    """Coordinates that cannot be replayed on another machine: (P,) bool, None for SGD.

    Where the gradient vanishes but for rounding, as for a bias before batch normalization, Adam divides rounding
    errors by their own size. The running means behind such biases move with them.
    """
    if not moments:
        return None
    name, size = next(iter(moments.items()))
    size = size if name == "exp_inf" else size.sqrt()
    noise = size <= NOISE * size.max()
    noise[flat.parameters :] = False
    for slot in flat.slots:
        if slot.name.endswith("running_mean"):
            noise[slot.start : slot.stop] = True
    return noise

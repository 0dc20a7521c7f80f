"""Walk the recorded path step by step; replay the steps between two stored states and check where they end.

A replayed step recomputes the batch's gradient at w_j in training mode, gives it to torch's own optimizer
(`resume`), and so reaches w_{j+1}. At the next stored state the replay is compared with what training really
reached: `drift` is the distance between them, beyond rounding, over the length of the interval; the larger one of
weights and running statistics. Other data, another loss, or randomness that was not recorded shows there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from brittle.errors import NotFiniteError, PathMismatchError
from brittle.path.flat import FlatModel, layout, state_of
from brittle.path.resume import resume, second_moment, spend
from brittle.path.rules import StepRule, step_rule
from brittle.path.store import PathReader, Snapshot
from brittle.subject import Subject

DRIFT_LIMIT = 0.01
"""Drift above which a path is taken to belong to another training."""

NOISE = 1e-4
"""Share of the largest gradient below which Adam's steps may follow rounding errors."""


@dataclass(frozen=True)
class WalkedStep:
    """One step of the path: the state before it, its examples, and how its gradient was spent."""

    index: int
    state: Tensor  # shape: (P,)
    ids: Tensor  # shape: (B,)
    rule: StepRule


@dataclass(frozen=True)
class Interval:
    """The steps between two stored states, `end` being the state after the last."""

    steps: list[WalkedStep]
    end: Tensor  # shape: (P,)
    drift: float

    def states(self) -> list[Tensor]:
        """The states before every step, and the end."""
        return [*(s.state for s in self.steps), self.end]


def intervals(path: PathReader, reverse: bool = False) -> list[tuple[int, int]]:
    """The stretches [start, stop) between stored states, in or against the order of training."""
    found = list(pairwise(path.marks))
    return found[::-1] if reverse else found


def walk(path: PathReader, subject: Subject, flat: FlatModel, reverse: bool = False) -> Iterator[Interval]:
    """The intervals of the path, replayed where a state was not stored. Raises `PathMismatchError` on drift."""
    for start, stop in intervals(path, reverse):
        yield replay(path, subject, flat, start, stop)


def replay(path: PathReader, subject: Subject, flat: FlatModel, start: int, stop: int) -> Interval:
    """The steps from `start` up to `stop`, two neighbouring marks of the path.

    A single step needs no gradient: its end is stored, and with it Adam's second moment.
    """
    before, after = (path.snapshot(at).to(flat.state.device) for at in (start, stop))
    if stop == start + 1:
        seen = path.step(start)
        rule = step_rule(path.recipe(start).to(flat.state.device), _second_moment(after, len(flat)))
        return Interval([WalkedStep(start, before.state, seen.ids, rule)], after.state, drift=0.0)
    steps, drift = _retrace(path, subject, flat, before, after)
    if not drift <= DRIFT_LIMIT:
        raise PathMismatchError(
            f"the path must replay: from step {start} to {stop} it ends {drift:.2%} of the way off; the model, loss, "
            "training data or their order differ from what was recorded, or training drew random numbers"
        )
    return Interval(steps, after.state, drift)


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


def training_loss(subject: Subject, flat: FlatModel, ids: Tensor) -> Tensor:
    """The loss of one recorded step at the flat model's present state, in training mode; a scalar."""
    device = flat.state.device
    inputs, targets = subject.train.inputs[ids].to(device), subject.train.targets[ids].to(device)
    loss = subject.loss_of(subject.run(flat.train(), inputs.to(flat.state.dtype)), targets)
    if not loss.isfinite():
        raise NotFiniteError(f"the training loss must be finite, found {loss.item()} while replaying the path")
    return loss


def batch_gradient(subject: Subject, flat: FlatModel, ids: Tensor) -> Tensor:
    """Gradient of a step's loss with respect to the state, shape (P,); 0 for buffers."""
    return flat.gradient(lambda: training_loss(subject, flat, ids))


def check_path(path: PathReader, subject: Subject) -> None:
    """Check that the path belongs to this model and this training data, at the door.

    Compares the architecture and the final weights, and replays single steps at the beginning, the middle and
    the end. Raises `PathMismatchError` with what differs.
    """
    mine = [(s.name, tuple(s.shape), s.buffer) for s in layout(subject.model)]
    if mine != path.slots:
        raise PathMismatchError(
            f"the path was recorded with {_describe(path.slots)}, this model has {_describe(mine)}; "
            "audit it with the model it was recorded from"
        )
    final, reached = state_of(subject.model).cpu().double(), path.snapshot(path.steps).state.double()
    if not torch.allclose(final, reached, rtol=1e-4, atol=1e-6):
        raise PathMismatchError(
            f"the path must end at the audited weights, they differ by up to {(final - reached).abs().max():.3g}; "
            "load the weights that this training ended with, or record it again"
        )
    if path.largest_id >= len(subject.train):
        raise PathMismatchError(
            f"the path's ids must be positions in the {len(subject.train)} training examples, it names "
            f"{path.largest_id}; pass the data that the recorded training drew from, in its order"
        )
    flat = FlatModel(subject.model)
    for step in sorted({0, path.steps // 2, path.steps - 1}):
        start, stop = next((a, b) for a, b in intervals(path) if a <= step < b)
        before, after = (path.snapshot(at).to(flat.state.device) for at in (start, stop))
        _, off = _retrace(path, subject, flat, before, after)
        if not off <= DRIFT_LIMIT:
            raise PathMismatchError(
                f"recomputing step {step} must reproduce the recorded weights, it ends {off:.0%} of the step off; "
                "the training data, their order (ids), the loss or the normalization differ from the training's, or "
                "its inputs were augmented; hand over what it saw, or audit without a path"
            )


def _retrace(
    path: PathReader, subject: Subject, flat: FlatModel, before: Snapshot, after: Snapshot
) -> tuple[list[WalkedStep], float]:
    """Replay from one stored state to the next: the steps, and how far off it ends."""
    steps, reached = _run(path, subject, flat, before, after.step)
    return steps, drift_of(before.state, reached, after.state, flat.parameters, _noise(flat, after))


def _run(
    path: PathReader, subject: Subject, flat: FlatModel, before: Snapshot, stop: int
) -> tuple[list[WalkedStep], Tensor]:
    """Replay from a snapshot up to step `stop`: the steps, and the state reached."""
    flat.load(before.state)
    optimizer = resume(path.recipe(before.step), flat, before)
    steps = []
    for index in range(before.step, stop):
        ids, recipe, state = path.step(index).ids, path.recipe(index).to(flat.state.device), flat.state.clone()
        spend(optimizer, recipe, flat, batch_gradient(subject, flat, ids))  # the loss moves the running statistics
        steps.append(WalkedStep(index, state, ids, step_rule(recipe, second_moment(optimizer, flat))))
    return steps, flat.state.clone()


def _noise(flat: FlatModel, after: Snapshot) -> Tensor | None:
    """Coordinates that cannot be replayed on another machine: (P,) bool, None for SGD.

    Where the gradient vanishes but for rounding, as for a bias before batch normalization, Adam divides rounding
    errors by their own size. The running means behind such biases move with them.
    """
    moment = _second_moment(after, len(flat))
    if moment is None:
        return None
    size = moment.sqrt()
    noise = size <= NOISE * size.max()
    noise[flat.parameters :] = False
    for slot in flat.slots:
        if slot.name.endswith("running_mean"):
            noise[slot.start : slot.stop] = True
    return noise


def _second_moment(snapshot: Snapshot, size: int) -> Tensor | None:
    """Adam's `exp_avg_sq` over the whole state, shape (P,); None for SGD."""
    moment = snapshot.buffers.get("exp_avg_sq")
    return None if moment is None else pad(moment, (0, size - len(moment)))


def _describe(slots: list[tuple[str, tuple[int, ...], bool]]) -> str:
    name, shape, _ = slots[-1]
    return f"{len(slots)} tensors, the last {name} {shape}"

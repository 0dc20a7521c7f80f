"""Does a path belong to a model and its training data? Checked at the door, before anything is computed from it."""

from __future__ import annotations

import math

import torch

from brittle.errors import PathMismatchError
from brittle.path.flat import FlatModel, layout, state_of
from brittle.path.forwards import ForwardWatch
from brittle.path.observed import NOT_DESCRIBED, Batch, Step
from brittle.path.recipe import OBSERVED
from brittle.path.replay import DRIFT_LIMIT, intervals, moves_of, retrace
from brittle.path.rerun import batch_gradient, batch_inputs, batch_targets, training_loss
from brittle.path.store import PathReader
from brittle.path.walked import length_taken, plain_share
from brittle.subject import Subject

CAUSES = (
    "the labels, the loss, the normalization or the modules in training mode differ from the training's; hand over "
    "what it used, or audit without a path"
)

SAME = 1e-3
"""Relative difference up to which two descriptions of a batch's inputs are the same."""


def check_path(path: PathReader, subject: Subject) -> None:
    """Check that the path belongs to this model and this training data.

    Compares the architecture, the final weights and what the model was called with, and replays the steps between
    stored states at the beginning, the middle and the end. Raises `PathMismatchError` with what differs.
    """
    mine = [(s.name, tuple(s.shape), s.buffer) for s in layout(subject.model)]
    if mine != path.slots:
        raise PathMismatchError(
            f"the path was recorded with {_named(path.slots)}, this model has {_named(mine)}; "
            "audit it with the model it was recorded from"
        )
    final, reached = state_of(subject.model).cpu().double(), path.final().double()
    if not torch.allclose(final, reached, rtol=1e-4, atol=1e-6):
        which = "averaged weights (average=)" if path.average is not None else "weights"
        raise PathMismatchError(
            f"the path must end at the audited weights, its {which} differ from them by up to "
            f"{(final - reached).abs().max():.3g}; load the weights that this training ended with, or record it again"
        )
    if path.largest_id >= len(subject.train):
        raise PathMismatchError(
            f"the path's ids must be positions in the {len(subject.train)} training examples, it names "
            f"{path.largest_id}; pass the data that the recorded training drew from, in its order"
        )
    flat = FlatModel(subject.model)
    places = sorted({0, path.steps // 2, path.steps - 1})
    stretches = [next((a, b) for a, b in intervals(path) if a <= step < b) for step in places]
    for start, stop in stretches:
        flat.load(path.snapshot(start).state.to(flat.state.device))
        _check_inputs(subject, flat, path.step(start), start)
        if path.optimizer != OBSERVED:
            _check_steps(path, subject, flat, start, stop)
    if path.optimizer == OBSERVED:
        _check_lengths(path, subject, flat, [start for start, _ in stretches])


def _check_steps(path: PathReader, subject: Subject, flat: FlatModel, start: int, stop: int) -> None:
    """Replay the steps between two stored states."""
    before, after = (path.snapshot(at).to(flat.state.device) for at in (start, stop))
    _, off = retrace(path, subject, flat, before, after)
    if not off <= DRIFT_LIMIT:
        raise PathMismatchError(
            f"recomputing step {start} must reproduce the recorded weights, from there to step {stop} it ends "
            f"{off:.0%} of the way off though the inputs are the same; {CAUSES}"
        )


def _check_lengths(path: PathReader, subject: Subject, flat: FlatModel, steps: list[int]) -> None:
    """Where steps cannot be replayed, hold the lengths of gradients against the recorded ones: one ratio for all."""
    ratios = []
    for step in steps:
        seen, batch = path.step(step), path.step(step).batches[0]
        flat.load(path.snapshot(step).state.to(flat.state.device))
        moves, gradient = moves_of(path.recipe(step)), batch_gradient(subject, flat, batch, seen.manner.resting)
        size = length_taken(gradient, moves)
        if size and batch.norm and plain_share(seen, batch, batch.norm / size) is None:
            ratios.append(batch.norm / size)
    if ratios and (len(ratios) < len(steps) or max(ratios) > (1 + DRIFT_LIMIT) * min(ratios)):
        raise PathMismatchError(
            "recomputing a step must give gradients of the recorded length, or of one multiple of it, found "
            f"{ratios[0]:.3g} times that at step {steps[0]} and {ratios[-1]:.3g} elsewhere though the inputs are the "
            f"same; {CAUSES}"
        )


def _check_inputs(subject: Subject, flat: FlatModel, seen: Step, step: int) -> None:
    """Hold what the model is called with against what it was called with in training."""
    for batch in seen.batches:
        inputs, targets = batch_inputs(subject, batch), batch_targets(subject, batch)
        if len(inputs) != len(targets):
            raise PathMismatchError(f"step {step} has {len(inputs)} inputs and {len(targets)} targets; record it again")
        found = _seen_now(subject, flat, batch, seen)
        pairs = list(zip(batch.seen, found, strict=True))
        known = not any(math.isnan(v) for pair in pairs for v in pair)
        scale = abs(batch.seen[1]) or 1.0
        if known and any(abs(a - b) > SAME * scale for a, b in pairs):
            raise PathMismatchError(
                f"the training data must be those of the recorded training, the inputs of step {step} had mean "
                f"{batch.seen[0]:.4g} and root mean square {batch.seen[1]:.4g}, now {found[0]:.4g} and {found[1]:.4g}; "
                "pass the same data in the same order and normalization, and augment= (or store the inputs, "
                "recorder.batch(ids, inputs=...)) where training augmented them"
            )


def _seen_now(subject: Subject, flat: FlatModel, batch: Batch, seen: Step) -> tuple[float, float, float]:
    watch = ForwardWatch(flat.model)
    state = flat.state.clone()
    try:
        training_loss(subject, flat, batch, seen.manner.resting)
        return watch.last.seen if watch.last else NOT_DESCRIBED
    finally:
        watch.close()
        flat.load(state)


def _named(slots: list[tuple[str, tuple[int, ...], bool]]) -> str:
    name, shape, _ = slots[-1]
    return f"{len(slots)} tensors, the last {name} {shape}"

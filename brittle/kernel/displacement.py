"""What each group of examples did to the weights, segment by segment, while the path is walked forward.

Every group has an optimizer buffer of its own (`rules.advance`), and so has decay. Every supported step is linear in
its gradients, so the groups' displacements and the decay's add up to the step:

    sum_g U[t, g] + decay_t = w_b - w_a        for every segment t from a to b.

Where the audited weights are averaged ones, a last segment leads to them, in which every step is taken back by
what the average lacks of it: U[T, g] = - sum_s behind_s U_s,g.

What moves without a gradient but rounding (biases before batch normalization) goes with the buffers, as in `sweep`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
import torch
from torch import Tensor

from brittle.kernel.steps import check_step, step_pieces
from brittle.path.flat import FlatModel
from brittle.path.observed import Batch
from brittle.path.replay import Path, walk
from brittle.path.rules import advance
from brittle.path.walked import WalkedStep
from brittle.records import Groups, Progress
from brittle.subject import Subject

STRIDES = 4
"""Lines by which the length of a segment is measured."""


@dataclass(frozen=True)
class Displaced:
    """One segment while the path is walked: its ends, and what each group displaced; decay and buffers last."""

    low: Tensor  # shape: (P,)
    high: Tensor  # shape: (P,)
    moved: Tensor  # shape: (G + 1, P)


def displaced(
    path: Path,
    subject: Subject,
    groups: Groups,
    cuts: Sequence[int],
    device: str = "cpu",
    progress: Progress | None = None,
) -> Iterator[Displaced]:
    """Walk the path forward and yield the segments between `cuts` (steps, from 0 to the last), and the averaging."""
    flat = FlatModel(subject.model, device)
    labels = groups.labels.to(device)
    buffers = flat.state.new_zeros(len(groups) + 1, len(flat))
    moved, lacking, stops = torch.zeros_like(buffers), torch.zeros_like(buffers), set(cuts[1:])
    low: Tensor | None = None
    hidden = torch.zeros(0, dtype=torch.int64)
    for interval in walk(path, subject, flat):
        for step, after in zip(interval.steps, interval.states()[1:], strict=True):
            if low is None:
                low = step.state
                hidden = check_step(subject, flat, step)
            buffers, gone = _split_step(subject, flat, step, labels, buffers)
            gone[-1, hidden] += (after - step.state)[hidden] - gone[:, hidden].sum(0)
            moved += gone
            if path.average is not None:
                lacking -= float(path.behind[step.index]) * gone
            if progress:
                progress(step.index + 1, path.steps)
            if step.index + 1 in stops:
                moved[-1, flat.parameters :] = (after - low)[flat.parameters :].to(moved)
                yield Displaced(low, after, moved)
                low, moved = after, torch.zeros_like(buffers)
    if path.average is not None and low is not None:
        high = path.average.to(low)
        lacking[-1, flat.parameters :] = (high - low)[flat.parameters :]
        yield Displaced(low, high, lacking)


def even_cuts(steps: int, segments: int) -> list[int]:
    """Step numbers that cut the path into `segments` (fewer where it is shorter)."""
    cuts = torch.linspace(0, steps, min(segments, steps) + 1, dtype=torch.float64)
    return cuts.round().long().unique().tolist()


def length_cuts(path: Path, at: Sequence[int], segments: int) -> list[int]:
    """The places in `at` (steps, from 0 to the last) that cut the path into `segments` segments of equal length.

    There are fewer where that is not fine enough. Lengths are those of lines between stored states, `STRIDES` for each
    segment at most; training is fast where the learning rate is high and the loss is steep.
    """
    if segments >= len(at) - 1:
        return list(range(len(at)))
    stride = max(1, len(path.marks) // (STRIDES * segments))
    marks = sorted({*path.marks[::stride], path.steps})
    states = (path.snapshot(mark).state for mark in marks)
    lengths = [(high - low).double().norm().item() for low, high in pairwise(states)]
    along = np.interp(at, marks, np.cumsum([0.0, *lengths]))
    wanted = np.linspace(0, along[-1], segments + 1)
    return sorted({0, len(at) - 1, *np.abs(along[:, None] - wanted).argmin(0).tolist()})


def joined(parts: Iterable[Displaced], cuts: Sequence[int]) -> Iterator[Displaced]:
    """Longer segments: the parts between cuts (numbers of parts, from 0) as one; what comes after them is passed on."""
    coming = iter(parts)
    for a, b in pairwise(cuts):
        first = last = next(coming)
        moved = first.moved.clone()
        for last in islice(coming, b - a - 1):
            moved += last.moved
        yield Displaced(first.low, last.high, moved)
    yield from coming


def _split_step(
    subject: Subject, flat: FlatModel, step: WalkedStep, labels: Tensor, buffers: Tensor
) -> tuple[Tensor, Tensor]:
    """One step's displacement by group, decay last: the new buffers and what they moved, (G + 1, P)."""
    by_group = torch.zeros_like(buffers)
    for batch in step.batches:
        by_group += _by_group(subject, flat, step, batch, labels, len(buffers))
    kept, moved = advance(step.rule, buffers[:-1], by_group[:-1], None)
    decay_kept, decay_moved = advance(step.rule, buffers[-1], by_group[-1], step.state.to(by_group))
    return torch.cat([kept, decay_kept[None]]), torch.cat([moved, decay_moved[None]])


def _by_group(subject: Subject, flat: FlatModel, step: WalkedStep, batch: Batch, labels: Tensor, count: int) -> Tensor:
    """The gradient of one batch, group by group, (G + 1, P)."""
    ids, shares = batch.credited(torch.ones(len(batch), dtype=flat.state.dtype))
    members = torch.zeros(count, len(batch), dtype=flat.state.dtype, device=flat.state.device)
    rows_of = torch.arange(len(batch)).repeat_interleave(len(ids) // len(batch))
    members.index_put_((labels[ids.to(labels.device)], rows_of), shares.to(members), accumulate=True)
    out, total = flat.state.new_zeros(count, len(flat)), torch.zeros_like(flat.state)
    for columns, rows, weight in step_pieces(subject, flat, step, batch):
        out[:, columns], total[columns] = weight * (members @ rows), weight * rows.sum(0)
        del rows
    return out.mul_(step.share(batch, step.length(total)))

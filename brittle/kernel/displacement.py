"""What each group of examples did to the weights, segment by segment, while the path is walked forward.

Every group has an optimizer buffer of its own (`rules.advance`), and so has decay. Every supported step is linear in
its gradients, so the groups' displacements and the decay's add up to the step:

    sum_g U[t, g] + decay_t = w_b - w_a        for every segment t from a to b.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.kernel.sweep import check_step, step_rows
from brittle.path.flat import FlatModel
from brittle.path.replay import WalkedStep, walk
from brittle.path.rules import advance
from brittle.path.store import PathReader
from brittle.records import Groups, Progress
from brittle.subject import Subject


@dataclass(frozen=True)
class Displaced:
    """One segment while the path is walked: its ends, and what each group displaced; decay and buffers last."""

    low: Tensor  # shape: (P,)
    high: Tensor  # shape: (P,)
    moved: Tensor  # shape: (G + 1, P)


def displaced(
    path: PathReader,
    subject: Subject,
    groups: Groups,
    cuts: Sequence[int],
    device: str = "cpu",
    progress: Progress | None = None,
) -> Iterator[Displaced]:
    """Walk the path forward and yield the segments between `cuts` (steps, from 0 to the last)."""
    flat = FlatModel(subject.model, device)
    labels = groups.labels.to(device)
    buffers = flat.state.new_zeros(len(groups) + 1, len(flat))
    moved, stops = torch.zeros_like(buffers), set(cuts[1:])
    low: Tensor | None = None
    for interval in walk(path, subject, flat):
        for step, after in zip(interval.steps, interval.states()[1:], strict=True):
            if low is None:
                low = step.state
                check_step(subject, flat, step)
            buffers, gone = _split_step(subject, flat, step, labels, buffers)
            moved += gone
            if progress:
                progress(step.index + 1, path.steps)
            if step.index + 1 in stops:
                moved[-1, flat.parameters :] = (after - low)[flat.parameters :].to(moved)
                yield Displaced(low, after, moved)
                low, moved = after, torch.zeros_like(buffers)


def even_cuts(steps: int, segments: int) -> list[int]:
    """Step numbers that cut the path into `segments` stretches (fewer where it is shorter)."""
    cuts = torch.linspace(0, steps, min(segments, steps) + 1, dtype=torch.float64)
    return cuts.round().long().unique().tolist()


def _split_step(
    subject: Subject, flat: FlatModel, step: WalkedStep, labels: Tensor, buffers: Tensor
) -> tuple[Tensor, Tensor]:
    """One step's displacement by group, decay last: the new buffers and what they moved, (G + 1, P)."""
    rows = step_rows(subject, flat, step)
    by_group = torch.zeros_like(buffers).index_add_(0, labels[step.ids.to(labels.device)], rows)
    kept, moved = advance(step.rule, buffers[:-1], by_group[:-1], None)
    decay_kept, decay_moved = advance(step.rule, buffers[-1], by_group[-1], step.state.to(rows))
    return torch.cat([kept, decay_kept[None]]), torch.cat([moved, decay_moved[None]])

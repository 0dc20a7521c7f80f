"""The group memory: what each group of examples did to the weights, summed up once.

For segments t of the path and groups g of training examples, U[t, g] (P,) is the displacement credited to the
group, so that sum_g U[t, g] + decay = w_b - w_a for every segment. Afterwards

    mass of g at any input x = sum_t <Jbar_t(x), U[t, g]>

without a visit to the training data, at a cost that does not depend on N: a superposition of the examples, as in
Domingos 2020 (arXiv 2012.00152). Walking *forward*, every group has its own optimizer buffer (`rules.advance`),
so the split is exact for every supported optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brittle.kernel.quadrature import BLOCK, blocks, check_outputs, midpoints, output_gradients
from brittle.kernel.sweep import check_step, step_rows
from brittle.path.flat import FlatModel
from brittle.path.replay import WalkedStep, walk
from brittle.path.rules import advance
from brittle.path.store import PathReader
from brittle.records import Groups, Pairs
from brittle.subject import Subject

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Memory:
    """Displacements by segment and group; the last row of each segment is what decay and the buffers did.

    `ends[t]` and `ends[t + 1]` are the states at both ends of segment t, `nodes` the midpoints taken in each.
    """

    ends: Tensor  # shape: (T + 1, P)
    displacements: Tensor  # shape: (T, G + 1, P)
    nodes: int

    @property
    def segments(self) -> int:
        return len(self.displacements)

    @property
    def evaluations(self) -> int:
        """Gradient passes that the mass of one input costs."""
        return self.segments * self.nodes

    def points(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every node: the state there (P,), and the displacements (G + 1, P) weighted for it."""
        for t in range(self.segments):
            for share in midpoints(self.nodes):
                yield torch.lerp(self.ends[t], self.ends[t + 1], share), self.displacements[t] / self.nodes

    def by_class(self, groups: Groups, classes: int) -> Memory:
        """The same memory with the groups of each class summed up."""
        t, _, p = self.displacements.shape
        sums = self.displacements.new_zeros(t, classes + 1, p)
        sums.index_add_(1, groups.classes, self.displacements[:, :-1])
        sums[:, -1] = self.displacements[:, -1]
        return Memory(self.ends, sums, self.nodes)

    def merged(self, segments: int, nodes: int = 1) -> Memory:
        """The same memory in fewer, longer segments: cheaper, less exact."""
        cuts = torch.linspace(0, self.segments, min(segments, self.segments) + 1).round().long().tolist()
        sums = [self.displacements[a:b].sum(0) for a, b in pairwise(cuts)]
        return Memory(self.ends[cuts], torch.stack(sums), nodes)


def build(
    path: PathReader,
    subject: Subject,
    groups: Groups,
    segments: int = 100,
    nodes: int = 2,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Memory:
    """The memory of a recorded path in `segments` stretches of equal length along the path.

    Raises `UnsupportedError` where the model cannot be taken apart by examples.
    Cost: one walk along the path with row gradients; (T + 1) x P and T x (G + 1) x P numbers.
    """
    check_outputs(subject, FlatModel(subject.model, device))
    cuts = even_cuts(path.steps, segments)
    first = path.snapshot(0).state
    ends = first.new_empty(len(cuts), len(first))
    moved = first.new_empty(len(cuts) - 1, len(groups) + 1, len(first))
    for t, part in enumerate(displaced(path, subject, groups, cuts, device, progress)):
        ends[t], ends[t + 1], moved[t] = part.low, part.high, part.moved
    return Memory(ends, moved, nodes)


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


def mass(
    memory: Memory,
    subject: Subject,
    inputs: Tensor,
    pairs: Pairs,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Tensor:
    """Mass by group and, in the last column, what decay and buffers did: (R, G + 1), logits, float64.

    Cost: `memory.evaluations` gradient passes an input, whatever the size of the training set.
    """
    total = torch.zeros(len(inputs), memory.displacements.shape[1], dtype=torch.float64)
    return _add_mass(total, memory, subject, FlatModel(subject.model, device), inputs, pairs, progress)


def differentiable_mass(memory: Memory, subject: Subject, device: str = "cpu") -> Callable[[Tensor, Pairs], Tensor]:
    """The mass of any input as a function that can be differentiated in the input; decay is left out.

    Returns a function (inputs (R, *input), pairs) -> (R, G) in the weights' precision. One call costs
    `memory.evaluations` gradient passes an input, its backward pass about as much again; attacks call it on a
    `merged` memory.
    """
    flat = FlatModel(subject.model, device)
    whole, size = _Margin(subject, flat.eval()), flat.parameters

    def margin(parameters: Tensor, statistics: Tensor, x: Tensor, sign: Tensor) -> Tensor:
        state = torch.cat([parameters, statistics])
        named = {f"model.{s.name}": state[s.start : s.stop].view(s.shape) for s in flat.slots}
        return torch.func.functional_call(whole, named, (x, sign))

    gradients = torch.func.vmap(torch.func.grad(margin), in_dims=(None, None, 0, 0))

    def mass_of(inputs: Tensor, pairs: Pairs) -> Tensor:
        x = inputs.to(flat.state)
        sign = (F.one_hot(pairs.predicted, subject.classes) - F.one_hot(pairs.rival, subject.classes)).to(x)
        total = x.new_zeros(len(x), memory.displacements.shape[1] - 1)
        for state, moved in memory.points():
            state = state.to(x)
            jacobian = gradients(state[:size], state[size:], x, sign)  # shape: (R, parameters)
            total = total + jacobian @ moved[:-1, :size].to(x).T
        return total

    return mass_of


def fine_mass(
    path: PathReader,
    subject: Subject,
    groups: Groups,
    inputs: Tensor,
    pairs: Pairs,
    segments: int,
    nodes: int,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Tensor:
    """The same mass from a finer account that is used up as it is walked and never stored: (R, G + 1)."""
    total = torch.zeros(len(inputs), len(groups) + 1, dtype=torch.float64)
    flat = FlatModel(subject.model, device)
    for part in displaced(path, subject, groups, even_cuts(path.steps, segments), device, progress):
        piece = Memory(torch.stack([part.low, part.high]), part.moved[None], nodes)
        _add_mass(total, piece, subject, flat, inputs, pairs, None)
    return total


class _Margin(nn.Module):
    """One input's logits times `sign`, with the model as a child: so that its tensors can be replaced by name."""

    def __init__(self, subject: Subject, model: nn.Module) -> None:
        super().__init__()
        self.model, self._subject = model, subject

    def forward(self, x: Tensor, sign: Tensor) -> Tensor:
        return self._subject.class_logits(self.model, x[None])[0] @ sign


def _add_mass(
    total: Tensor,
    memory: Memory,
    subject: Subject,
    flat: FlatModel,
    inputs: Tensor,
    pairs: Pairs,
    progress: Progress | None,
) -> Tensor:
    """Add the mass of R inputs, node by node, to `total` (R, G + 1)."""
    for k, (state, moved) in enumerate(memory.points()):
        moved = moved.to(flat.state)
        for rows in blocks(len(inputs), BLOCK):
            gradients = output_gradients(subject, flat, state, inputs[rows], pairs[rows])
            total[rows] += (gradients @ moved.T).double().cpu()
        if progress:
            progress(k + 1, memory.evaluations)
    return total


def _split_step(
    subject: Subject, flat: FlatModel, step: WalkedStep, labels: Tensor, buffers: Tensor
) -> tuple[Tensor, Tensor]:
    """One step's displacement by group, decay last: the new buffers and what they moved, (G + 1, P)."""
    rows = step_rows(subject, flat, step)
    by_group = torch.zeros_like(buffers).index_add_(0, labels[step.ids.to(labels.device)], rows)
    kept, moved = advance(step.rule, buffers[:-1], by_group[:-1], None)
    decay_kept, decay_moved = advance(step.rule, buffers[-1], by_group[-1], step.state.to(rows))
    return torch.cat([kept, decay_kept[None]]), torch.cat([moved, decay_moved[None]])

"""The group memory: what each group of examples did to the weights, summed up once.

For segments t of the path and groups g of training examples, U[t, g] (P,) is the displacement credited to the
group, so that sum_g U[t, g] + decay = w_b - w_a for every segment. Afterwards

    mass of g at any input x = sum_t <Jbar_t(x), U[t, g]>

without a visit to the training data, at a cost that does not depend on N: a superposition of the examples, as in
Domingos 2020 (arXiv 2012.00152). How U is found: `displacement`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from brittle.kernel.directional import Directional
from brittle.kernel.displacement import Displaced, displaced, even_cuts
from brittle.kernel.quadrature import check_outputs
from brittle.path.flat import FlatModel
from brittle.path.replay import Path
from brittle.records import Groups, Pairs, Progress
from brittle.subject import Subject


@dataclass(frozen=True)
class Memory:
    """Displacements by segment and group; the last row of each segment is what decay and the buffers did.

    `ends[t]` and `ends[t + 1]` are the states at both ends of segment t, `nodes` the midpoints taken in each.
    `rounding` is the error of masses from keeping it in half precision, where it was (`halved`).
    """

    ends: Tensor  # shape: (T + 1, P)
    displacements: Tensor  # shape: (T, G + 1, P)
    nodes: int
    rounding: float | None = None

    @property
    def segments(self) -> int:
        return len(self.displacements)

    @property
    def evaluations(self) -> int:
        """Gradient passes that the mass of one input costs."""
        return self.segments * self.nodes

    def pieces(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Every node: the states (P,) at the ends of its piece of a segment, and the segment's (G + 1, P)."""
        low = self.ends[0]
        for t in range(self.segments):
            for k in range(1, self.nodes + 1):
                high = torch.lerp(self.ends[t], self.ends[t + 1], k / self.nodes)
                yield low, high, self.displacements[t]
                low = high

    def points(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every node: the state there (P,), and its displacements (G + 1, P)."""
        return ((torch.lerp(low, high, 0.5), moved / self.nodes) for low, high, moved in self.pieces())

    def used(self) -> int:
        """Rows up to the last that is not zero throughout: without decay and buffers, the groups alone."""
        live = torch.stack([(moved != 0).any(1) for moved in self.displacements]).any(0)
        return int(live.nonzero().max()) + 1 if live.any() else 0

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
        wide = torch.promote_types(self.displacements.dtype, torch.float32)  # groups cancel: no sums in half precision
        sums = [self.displacements[a:b].sum(0, dtype=wide) for a, b in pairwise(cuts)]
        return Memory(self.ends[cuts], torch.stack(sums), nodes)


def build(
    path: Path,
    subject: Subject,
    groups: Groups,
    segments: int = 100,
    nodes: int = 2,
    device: str = "cpu",
    progress: Progress | None = None,
    cuts: Sequence[int] | None = None,
) -> Memory:
    """The memory of a recorded path: `segments` of as many steps each, or between `cuts` (steps, 0 to the last).

    Raises `UnsupportedError` where the model cannot be taken apart by examples.
    Cost: one walk along the path with row gradients; (T + 1) x P and T x (G + 1) x P numbers.
    """
    check_outputs(subject, FlatModel(subject.model, device))
    cuts = even_cuts(path.steps, segments) if cuts is None else cuts
    count = len(cuts) - 1 + (path.average is not None)
    return collected(displaced(path, subject, groups, cuts, device, progress), count, nodes)


def collected(parts: Iterable[Displaced], most: int, nodes: int) -> Memory:
    """The segments of a path as a memory, written into place as they come. most: how many there are at most."""
    t = 0
    for t, part in enumerate(parts, 1):
        if t == 1:
            ends = part.low.new_empty(most + 1, len(part.low))
            moved = part.moved.new_empty(most, *part.moved.shape)
            ends[0] = part.low
        ends[t], moved[t - 1] = part.high, part.moved
    return Memory(ends[: t + 1], moved[:t], nodes)


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
    return add_mass(total, memory, Directional(subject, device), inputs, pairs, progress)


def fine_mass(
    path: Path,
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
    along = Directional(subject, device)
    for part in displaced(path, subject, groups, even_cuts(path.steps, segments), device, progress):
        add_mass(total, one_segment(part, nodes), along, inputs, pairs)
    return total


def one_segment(part: Displaced, nodes: int) -> Memory:
    """One segment of the path as a memory."""
    return Memory(torch.stack([part.low, part.high]), part.moved[None], nodes)


def add_mass(
    total: Tensor, memory: Memory, along: Directional, inputs: Tensor, pairs: Pairs, progress: Progress | None = None
) -> Tensor:
    """Add the mass of R inputs, node by node, to `total` (R, G + 1)."""
    blocks, used = list(along.blocks(len(inputs))), memory.used()
    for b, rows in enumerate(blocks):
        carried = along.at(inputs[rows], pairs[rows])
        for k, (low, high, moved) in enumerate(memory.pieces(), 1):
            total[rows, :used] += carried(low, high, moved[:used].to(along.flat.state)).double().cpu() / memory.nodes
            if progress:
                progress(b * memory.evaluations + k, len(blocks) * memory.evaluations)
    return total

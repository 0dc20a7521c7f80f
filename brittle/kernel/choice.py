"""A group memory that is as cheap as an error of the shift allows.

One walk along the path gives a finer account of a sample of probes, and the finest memory that may be kept; that one is
merged into coarser ones without walking again. A candidate has T segments with n nodes each, and its error is

    max( median over the probes of |s - s*| / |s*|,   mean |residual of s| / mean |change of the output| )

with s and s* (C,) the shift by class of the candidate and of the finer account: what is wrong with single shifts, and
with their sum. A relative distance e leaves a cosine of sqrt(1 - e^2) at least, .98 for .2. The cheapest candidate
that meets the tolerance is taken, and where none does the one with the smallest error.

The path is cut by its length: training is fast where the learning rate is high and the loss is steep. The finest memory
is cut at steps of the finer account.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from brittle.kernel.directional import Directional
from brittle.kernel.displacement import Displaced, displaced, even_cuts, joined, length_cuts
from brittle.kernel.memory import Memory, add_mass, collected, one_segment
from brittle.kernel.quadrature import check_outputs, outputs_at
from brittle.path.replay import Path
from brittle.records import Groups, Pairs, Progress
from brittle.subject import Subject

FEWEST = 5
"""Segments of the coarsest candidate, at least."""


@dataclass(frozen=True)
class Fineness:
    """How finely a path is taken: segments, and nodes in each, at most."""

    segments: int
    nodes: int


@dataclass(frozen=True)
class ShiftError:
    """What is wrong with single shifts, and with their sum."""

    distance: float
    residual: float

    @property
    def largest(self) -> float:
        return max(self.distance, self.residual)


@dataclass(frozen=True)
class Candidate:
    """What a memory of so many segments and nodes would miss."""

    segments: int
    nodes: int
    error: float

    @property
    def evaluations(self) -> int:
        return self.segments * self.nodes


@dataclass(frozen=True)
class Choice:
    """The memory that was taken, and what was looked at before it."""

    memory: Memory
    error: float
    met: bool
    candidates: tuple[Candidate, ...]
    evaluations: int  # gradient passes that choosing took


def choose(
    path: Path,
    subject: Subject,
    groups: Groups,
    queries: Tensor,
    pairs: Pairs,
    probes: Tensor,
    tolerance: float,
    most: Fineness,
    finer: Fineness,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Choice:
    """The cheapest memory whose shifts keep to a tolerance on a sample of probes.

    Args:
        queries, pairs: M raw inputs, (M, *input), and their outputs.
        probes: R of each query, (M, R, *input).
        tolerance: of the error, see above.
        most: the largest memory that may be taken.
        finer: the account that it is held against, in segments of as many steps each.

    Cost: one walk, and M (1 + R) inputs at the finer account's and at the candidates' nodes.
    """
    check_outputs(subject, (along := Directional(subject, device)).flat)
    inputs = torch.cat([queries, probes.flatten(0, 1)])
    asked = Pairs.join(pairs, pairs.repeat_interleave(probes.shape[1]))
    fine = torch.zeros(len(inputs), len(groups) + 1, dtype=torch.float64)

    def accounted(parts: Iterable[Displaced]) -> Iterator[Displaced]:
        for part in parts:
            add_mass(fine, one_segment(part, finer.nodes), along, inputs, asked)
            yield part

    steps = even_cuts(path.steps, finer.segments)
    cuts = length_cuts(path, steps, most.segments)
    parts = accounted(displaced(path, subject, groups, steps, device, progress))
    finest = collected(joined(parts, cuts), len(cuts) - 1 + (path.average is not None), most.nodes)
    ends = (path.snapshot(0).state, path.final())
    start, output = (outputs_at(subject, along.flat, state, inputs, asked).double().cpu() for state in ends)
    judge = _Judge(subject, groups, len(queries), fine, start, output)
    tried: list[Candidate] = []
    for memory in candidates(finest, most.nodes):
        found = add_mass(torch.zeros_like(fine), memory, along, inputs, asked)
        tried.append(Candidate(memory.segments, memory.nodes, judge.error(found)))
        if tried[-1].error <= tolerance:
            break
    best = min(tried, key=lambda c: (c.error > tolerance, c.error))
    taken = replace(finest.merged(best.segments), nodes=best.nodes)
    passes = len(inputs) * (finer.nodes * (len(steps) - 1) + sum(c.evaluations for c in tried))
    return Choice(taken, best.error, best.error <= tolerance, tuple(tried), passes)


def shift_error(found: Tensor, finer: Tensor, missed: Tensor, moved: Tensor) -> ShiftError:
    """How far shifts are off, logits.

    Args:
        found, finer: shifts by class, (..., C).
        missed: residual of the whole shift, (...): of what the output learned, less the mass and decay of `found`.
        moved: change of the output, (...).
    """
    distance = (found - finer).norm(dim=-1) / finer.norm(dim=-1)
    residual = missed.abs().mean() / moved.abs().mean()
    return ShiftError(distance.median().item(), residual.item())


def candidates(finest: Memory, nodes: int) -> Iterator[Memory]:
    """The same memory with half as many segments, a quarter, ..., and 1, 2, 4, ... nodes in each; cheapest first."""
    counts, each = [finest.segments], [nodes]
    while counts[-1] // 2 >= FEWEST:
        counts.append(counts[-1] // 2)
    while each[-1] > 1:
        each.append(each[-1] // 2)
    for segments, n in sorted(((t, n) for t in counts for n in each), key=lambda pair: (pair[0] * pair[1], pair[1])):
        yield finest.merged(segments, n)


@dataclass(frozen=True)
class _Judge:
    """Holds masses of a sample against the finer account of it."""

    subject: Subject
    groups: Groups
    queries: int
    fine: Tensor  # shape: (M + M R, G + 1)
    start: Tensor  # shape: (M + M R,), output before the first step
    output: Tensor  # shape: (M + M R,)

    def error(self, found: Tensor) -> float:
        """Of masses (M + M R, G + 1)."""
        by_class = lambda mass: self.groups.by_class(self._shift(mass)[..., :-1], self.subject.classes)  # noqa: E731
        missed = self.output - self.start - found.sum(1)
        sums = (self._shift(sums[:, None])[..., 0] for sums in (missed, self.output))
        return shift_error(by_class(found), by_class(self.fine), *sums).largest

    def _shift(self, values: Tensor) -> Tensor:
        """Change from each query to its probes. (M + M R, K) -> (M, R, K)."""
        clean, probed = values[: self.queries], values[self.queries :]
        return probed.unflatten(0, (self.queries, -1)) - clean[:, None]

"""What is known of the training decides what can be accounted for: a recorded path, checkpoints, or weights alone.

With a path, outputs get a ledger and the memory holds what each group displaced; with checkpoints as well, but most
of it may be unexplained. With neither, the tangent kernel of the final weights stands in: local statements, no
account. Everything after this module treats them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.findings import MemoryFidelity
from brittle.kernel.choice import Fineness, choose, shift_error
from brittle.kernel.memory import Memory, fine_mass, mass
from brittle.kernel.quadrature import outputs_at
from brittle.kernel.sweep import Quadrature, Swept, sweep
from brittle.kernel.tangent import tangent_contributions, tangent_memory
from brittle.path.checkpoints import Checkpoints
from brittle.path.flat import FlatModel
from brittle.path.match import check_path
from brittle.path.replay import Path
from brittle.path.store import PathReader
from brittle.probes import MAP_SHARES, Family
from brittle.records import Groups, Ledger, Pairs, Progress, Queries, ShiftMap
from brittle.shift import probe_inputs, shift_map
from brittle.subject import Subject

SAMPLE_QUERIES, SAMPLE_FAMILIES = 8, 4
"""Queries, and families of each, on which a memory is chosen; on as many others it is held against a finer account."""

FINE_SEGMENTS, FINE_NODES = 500, 2
"""The finer account."""


@dataclass(frozen=True)
class Account:
    """Contributions of N training examples to M outputs; with their ledger where the path is known."""

    ids: Tensor  # shape: (M,) positions in the test data
    predicted: Tensor  # shape: (M,)
    rival: Tensor  # shape: (M,)
    contributions: Tensor  # shape: (M, N) float32
    ledger: Ledger | None
    evaluations: int

    @property
    def kind(self) -> str:
        return "path kernel" if self.ledger is not None else "tangent kernel"


def open_path(subject: Subject) -> Path | None:
    """The subject's path, checked against its model and data, or its checkpoints; None where there are neither."""
    if subject.checkpoints is not None:
        return Checkpoints(subject)
    if subject.path is None:
        return None
    path = PathReader(subject.path)
    check_path(path, subject)
    return path


@dataclass(frozen=True)
class Sample:
    """Some queries and some families of probes."""

    queries: Queries
    families: Sequence[Family]
    draws: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, queries: Queries, families: Sequence[Family], draws: Mapping[str, Tensor], generator: torch.Generator
    ) -> Sample:
        """A random sample of `SAMPLE_QUERIES` with `SAMPLE_FAMILIES`."""
        rows = torch.randperm(len(queries), generator=generator)[:SAMPLE_QUERIES]
        columns = torch.randperm(len(families), generator=generator)[:SAMPLE_FAMILIES].tolist()
        some = [families[c] for c in columns]
        return cls(queries[rows], some, {f.name: draws[f.name][rows] for f in some})

    def probes(self) -> Tensor:
        """Its probes at the shift map's severities, (M, F K, *input)."""
        inputs = self.queries.inputs
        return torch.cat([probe_inputs(inputs, f, self.draws[f.name], MAP_SHARES) for f in self.families], dim=1)


def build_memory(
    subject: Subject,
    path: Path | None,
    groups: Groups,
    sample: Sample,
    tolerance: float,
    most: Fineness,
    device: str,
    progress: Progress | None,
    spend: Callable[[int], None] = lambda evaluations: None,
) -> Memory:
    """The cheapest memory of the path whose shifts keep to a tolerance, or that of one step at the final weights."""
    if path is None:
        return tangent_memory(subject, groups, device, progress)
    q, finer = sample.queries, Fineness(FINE_SEGMENTS, FINE_NODES)
    chosen = choose(path, subject, groups, q.inputs, q.pairs, sample.probes(), tolerance, most, finer, device, progress)
    spend(chosen.evaluations)
    return chosen.memory


def account(
    subject: Subject,
    path: Path | None,
    ids: Tensor,
    inputs: Tensor,
    pairs: Pairs,
    device: str,
    progress: Progress | None,
) -> Account:
    """Contributions to the outputs, from the path or from the final weights, in one piece; the audit takes units."""
    if path is None:
        return tangent_account(subject, ids, inputs, pairs, device, progress)
    return swept_account(ids, pairs, sweep(path, subject, inputs, pairs, Quadrature(), device, progress))


def swept_account(ids: Tensor, pairs: Pairs, swept: Swept) -> Account:
    """From the ledger of a known path."""
    contributions = swept.ledger.contributions.float()
    return Account(ids, pairs.predicted, pairs.rival, contributions, swept.ledger, swept.evaluations)


def tangent_account(
    subject: Subject, ids: Tensor, inputs: Tensor, pairs: Pairs, device: str, progress: Progress | None
) -> Account:
    """From the final weights, where the path is not known."""
    found = tangent_contributions(subject, inputs, pairs, device, progress)
    return Account(ids, pairs.predicted, pairs.rival, found, None, len(inputs) + len(subject.train))


def memory_fidelity(
    subject: Subject,
    path: Path,
    memory: Memory,
    groups: Groups,
    sample: Sample,
    tolerance: float,
    device: str,
    progress: Progress | None = None,
    spend: Callable[[int], None] = lambda evaluations: None,
) -> MemoryFidelity:
    """The memory's shifts on a sample of probes, held against a finer account of the same path.

    tolerance: of the shift's error that was asked for.
    """
    queries, fine_segments = sample.queries, min(path.steps, FINE_SEGMENTS)

    def coarse(inputs: Tensor, pairs: Pairs) -> Tensor:
        spend(len(inputs) * (memory.evaluations + fine_segments * FINE_NODES))
        return mass(memory, subject, inputs, pairs, device)

    def fine(inputs: Tensor, pairs: Pairs) -> Tensor:
        return fine_mass(path, subject, groups, inputs, pairs, fine_segments, FINE_NODES, device, progress)

    ours, finer = (shift_map(subject, queries, sample.families, sample.draws, m) for m in (coarse, fine))
    start, probed_start = _start(subject, memory.ends[0], sample, device)
    learned = ours.margin - start
    missed = (ours.probed_margin - probed_start) - learned[:, None, None] - ours.shift.sum(-1)
    own, expected = (_class_shift(found, groups, subject) for found in (ours, finer))
    by_class = [groups.by_class(s.mass[:, :-1], subject.classes) for s in (ours, finer)]
    cosines = torch.cosine_similarity(own, expected, dim=1)
    error = shift_error(own, expected, missed, ours.probed_margin - ours.margin[:, None, None])
    return MemoryFidelity(
        relative_residual=((learned - ours.mass.sum(1)).abs().mean() / learned.abs().mean()).item(),
        shift_cosine=cosines.median().item(),
        shift_cosine_p5=cosines.quantile(0.05).item(),
        shift_distance=error.distance,
        shift_residual=error.residual,
        class_cosine=torch.cosine_similarity(by_class[0], by_class[1], dim=1).median().item(),
        segments=memory.segments,
        nodes=memory.evaluations,
        sample=len(cosines),
        tolerance=tolerance,
        met=error.largest <= tolerance,
        rounding=memory.rounding,
    )


def _start(subject: Subject, state: Tensor, sample: Sample, device: str) -> tuple[Tensor, Tensor]:
    """Outputs before the first step: of the queries (M,), and of their probes (M, F, K)."""
    probes, pairs, flat = sample.probes(), sample.queries.pairs, FlatModel(subject.model, device)
    start = outputs_at(subject, flat, state, sample.queries.inputs, pairs).double().cpu()
    probed = outputs_at(subject, flat, state, probes.flatten(0, 1), pairs.repeat_interleave(probes.shape[1]))
    return start, probed.double().cpu().reshape(len(start), len(sample.families), -1)


def _class_shift(shift: ShiftMap, groups: Groups, subject: Subject) -> Tensor:
    """Shifts by class, one row a probe: (M F K, C). The last column of the mass is decay."""
    return groups.by_class(shift.shift[..., :-1], subject.classes).flatten(0, 2)

"""The stages that predict: memory, its fidelity, the shift map, holes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from brittle import accounts
from brittle.assemble import failure_rate, hole_families
from brittle.findings import MemoryFidelity
from brittle.holes import Region, find_holes, leak_of
from brittle.kernel.choice import Fineness
from brittle.kernel.halved import Halved, halved
from brittle.kernel.memory import Memory, mass
from brittle.outcomes import Observed
from brittle.pipeline.context import Context
from brittle.records import Pairs, Progress, ShiftMap
from brittle.shift import shift_map
from brittle.stages import Spend


def memory(c: Context) -> Memory:
    e, sample = c.effort, c.sample("memory")

    def compute(tick: Progress, spend: Spend) -> Memory | Halved:
        spend(c.path.visits if c.path else len(c.subject.train))
        most = Fineness(e.segments, e.nodes)
        built = accounts.build_memory(c.subject, c.path, c.groups, sample, e.tolerance, most, c.device, tick, spend)
        return halved(built, c.subject, sample.queries.inputs, sample.queries.pairs, c.device) if e.half else built

    kept = c.stages("memory", "building the group memory", compute)
    return kept.whole() if isinstance(kept, Halved) else kept


def memory_fidelity(c: Context, memory: Memory) -> MemoryFidelity | None:
    path, sample = c.path, c.sample("fidelity")
    if path is None:
        return None

    def compute(tick: Progress, spend: Spend) -> dict[str, Any]:
        spend(path.visits)
        return accounts.memory_fidelity(
            c.subject, path, memory, c.groups, sample, c.effort.tolerance, c.device, tick, spend
        ).model_dump()

    found = c.stages("memory/fidelity", "checking the memory against a finer account", compute)
    return MemoryFidelity.model_validate(found)


def shift(c: Context, memory: Memory) -> ShiftMap:
    queries = c.split.both

    def compute(tick: Progress, spend: Spend) -> ShiftMap:
        def mass_of(inputs: Tensor, pairs: Pairs) -> Tensor:
            spend(len(inputs) * memory.evaluations)
            return mass(memory, c.subject, inputs, pairs, c.device, tick)[:, : len(c.groups)]

        return shift_map(c.subject, queries, c.families, c.draws, mass_of)

    return c.stages("shift", "mapping the shift", compute)


def holes(c: Context, shift: ShiftMap, observed: Observed) -> list[Region]:
    """Holes from the predicting queries alone: their shift, their labels and their outcomes."""
    predict = c.split.predict
    families = hole_families(c.families)
    leak = leak_of(shift[: len(predict)], c.groups)
    return find_holes(leak, families, failure_rate(leak, observed[: len(predict)], predict, families))

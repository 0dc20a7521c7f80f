"""The map alone: the stages that predict, once, and the account of the predicting queries, shared among processes."""

from __future__ import annotations

from dataclasses import dataclass

from brittle.findings import MemoryFidelity
from brittle.pipeline.accounting import first_account
from brittle.pipeline.context import Context
from brittle.pipeline.mapping import holes, memory, memory_fidelity, shift
from brittle.pipeline.observing import probes
from brittle.records import Ledger


@dataclass(frozen=True)
class Charted:
    """How far the map has come. What this process did not look at is None."""

    units: int
    missing: int
    examples: int
    queries: int
    holes: int | None = None
    fidelity: MemoryFidelity | None = None
    ledger: Ledger | None = None


def chart(c: Context) -> Charted:
    """This process's share of the map; whoever comes last adds up the account."""
    found, faithful = _predicted(c) if c.share.leads else (None, None)
    making = first_account(c)
    finished = making.finish()
    ledger = making.made().ledger if finished and (c.share.leads or c.share.lone) else None
    return Charted(
        units=len(making.units),
        missing=0 if finished else len(making.missing()),
        examples=len(c.subject.train),
        queries=len(c.split.predict),
        holes=found,
        fidelity=faithful,
        ledger=ledger,
    )


def _predicted(c: Context) -> tuple[int, MemoryFidelity | None]:
    """The number of holes, and how faithful the memory is."""
    built = memory(c)
    faithful = memory_fidelity(c, built)
    return len(holes(c, shift(c, built), probes(c))), faithful

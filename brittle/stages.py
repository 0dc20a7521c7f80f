"""How a stage runs: its result is kept in the run folder, its cost is noted, its progress is shown.

A stage whose result is already there is read, not computed; so the same command resumes, and processes that share a run
folder do not do the same twice. Every stage draws its randomness from its own generator, seeded by the audit's seed and
the stage's name, so that a resumed audit gives what an uninterrupted one gives.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from brittle.findings import Cost, StageCost
from brittle.packing import pack, unpack
from brittle.records import Progress
from brittle.runs import RunFolder

T = TypeVar("T")


@dataclass
class Spend:
    """What a stage takes: called with gradient evaluations (one row, one backward pass), it adds them."""

    evaluations: int = 0
    seconds: float = 0.0
    peak_memory_mb: float = 0.0

    def __call__(self, evaluations: int) -> None:
        self.evaluations += evaluations

    def part(self, cost: StageCost) -> None:
        """Add what a part of the stage took before, or in another process."""
        self.evaluations += cost.gradient_evaluations
        self.seconds += cost.seconds
        self.peak_memory_mb = max(self.peak_memory_mb, cost.peak_memory_mb)


class Stages:
    """Runs the stages of one audit in its run folder; `cost()` says what they took."""

    def __init__(self, run: RunFolder, records: Mapping[str, type], seed: int, bars: bool) -> None:
        self.run, self._records, self._seed, self._bars = run, records, seed, bars
        self._costs: list[StageCost] = []

    def __call__(self, name: str, title: str, compute: Callable[[Progress, Spend], T]) -> T:
        """The result of stage `name`: read from the run folder, or computed, stored and returned.

        Args:
            name: of the stage's folder.
            title: what the progress bar says.
            compute: called with a progress callback and a counter of gradient evaluations.
        """
        with self.run.claim(name):
            if self.run.has(name):
                value, cost = self.read(name)
            else:
                with self.bar(title) as progress:
                    value, cost = self.keep(name, title, lambda spend: compute(progress, spend))
        self._costs.append(cost)
        return value

    def keep(self, name: str, title: str, compute: Callable[[Spend], T]) -> tuple[T, StageCost]:
        """Compute and store what belongs under a name; returns it, and what it took."""
        spend, began = Spend(), time.perf_counter()
        value = compute(spend)
        cost = StageCost(
            stage=title,
            seconds=spend.seconds + time.perf_counter() - began,
            peak_memory_mb=max(spend.peak_memory_mb, peak_memory_mb()),
            gradient_evaluations=spend.evaluations,
        )
        arrays, tree = pack(value)
        self.run.save(name, arrays, {"tree": tree, "cost": cost.model_dump_json()})
        return unpack(arrays, tree, self._records), cost  # as a resumed audit will read it

    def read(self, name: str) -> tuple[Any, StageCost]:
        """What is stored under a name, and what it took."""
        notes = self.run.notes(name)
        value = unpack(self.run.load(name), notes["tree"], self._records)
        return value, StageCost.model_validate_json(notes["cost"])

    def generator(self, name: str) -> torch.Generator:
        """The stage's own randomness."""
        digest = hashlib.sha256(json.dumps([self._seed, name]).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def cost(self, device: str) -> Cost:
        """What all stages took, those of an interrupted earlier run included."""
        return Cost(stages=self._costs, seconds=sum(c.seconds for c in self._costs), device=device)

    @contextmanager
    def bar(self, title: str) -> Iterator[Progress]:
        """A progress bar with rate and remaining time."""
        with tqdm(desc=title, leave=False, disable=None if self._bars else True, delay=1.0, mininterval=0.3) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.n = done
                bar.update(0)

            yield progress


def peak_memory_mb() -> float:
    """The process's largest resident size so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 if sys.platform != "darwin" else 1024**2)

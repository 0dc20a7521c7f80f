"""How a stage runs: its result is kept in the run folder, its cost is noted, its progress is shown.

A stage whose result is already there is read, not computed; so the same command resumes. Every stage draws its
randomness from its own generator, seeded by the audit's seed and the stage's name, so that a resumed audit gives
what an uninterrupted one gives.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from tqdm import tqdm

from brittle.findings import Cost, StageCost
from brittle.packing import pack, unpack
from brittle.records import Progress
from brittle.runs import RunFolder

T = TypeVar("T")
Spend = Callable[[int], None]
"""Adds gradient evaluations (one row, one backward pass) to the stage's cost."""


class Stages:
    """Runs the stages of one audit in its run folder; `cost()` says what they took."""

    def __init__(self, run: RunFolder, records: Mapping[str, type], seed: int, bars: bool) -> None:
        self._run, self._records, self._seed, self._bars = run, records, seed, bars
        self._costs: list[StageCost] = []

    def __call__(self, name: str, title: str, compute: Callable[[Progress, Spend], T]) -> T:
        """The result of stage `name`: read from the run folder, or computed, stored and returned.

        Args:
            name: of the stage's folder.
            title: what the progress bar says.
            compute: called with a progress callback and a counter of gradient evaluations.
        """
        if self._run.has(name):
            notes = self._run.notes(name)
            self._costs.append(StageCost.model_validate_json(notes["cost"]))
            return unpack(self._run.load(name), notes["tree"], self._records)
        spent, began = [0], time.perf_counter()

        def spend(evaluations: int) -> None:
            spent[0] += evaluations

        with self._bar(title) as progress:
            value = compute(progress, spend)
        cost = StageCost(
            stage=title,
            seconds=time.perf_counter() - began,
            peak_memory_mb=peak_memory_mb(),
            gradient_evaluations=spent[0],
        )
        arrays, tree = pack(value)
        self._run.save(name, arrays, {"tree": tree, "cost": cost.model_dump_json()})
        self._costs.append(cost)
        return unpack(arrays, tree, self._records)  # as a resumed audit will read it

    def generator(self, name: str) -> torch.Generator:
        """The stage's own randomness."""
        digest = hashlib.sha256(json.dumps([self._seed, name]).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def cost(self, device: str) -> Cost:
        """What all stages took, those of an interrupted earlier run included."""
        return Cost(stages=self._costs, seconds=sum(c.seconds for c in self._costs), device=device)

    @contextmanager
    def _bar(self, title: str) -> Iterator[Progress]:
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

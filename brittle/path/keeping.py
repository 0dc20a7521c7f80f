"""What is kept of a training while it runs: steps and states in memory until a block is full, then on disk.

States are kept before every k-th step. When those on disk outgrow the budget, k doubles and every second one goes.
Where writing takes more than its part of the training's time, k doubles too, and what is there stays: steps between
states are replayed, to the last bit, so fewer states cost an audit time and nothing else.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from brittle.errors import DataError
from brittle.path import store
from brittle.path.flat import Spare
from brittle.path.observed import Snapshot, Step
from brittle.path.writer import Writer

BLOCK_BYTES = 64 << 20
BLOCK_SECONDS = 30.0
BLOCKS_IN_BUDGET = 8
"""A block takes at most this part of the budget: it holds while one is written, and while another is thinned."""


WRITING = 0.02
"""Part of the training's time that writing may take where nothing else is asked for."""

LOOK_SECONDS = 2.0
"""Of training between two looks at what writing takes."""


class Keeper:
    """Keeps steps and states of one training. `steps` so far, `every` k, `spare` memory of states that were written.

    Args:
        root: the path's folder.
        budget: bytes of disk that the states may take.
        writes: False in the processes that leave the writing to the first one.
        writing: part of the training's time that writing may take; `math.inf` for as much as it takes.
    """

    def __init__(self, root: Path, budget: int, writes: bool, writing: float = math.inf) -> None:
        self.root, self.budget, self.every, self.steps = root, budget, 1, 0
        self._writes, self._writer, self.spare = writes, Writer(), Spare()
        self._writing, self._looked = writing, (time.monotonic(), 0.0)  # when, and how long the writer had written
        self._blocks: list[Step] = []
        self._states: list[Snapshot] = []
        self._sizes: dict[int, int] = {}  # bytes of the state before each step that has one
        self._pending, self._since = 0, time.monotonic()  # bytes in memory

    @property
    def wants_state(self) -> bool:
        """Whether the state before the coming step is to be kept."""
        return self._writes and self.steps % self.every == 0 and self.steps not in self._sizes

    @property
    def at_state(self) -> bool:
        """Whether the coming step begins at a state that is kept: there inputs are checked, others are replayed."""
        return self.steps % self.every == 0 or self.steps in self._sizes

    @property
    def full(self) -> bool:
        """Whether it is time to write."""
        enough = min(BLOCK_BYTES, self.budget / BLOCKS_IN_BUDGET)
        return self._pending >= enough or time.monotonic() - self._since > BLOCK_SECONDS

    def take_up(self, steps: int, sizes: dict[int, int]) -> None:
        """Go on after so many steps; sizes: bytes of the states that lie on disk, by their steps."""
        self.steps, self._sizes = steps, sizes
        widest = max((b - a for a, b in pairwise(sizes)), default=1)
        self.every = 1 << (widest.bit_length() - 1)

    def add_state(self, snapshot: Snapshot) -> None:
        """Keep the state before the coming step, once."""
        if self._writes and snapshot.step not in self._sizes:
            self._states.append(snapshot)
            self._sizes[snapshot.step] = snapshot.nbytes
            self._pending += snapshot.nbytes

    def add_step(self, step: Step) -> None:
        """Keep a step."""
        self._blocks.append(step)
        self._pending += step.nbytes
        self.steps += 1

    def note_average(self, share: float) -> None:
        """Note the share that the averaged weights took of the last step's."""
        if not self._blocks:
            raise DataError(
                "flush() must be called after the averaged weights have been updated for the step, found them updated "
                "later; move the call of flush() behind the update"
            )
        self._blocks[-1] = replace(self._blocks[-1], averaged=share)

    def write(self, wait: bool = False) -> None:
        """Hand what is in memory to the writer, and thin the states until the budget holds."""
        steps, states = self._blocks, self._states
        self._blocks, self._states, self._pending, self._since = [], [], 0, time.monotonic()
        if not self._writes:  # the first process writes
            return
        if states:
            self._writer.submit(self._write_states, states, self.every)
        if steps:
            self._writer.submit(store.write_steps, self.root, self.steps - len(steps), steps)
        self._keep_pace()
        room = self.budget * (1 - 2 / BLOCKS_IN_BUDGET)
        while sum(self._sizes.values()) > room and self.every <= self.steps:
            self.every *= 2
            self._sizes = {mark: size for mark, size in self._sizes.items() if mark % self.every == 0}
            self._writer.submit(store.thin_states, self.root, self.every)
        if wait:
            self._writer.wait()

    def finish(self, last: Snapshot, average: Tensor | None) -> None:
        """Write the rest, the final state and the averaged weights, and mark the path as finished."""
        self.write()
        if not self._writes:
            return
        if last.step not in self._sizes:
            self._sizes[last.step] = last.nbytes
            self._writer.submit(store.write_states, self.root, [last], self.every)
        if average is not None:
            self._writer.submit(store.write_average, self.root, average)
        self._writer.submit(store.write_end, self.root, self.steps, sorted(self._sizes))
        self._writer.wait()

    def _keep_pace(self) -> None:
        """Double k until writing takes no more than its part of the time that has passed since the last look."""
        (since, before), now, busy = self._looked, time.monotonic(), self._writer.busy
        if now - since < LOOK_SECONDS:
            return
        self._looked = now, busy
        excess = (busy - before) / (now - since) / self._writing
        while excess > 1 and self.every <= self.steps:
            self.every, excess = 2 * self.every, excess / 2

    def _write_states(self, states: list[Snapshot], every: int) -> None:
        """In the writer's thread."""
        store.write_states(self.root, states, every)
        for snapshot in states:
            self.spare.give([snapshot.state, *snapshot.buffers.values()])

    def stop(self) -> None:
        """Write no more; what was being written is finished."""
        self._writer.stop()

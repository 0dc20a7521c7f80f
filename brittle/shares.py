"""Which part of the work is this process's: that of one rank under `torchrun`, or of one job of an array.

Units of work are dealt out in turn: share i of n has the units i, i + n, i + 2 n, ... Ranks run at the same time, so
that one which has come to its end takes what nobody has begun, and the first waits for the others. The jobs of an array
may run whenever they like: each does its own units and ends.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from brittle.errors import UsageError


@dataclass(frozen=True)
class Share:
    """Share `index` of `count`. lone: a job of an array, which neither helps nor waits for others."""

    index: int = 0
    count: int = 1
    lone: bool = False

    @property
    def leads(self) -> bool:
        """Whether it does what is done once."""
        return self.index == 0

    def order(self, units: int) -> list[int]:
        """The numbers of the units that it tries, in this order: its own, then the others' unless it is lone."""
        own = list(range(self.index, units, self.count))
        return own if self.lone else own + [k for k in range(units) if k % self.count != self.index]


def share_of(shard: str | None = None, environment: Mapping[str, str] = os.environ) -> Share:
    """The share of a process. shard: "i/n" of an array job; the environment: RANK and WORLD_SIZE, as torchrun sets it.

    An array job of several ranks divides its share among them. Raises `UsageError` where either cannot be understood.

    >>> share_of("1/4", {})
    Share(index=1, count=4, lone=True)
    """
    rank, world = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
    inner = _parsed(f"{rank}/{world}", "RANK/WORLD_SIZE", "leave both unset, or start with torchrun")
    if shard is None:
        return Share(*inner)
    index, count = _parsed(shard, "--shard", "number the jobs from 0/N to N-1/N")
    return Share(index * inner[1] + inner[0], count * inner[1], lone=True)


def _parsed(text: str, name: str, remedy: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UsageError(f"{name} must be I/N with I from 0 to N-1, found {text!r}; {remedy}")
    return int(index), int(count)

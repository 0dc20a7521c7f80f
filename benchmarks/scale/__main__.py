"""`python -m benchmarks.scale`: a table, progress on standard error, and one line of JSON at the end.

--only memory|processes|times   a part alone       --quick   small sizes, a smoke test
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.data import unnamed
from benchmarks.scale import memory, processes, times

PARTS = ("memory", "processes", "times")


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    grown: tuple[int, int] = (6_000, 60_000)  # N of the peaks
    held: int = 64  # M of the peaks
    counts: tuple[int, ...] = (1, 2, 3)  # processes
    mapped: int = 6_000  # N of the map by several processes
    shared: int = 12  # its M
    budget: int = 3 << 20  # two queries a unit
    examples: tuple[int, ...] = (12_000, 20_000, 35_000, 60_000)
    few: int = 16  # M of the times against N
    queries: tuple[int, ...] = (32, 64, 128, 256)
    fixed: int = 6_000  # N of the times against M
    rounds: int = 9


QUICK = Sizes((512, 1_024), 4, (1, 2), 512, 4, 3 << 20, (256, 512, 768, 1_024), 4, (4, 8, 12, 16), 512, 1)

BARS = {"rss_growth_mb": 150.0, "exponent_n": 1.05, "exponent_m": 1.05}
"""At most."""

NOTHING: dict[str, Any] = dict.fromkeys(
    (
        *BARS,
        "exponent_n_processor",
        "exponent_m_processor",
        "rss_growth_by_part",
        "equal_across_processes",
        "survives_kill",
    )
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts asked for; the exit status is 1 where a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--only", choices=PARTS, help="one part alone")
    parser.add_argument("--quick", action="store_true", help="small sizes, as a smoke test")
    asked = parser.parse_args(arguments)
    if unnamed():
        return 2
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    with TemporaryDirectory() as folder:
        parts = (asked.only,) if asked.only else PARTS
        found = NOTHING | measured(parts, QUICK if asked.quick else Sizes(), Path(folder))
    found["missed"] = [] if asked.quick else missed(found)
    print(json.dumps(found))
    return 1 if found["missed"] else 0


def measured(parts: Sequence[str], s: Sizes, cache: Path) -> dict[str, Any]:
    """The figures of some parts."""
    found: dict[str, Any] = {}
    if "memory" in parts:
        grown = memory.growth(s.grown, s.held, cache)
        found |= {"rss_growth_mb": max(grown.values()), "rss_growth_by_part": grown}
    if "processes" in parts:
        equal, survives = processes.run(s.counts, s.mapped, s.shared, s.budget, cache)
        found |= {"equal_across_processes": equal, "survives_kill": survives}
    if "times" in parts:
        n = times.against_examples(s.examples, s.few, s.rounds, cache)
        m = times.against_queries(s.fixed, s.queries, s.rounds, cache)
        found |= {"exponent_n": n[0], "exponent_n_processor": n[1], "exponent_m": m[0], "exponent_m_processor": m[1]}
    return found


def missed(found: Mapping[str, Any]) -> list[str]:
    """The bars that the figures miss; a figure that was not taken misses none."""
    taken = {key: value for key, value in found.items() if value is not None}
    high = [f"{key} {taken[key]:.3g} > {bar:g}" for key, bar in BARS.items() if not taken.get(key, bar) <= bar]
    return high + [key for key in ("equal_across_processes", "survives_kill") if taken.get(key) is False]


if __name__ == "__main__":
    sys.exit(main())

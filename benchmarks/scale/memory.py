"""How the largest resident size grows with the number of training examples, beyond the data themselves.

Each part of the map that walks the training runs in a process of its own, for as many queries whatever N is: building
the group memory, and the account. The growth is that of the peak, less that of the training inputs and labels; loading
and checking the data counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.scale.problem import data_bytes, make
from brittle.kernel.units import BUDGET
from brittle.pipeline.accounting import first_account
from brittle.pipeline.context import Asked, begin
from brittle.pipeline.mapping import memory
from brittle.stages import peak_memory_mb

PARTS = ("memory", "account")


def growth(sizes: tuple[int, int], queries: int, cache: Path) -> dict[str, float]:
    """MB that each part's peak grows by from one size to the other, beyond the data."""
    found = {}
    for size in sizes:
        make(size, str(cache))  # trained here, so that no peak is that of the training
    for part in PARTS:
        peaks = [peak(part, size, queries, cache) for size in sizes]
        data = [data_bytes(size) / 2**20 for size in sizes]
        found[part] = (peaks[1] - data[1]) - (peaks[0] - data[0])
        print(
            f"{part:<10} peak at N={sizes[0]:,}: {peaks[0]:,.0f} MB, at N={sizes[1]:,}: {peaks[1]:,.0f} MB, "
            f"data {data[0]:,.0f} and {data[1]:,.0f} MB: grows by {found[part]:,.0f} MB",
            flush=True,
        )
    return found


def peak(part: str, size: int, queries: int, cache: Path) -> float:
    """The largest resident size of a process that makes one part of the map, in MB."""
    command = [sys.executable, "-m", "benchmarks.scale.memory", part, str(size), str(queries), str(cache)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def work(part: str, size: int, queries: int, cache: Path) -> None:
    """Make one part of the map."""
    asked = Asked(queries, 0, "cpu", "quick", None, {}, False, BUDGET, False)
    with TemporaryDirectory() as folder, begin(make(size, str(cache)), folder, asked) as c:
        if part == "memory":
            memory(c)
        else:
            first_account(c).made()


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    print(json.dumps(peak_memory_mb()))

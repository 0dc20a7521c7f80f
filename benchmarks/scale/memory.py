"""How the largest resident size grows with the number of training examples, beyond the data themselves.

Each part of the map that walks the training runs in a process of its own, for as many queries whatever N is: building
the group memory, and the account. The growth is that of the peak, less that of the training inputs and labels; loading
and checking the data counts. Both trainings have the same number of steps, so that the path takes the same room: its
reader holds at most two of its files, which grow with the number of steps up to 64 MB each.
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
from brittle.subject import Subject

PARTS = ("memory", "account")


def growth(sizes: tuple[int, int], queries: int, cache: Path) -> dict[str, float]:
    """MB that each part's peak grows by from one size to the other, beyond the data."""
    found = {}
    for size in sizes:
        subject_of(size, cache, sizes[1])  # trained here, so that no peak is that of the training
    for part in PARTS:
        peaks = [peak(part, size, queries, cache, sizes[1]) for size in sizes]
        data = [data_bytes(size) / 2**20 for size in sizes]
        found[part] = (peaks[1] - data[1]) - (peaks[0] - data[0])
        print(
            f"{part:<10} peak at N={sizes[0]:,}: {peaks[0]:,.0f} MB, at N={sizes[1]:,}: {peaks[1]:,.0f} MB, "
            f"data {data[0]:,.0f} and {data[1]:,.0f} MB: grows by {found[part]:,.0f} MB",
            flush=True,
        )
    return found


def peak(part: str, size: int, queries: int, cache: Path, most: int) -> float:
    """The largest resident size of a process that makes one part of the map, in MB."""
    arguments = [part, str(size), str(queries), str(cache), str(most)]
    command = [sys.executable, "-m", "benchmarks.scale.memory", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def subject_of(size: int, cache: Path, most: int) -> Subject:
    """A training of `size` images that has as many steps as one epoch of `most`."""
    return make(size, str(cache), epochs=max(1, round(most / size)))


def work(part: str, size: int, queries: int, cache: Path, most: int) -> None:
    """Make one part of the map."""
    asked = Asked(queries, 0, "cpu", "quick", None, {}, False, BUDGET, False)
    with TemporaryDirectory() as folder, begin(subject_of(size, cache, most), folder, asked) as c:
        if part == "memory":
            memory(c)
        else:
            first_account(c).made()


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
    print(json.dumps(peak_memory_mb()))

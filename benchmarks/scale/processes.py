"""The same map by one, two and three processes of torchrun, and by two of which one is killed half-way.

Arrays of all stages must be the same to the last bit, in deterministic mode.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.scale.problem import make
from brittle.kernel.units import cut
from brittle.path.store import PathReader
from brittle.runs import read_run

STAGES = ("memory", "memory/fidelity", "shift", "probes", "ledger")
POLL = 0.02


def run(counts: Sequence[int], size: int, queries: int, budget: int, cache: Path) -> tuple[bool, bool]:
    """Whether the maps of all numbers of processes are equal, and whether that of a killed run is."""
    began, folders = time.perf_counter(), []
    for count in counts:
        folders.append(cache / f"map-{count}")
        with start(folders[-1], count, size, queries, budget, cache) as launcher:
            pass
        _report(f"{count} of torchrun", launcher.returncode == 0, began)
    equal = all(same(folders[0], folder) for folder in folders[1:])
    print(f"{'equal':<24} {equal}", flush=True)
    killed = cache / "map-killed"
    with start(killed, 2, size, queries, budget, cache) as launcher:
        hit = kill_one(launcher.pid, killed / "ledger" / "units", units(size, queries, budget, cache) // 2)
    _report("2, one of them killed", hit and launcher.returncode == 0, began)
    survived = hit and launcher.returncode == 0 and same(folders[0], killed)
    print(f"{'survives and is equal':<24} {survived}", flush=True)
    return equal, survived


def start(out: Path, count: int, size: int, queries: int, budget: int, cache: Path) -> subprocess.Popen[bytes]:
    """torchrun with some processes that make the map."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "--max-restarts", "3"]
    spec = ["benchmarks.scale.problem:make", "-p", f"size={size}", "-p", f"cache={cache}", "--out", str(out)]
    asked = ["--queries", str(queries), "--memory-budget", str(budget), "--deterministic", "--no-progress"]
    command = [sys.executable, *launcher, "-m", "brittle", "map", *spec, *asked]
    return subprocess.Popen(command, stdout=sys.stderr, stderr=sys.stderr)


def kill_one(launcher: int, shards: Path, wanted: int) -> bool:
    """Kill the last of torchrun's processes as soon as so many units are there; whether that came to pass."""
    while (children := _children(launcher)) is not None:
        if children and len(list(shards.glob("*.safetensors"))) >= wanted:
            os.kill(children[-1], signal.SIGKILL)
            return True
        time.sleep(POLL)
    return False


def units(size: int, queries: int, budget: int, cache: Path) -> int:
    """How many units the map is cut into."""
    subject = make(size, str(cache))
    assert subject.path is not None
    return len(cut(PathReader(subject.path), subject, queries, budget))


def same(one: Path, other: Path) -> bool:
    """Whether the arrays of all stages are the same to the last bit."""
    runs = read_run(one), read_run(other)
    for stage in STAGES:
        ours, theirs = (folder.load(stage) for folder in runs)
        if set(ours) != set(theirs) or not all(torch.equal(array, theirs[name]) for name, array in ours.items()):
            return False
    return True


def _children(pid: int) -> list[int] | None:
    """The processes that a process has started, None where it has ended."""
    try:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return None
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return None


def _report(what: str, done: bool, began: float) -> None:
    print(f"{what:<24} {'done' if done else 'FAILED'} after {time.perf_counter() - began:.0f} s", flush=True)

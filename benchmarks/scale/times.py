"""How the time of an account grows with the number of training examples and of queries.

Sizes take turns in every round, so that a slower minute of the machine meets all of them; the exponent is the slope of
log median time against log size.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.scale.problem import make
from brittle.kernel.units import account_unit, cut, total
from brittle.path.store import PathReader
from brittle.records import Pairs
from brittle.subject import Subject


def against_examples(sizes: Sequence[int], queries: int, rounds: int, cache: Path) -> float:
    """The exponent against N, each training one epoch long."""
    subjects = {size: make(size, str(cache)) for size in sizes}
    return exponent("N", sizes, rounds, lambda size: account(subjects[size], queries))


def against_queries(size: int, counts: Sequence[int], rounds: int, cache: Path) -> float:
    """The exponent against M."""
    subject = make(size, str(cache))
    return exponent("M", counts, rounds, lambda count: account(subject, count))


def account(subject: Subject, queries: int) -> None:
    """The account of the first test images, in units."""
    assert subject.path is not None
    path, inputs = PathReader(subject.path), subject.test.inputs[:queries]
    pairs, units = Pairs.of(subject.predict(inputs)), cut(path, subject, queries)
    parts = (account_unit(path, subject, inputs, pairs, unit) for unit in units)
    total(units, parts, queries, len(subject.train))


def exponent(letter: str, sizes: Sequence[int], rounds: int, call: Callable[[int], None]) -> float:
    """The slope of log seconds over log size."""
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for k in range(rounds):
        for size in sizes:
            began = time.perf_counter()
            call(size)
            seconds[size].append(time.perf_counter() - began)
            print(f"round {k + 1}: {letter}={size} {seconds[size][-1]:.2f} s", file=sys.stderr, flush=True)
    medians = [median(seconds[size]) for size in sizes]
    slope = float(np.polyfit(np.log(sizes), np.log(medians), 1)[0])
    row = ", ".join(f"{size:,}: {taken:.2f} s" for size, taken in zip(sizes, medians, strict=True))
    print(f"time against {letter} (medians of {rounds})  {row}; exponent {slope:.2f}", flush=True)
    return slope

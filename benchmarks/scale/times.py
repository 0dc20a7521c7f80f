"""How the time of an account grows with the number of training examples and of queries.

Sizes take turns in every round, so that a slower minute of the machine meets all of them; the exponent is the slope of
log median time against log size. It is given for the clock on the wall, and beside it for seconds of the processor, all
threads together, which waiting for a turn does not lengthen.
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

Exponents = tuple[float, float]
"""By the clock on the wall, and by seconds of the processor."""


def against_examples(sizes: Sequence[int], queries: int, rounds: int, cache: Path) -> Exponents:
    """The exponents against N, each training one epoch long."""
    subjects = {size: make(size, str(cache)) for size in sizes}
    return exponent("N", sizes, rounds, lambda size: account(subjects[size], queries))


def against_queries(size: int, counts: Sequence[int], rounds: int, cache: Path) -> Exponents:
    """The exponents against M."""
    subject = make(size, str(cache))
    return exponent("M", counts, rounds, lambda count: account(subject, count))


def account(subject: Subject, queries: int) -> None:
    """The account of the first test images, in units."""
    assert subject.path is not None
    path, inputs = PathReader(subject.path), subject.test.inputs[:queries]
    pairs, units = Pairs.of(subject.predict(inputs)), cut(path, subject, queries)
    parts = (account_unit(path, subject, inputs, pairs, unit) for unit in units)
    total(units, parts, queries, len(subject.train))


def exponent(letter: str, sizes: Sequence[int], rounds: int, call: Callable[[int], None]) -> Exponents:
    """The slopes of log seconds over log size."""
    taken: dict[int, list[tuple[float, float]]] = {size: [] for size in sizes}
    for k in range(rounds):
        for size in sizes:
            began = time.perf_counter(), time.process_time()
            call(size)
            taken[size].append((time.perf_counter() - began[0], time.process_time() - began[1]))
            print(f"round {k + 1}: {letter}={size} {taken[size][-1][0]:.2f} s", file=sys.stderr, flush=True)
    wall, processor = ([median(t[clock] for t in taken[size]) for size in sizes] for clock in (0, 1))
    slopes = slope(sizes, wall), slope(sizes, processor)
    row = ", ".join(f"{n:,}: {w:.2f} ({p:.2f}) s" for n, w, p in zip(sizes, wall, processor, strict=True))
    print(
        f"time against {letter} (medians of {rounds}; in brackets, of the processor)  {row}; "
        f"exponent {slopes[0]:.3f} ({slopes[1]:.3f})",
        flush=True,
    )
    return slopes


def slope(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Of log seconds over log size, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])

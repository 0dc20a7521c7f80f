"""One case's figures: does the account close, and does it credit the examples that the finest account credits?

    relative residual   mean |residual| / mean |learned change|, over the queries; unexplained likewise
    credit cosine       median over queries of cos(contributions at the default setting, contributions step by step)

Smooth activations in float64 are accounted for with Gauss nodes in every step and must close to rounding. ReLU
in float32 is accounted for as the audit does it, from a path so thinned that most steps are replayed; its reference
is a path with every state, every step by itself, and many midpoints.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from torch import Tensor, nn

from benchmarks.fidelity.cases import CASES, Case
from benchmarks.fidelity.problem import precision
from benchmarks.fidelity.training import PLENTY, Trained, train
from brittle.accounts import open_path
from brittle.blame import described
from brittle.kernel.sweep import Quadrature, Swept, sweep
from brittle.records import Ledger, Pairs

EXACT = Quadrature(segment=1, nodes=8, most=8, tolerance=0.0, gauss=True)
DEFAULT = Quadrature()
FINE = Quadrature(segment=1, nodes=9, most=9, tolerance=0.0)

BAR_FLOAT64, BAR_RELU, BAR_COSINE = 1e-8, 0.02, 0.99

STATES = 24
"""States of weights alone for which the thinned path has room: with two buffers to each, every eighth is kept."""


@dataclass(frozen=True)
class Figures:
    """What was measured of one case; `missed` names the bars that it missed, or the error that was raised."""

    name: str
    float64: float | None = None
    unexplained: float | None = None
    relu: float | None = None
    relu_unexplained: float | None = None
    cosine: float | None = None
    drift: float | None = None
    every: int | None = None
    seconds: float = 0.0
    missed: tuple[str, ...] = ()

    @property
    def case(self) -> Case:
        return CASES[self.name]


def measured(names: Sequence[str]) -> Iterator[Figures]:
    """The figures of some cases, in order: as many at once as torch has threads, each with one."""
    if torch.get_num_threads() == 1:
        yield from map(measure, names)
        return
    with ProcessPoolExecutor(torch.get_num_threads(), get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield from pool.map(measure, names)


def measure(name: str) -> Figures:
    """Train and account for a case; an error becomes its name in `missed`, and its traceback is printed."""
    print(f"case {name}", file=sys.stderr, flush=True)
    began, found = perf_counter(), Figures(name)
    try:
        with TemporaryDirectory() as folder:
            found = _smooth(found, Path(folder))
            found = _relu(found, Path(folder))
        missed = tuple(_missed(found))
    except Exception as error:
        traceback.print_exc()
        missed = (described(error),)
    return replace(found, seconds=perf_counter() - began, missed=missed)


def _smooth(found: Figures, folder: Path) -> Figures:
    """The account of smooth activations in float64."""
    with precision(torch.float64):
        ledger = _account(train(found.case, nn.GELU, torch.float64, folder / "smooth"), EXACT).ledger
        return replace(found, float64=ledger.relative_residual, unexplained=_relative(ledger.unexplained, ledger))


def _relu(found: Figures, folder: Path) -> Figures:
    """The account of ReLU in float32 by default, and its credit against the reference."""
    case = found.case
    thinned = train(case, nn.ReLU, torch.float32, folder / "thinned", budget=_little(case))
    whole = train(case, nn.ReLU, torch.float32, folder / "whole", budget=PLENTY)
    swept, finest = _account(thinned, DEFAULT), _account(whole, FINE)
    ledger = swept.ledger
    return replace(
        found,
        relu=ledger.relative_residual,
        relu_unexplained=_relative(ledger.unexplained, ledger),
        cosine=torch.cosine_similarity(ledger.contributions, finest.ledger.contributions, dim=1).median().item(),
        drift=swept.drift,
        every=thinned.every,
    )


def _account(trained: Trained, quadrature: Quadrature) -> Swept:
    """The ledger of the queries, the path being checked at the door as in an audit."""
    subject = trained.subject
    path = open_path(subject)
    assert path is not None
    inputs = subject.test.inputs
    return sweep(path, subject, inputs, Pairs.of(subject.predict(inputs)), quadrature)


def _relative(row: Tensor, ledger: Ledger) -> float:
    return (row.abs().mean() / (ledger.output - ledger.start).abs().mean()).item()


def _little(case: Case) -> int:
    """Bytes that hold STATES states without optimizer buffers."""
    state = case.model(nn.ReLU).state_dict().values()
    return STATES * sum(t.numel() * t.element_size() for t in state)


def _missed(found: Figures) -> list[str]:
    """The bars that a case missed. A rule that is not known leaves something unexplained; so does mixed precision."""
    case = found.case
    bars = [
        (found.float64, BAR_FLOAT64, "float64"),
        (found.unexplained if case.known else 0.0, BAR_FLOAT64, "unexplained"),
        (found.relu if not case.mixed else 0.0, BAR_RELU, "relu"),
        (found.relu_unexplained if case.known and not case.mixed else 0.0, BAR_RELU, "relu unexplained"),
    ]
    missed = [f"{name} {value:.2g} > {bar:g}" for value, bar, name in bars if value is None or not value <= bar]
    if found.cosine is None or not found.cosine >= BAR_COSINE:
        missed.append(f"cosine {found.cosine} < {BAR_COSINE}")
    if found.every == 1:
        missed.append("nothing was replayed")
    return missed

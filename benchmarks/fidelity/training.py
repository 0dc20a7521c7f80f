"""Train a case and record it: an ordinary loop around `loops`, the same weights every time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch.amp import GradScaler

from benchmarks.fidelity.cases import STEPS, Case
from benchmarks.fidelity.draws import Batch
from benchmarks.fidelity.loops import Loop
from benchmarks.fidelity.models import Activation
from benchmarks.fidelity.problem import Problem, precision, problem
from brittle.path.recorder import Recorder
from brittle.subject import Subject

KILLED, LOST = STEPS // 2, 3
"""A resumed training has its checkpoint before step KILLED, and dies LOST steps later."""

PLENTY = 2 << 30
"""Bytes: the recorder's own budget, which keeps every state of these trainings."""


@dataclass(frozen=True)
class Trained:
    """A training that is over, and the interval at which its states were stored."""

    subject: Subject
    every: int


def train(case: Case, act: Activation, dtype: torch.dtype, folder: Path, budget: int = PLENTY) -> Trained:
    """Train a case from its fixed seed and record its path into `folder`."""
    with precision(dtype), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        data = problem(case.binary)
        loop = _loop(case, act)
        if case.resumed:
            loop = _killed_and_resumed(case, act, loop, data, folder, budget)
        else:
            loop.recorder = _recorder(case, loop, folder, budget)
            _run(case, loop, data)
        assert loop.recorder is not None
        loop.recorder.close()
        audited = (loop.average.module if loop.average else loop.model).eval()
        subject = Subject(
            audited, data.train, data.queries, path=folder, loss=case.loss, augment=case.augment, name=case.name
        )
        return Trained(subject, loop.recorder.every)


def _loop(case: Case, act: Activation) -> Loop:
    """Everything at the training's beginning."""
    model = case.model(act).train()
    if case.prepare:
        case.prepare(model)
    optimizer = case.optimizer(model)
    return Loop(
        model=model,
        optimizer=optimizer,
        loss=case.loss,
        clip=case.clip,
        schedule=case.schedule(optimizer) if case.schedule else None,
        average=case.average(model) if case.average else None,
        average_after=case.average_after,
        scaler=GradScaler("cpu", init_scale=1024.0, growth_interval=10),
    )


def _recorder(case: Case, loop: Loop, folder: Path, budget: int, resume: int | None = None) -> Recorder:
    return Recorder(
        loop.model, loop.optimizer, folder, budget, average=loop.average, repeats=case.repeats, resume=resume
    )


def _run(case: Case, loop: Loop, data: Problem, start: int = 0, stop: int | None = None) -> None:
    """Steps `start` to `stop` of the training."""
    steps = _gathered(case.draw(data.train, loop.model), case.gather)
    for batches in islice(steps, start, stop):
        case.take(loop, batches)
        loop.after()


def _killed_and_resumed(case: Case, act: Activation, loop: Loop, data: Problem, folder: Path, budget: int) -> Loop:
    """Train to a checkpoint and some steps on, forget everything, load the checkpoint and go on."""
    loop.recorder = _recorder(case, loop, folder, budget)
    _run(case, loop, data, stop=KILLED)
    safe, checkpoint = loop.recorder.flush(), loop.state()
    _run(case, loop, data, start=KILLED, stop=KILLED + LOST)
    loop.recorder.release()
    again = _loop(case, act)
    again.load_state(checkpoint)
    again.recorder = _recorder(case, again, folder, budget, resume=safe)
    _run(case, again, data, start=KILLED)
    return again


def _gathered(batches: Iterator[Batch], count: int) -> Iterator[list[Batch]]:
    """The batches, `count` for each step; the last step may have fewer."""
    while together := list(islice(batches, count)):
        yield together

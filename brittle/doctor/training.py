"""The training: what is known of it, whether that fits the subject, and what could be recorded or repeated."""

from __future__ import annotations

import inspect
from pathlib import Path as Folder

from brittle.doctor.check import Check, Visit, size
from brittle.doctor.gradients import made_step
from brittle.errors import BrittleError
from brittle.kernel.steps import check_step
from brittle.path.checkpoints import Checkpoints
from brittle.path.flat import FlatModel, state_of
from brittle.path.match import check_path
from brittle.path.recipe import OBSERVED
from brittle.path.replay import DRIFT_LIMIT, Path, intervals, replay
from brittle.path.store import PathReader
from brittle.path.training import bare, check_training
from brittle.report.formatting import percent
from brittle.subject import Subject

BUDGET = 2 << 30
"""Bytes of disk that a recorder takes by default."""


def opened(subject: Subject) -> Path | None:
    """What is known of the training, not yet held against the subject. Raises where it cannot be read."""
    if subject.checkpoints is not None:
        return Checkpoints(subject)
    return None if subject.path is None else PathReader(subject.path)


def known(v: Visit) -> Check:
    """What is known of the training, and what may be claimed from it."""
    path = v.path
    if path is None:
        line = "none: only local statements at the final weights; record the training, or pass checkpoints="
        return Check("path", "warn", line)
    if isinstance(path, Checkpoints):
        line = (
            f"{len(path.states)} checkpoints: which groups of examples matter may be claimed, not by how much, and "
            "nothing of single examples; record the training for that"
        )
        return Check("path", "warn", line)
    between = "interpolated" if path.optimizer == OBSERVED else "replayed"
    every = len(path.marks) == path.steps + 1
    states = "the state before every step" if every else f"{len(path.marks):,} states, the steps between {between}"
    line = f"{path.steps:,} steps of {path.optimizer_name}, {states}; {size(_bytes_in(path.root))}"
    if path.optimizer == OBSERVED or path.warnings:
        return Check("path", "warn", f"{line}. {' '.join(path.warnings)}")
    return Check("path", "ok", line)


def fitting(v: Visit) -> Check | None:
    """Does the path belong to this model and data, and replay? Nothing to say where none was recorded."""
    path = v.path
    if path is None or isinstance(path, Checkpoints):
        return None
    check_path(path, v.subject)
    start, stop = max(intervals(path), key=lambda ends: ends[1] - ends[0])
    if stop == start + 1 or path.optimizer == OBSERVED:
        return Check("replay", "ok", "the path belongs to this model and data")
    drift = replay(path, v.subject, FlatModel(v.subject.model, v.device), start, stop).drift
    line = f"the path belongs to this model and data; from step {start} to {stop} it replays {percent(drift, 3)} off"
    return Check("replay", "ok" if drift < DRIFT_LIMIT / 10 else "warn", f"{line} (at most {DRIFT_LIMIT:.0%})")


def recordable(v: Visit) -> Check:
    """Could a training of this model be recorded, and what would that take?"""
    model = v.subject.model
    try:
        check_training(bare(model))
        check_step(v.subject, FlatModel(model, v.device), made_step(v, training=True))
    except BrittleError as error:
        return Check("recording", "warn", f"a training of this model would be refused: {error}", error)
    if v.path is not None and not isinstance(v.path, Checkpoints):
        each, of = v.path.snapshot(v.path.marks[-1]).nbytes, ""
    else:
        each, of = state_of(model).nbytes, " under plain SGD (two with momentum, three under Adam)"
    fit = f"{max(BUDGET // each, 1):,} fit in {size(BUDGET)}"
    return Check("recording", "ok", f"a stored state takes {size(each)}{of}; {fit}, the steps between are replayed")


def repeatable(v: Visit) -> Check:
    """Can data be suggested, and the suggestions be checked?"""
    s = v.subject
    if s.retrain is not None:
        try:
            inspect.signature(s.retrain).bind(s.train, 0)
        except TypeError as error:
            return Check("suggestions", "fail", f"retrain must take (examples, seed), {error}; correct it", error)
        except ValueError:  # no signature to look at
            pass
    if s.pool is None:
        line = "no pool=: the report says which regions lack data, but suggests no examples"
    elif s.retrain is None:
        line = f"from a pool of {len(s.pool):,}; no retrain=: they are not checked by retraining"
    else:
        line = f"from a pool of {len(s.pool):,}, checked by {2 * v.effort.retrainings} retrainings"
    return Check("suggestions", "ok", line)


def _bytes_in(folder: Folder) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

"""An interrupted recording taken up again: what lies behind the checkpoint is cut off, the rest is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from brittle.errors import PathMismatchError
from brittle.path.flat import Slot
from brittle.path.observed import Snapshot
from brittle.path.packing import unpacked_states, unpacked_steps
from brittle.path.store import delete, files_of, read_header, write_states, write_steps
from brittle.shards import read_arrays, read_notes, whole


def cut(root: Path, at: int, slots: Sequence[Slot], optimizer: str) -> tuple[Snapshot | None, list[int], int]:
    """Take up an unfinished path again after its first `at` steps: what lies behind them is deleted.

    Returns the state at `at` if it is stored, the steps before `at` that have one, and the bytes these states take.
    Raises `PathMismatchError` where the path is another model's or does not reach so far.
    """
    header = read_header(root)
    if (_plain(slots), optimizer) != ([(n, tuple(s), b) for n, s, b in header["slots"]], header["optimizer"]):
        raise PathMismatchError(
            f"resume={at} must go on with the model and the optimizer of the path in {root}, found others; name "
            "another folder, or load what this path was begun with"
        )
    reached = _cut_steps(root, at)
    if reached < at:
        raise PathMismatchError(
            f"resume={at} must lie on the recorded path, {root} holds {reached} whole steps; resume from a checkpoint "
            "that was saved before that (recorder.flush() returns the steps that are safe), or train anew"
        )
    return _cut_states(root, at)


def _cut_steps(root: Path, at: int) -> int:
    """Keep the whole blocks up to step `at`; returns the number of steps that are left."""
    reached = 0
    for file in files_of(root, "steps"):
        if not whole(file) or int(file.stem) != reached or reached >= at:
            delete(file)
            continue
        steps = unpacked_steps(read_arrays(file), read_notes(file))[: at - reached]
        write_steps(root, reached, steps)
        reached += len(steps)
    return reached


def _cut_states(root: Path, at: int) -> tuple[Snapshot | None, list[int], int]:
    there: Snapshot | None = None
    marks: list[int] = []
    size = 0
    for file in files_of(root, "states"):
        found = unpacked_states(read_arrays(file)) if whole(file) else []
        there = next((s for s in found if s.step == at), there)
        keep = [s for s in found if s.step < at]
        marks += [s.step for s in keep]
        size += sum(s.nbytes for s in keep)
        if not keep:
            delete(file)
        elif len(keep) < len(found):
            write_states(root, keep)
    return there, marks, size


def _plain(slots: Sequence[Slot]) -> list[tuple[str, tuple[int, ...], bool]]:
    return [(s.name, tuple(s.shape), s.buffer) for s in slots]

"""An interrupted recording taken up again: what lies behind the checkpoint is dropped, the rest is kept.

Nothing that is kept is written anew: the reader takes of a block of steps only those before the next block.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from brittle.errors import PathMismatchError
from brittle.path.flat import Slot
from brittle.path.observed import Snapshot
from brittle.path.packing import unpacked_states, unpacked_steps
from brittle.path.store import delete, files_of, first_of, read_header
from brittle.shards import read_arrays, read_notes, whole


def state_at(root: Path, at: int, slots: Sequence[Slot], optimizer: str) -> Snapshot | None:
    """The state that is stored before step `at` of an unfinished path, if there is one. Changes nothing.

    Raises `PathMismatchError` where the path is another model's, or does not reach so far.
    """
    header = read_header(root)
    mine = [[s.name, list(s.shape), s.buffer] for s in slots]
    if (mine, optimizer) != (header["slots"], header["optimizer"]):
        raise PathMismatchError(
            f"resume={at} must go on with the model and the optimizer of the path in {root}, found others; name "
            "another folder, or load what this path was begun with"
        )
    reached = 0
    for file in files_of(root, "steps"):
        if whole(file) and first_of(file) <= reached:
            reached = first_of(file) + len(unpacked_steps(read_arrays(file), read_notes(file)))
    if not 0 <= at <= reached:
        raise PathMismatchError(
            f"resume={at} must lie on the recorded path, {root} holds {reached} whole steps; resume from a checkpoint "
            "that was saved before that (recorder.flush() returns the steps that are safe), or train anew"
        )
    return next((s for file in files_of(root, "states") for s in _states(file) if s.step == at), None)


def cut(root: Path, at: int) -> dict[int, int]:
    """Drop what lies behind the first `at` steps; returns the bytes of the states that stay, by their steps."""
    for ending in (root / "end.json", root / "average.safetensors"):
        if ending.exists():
            delete(ending)
    for file in reversed(files_of(root, "steps")):
        if first_of(file) >= at or not whole(file):
            delete(file)
    kept: dict[int, int] = {}
    for file in reversed(files_of(root, "states")):
        states = _states(file)
        if not states or states[0].step >= at:
            delete(file)
        else:
            kept |= {s.step: s.nbytes for s in states if s.step < at}
    return dict(sorted(kept.items()))


def _states(file: Path) -> list[Snapshot]:
    return unpacked_states(read_arrays(file)) if whole(file) else []

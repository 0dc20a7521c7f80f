"""An interrupted recording taken up again: what lies behind the checkpoint is dropped, the rest is kept.

Nothing that is kept is written anew: the reader takes of a block of steps only those before the next block.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from brittle.errors import PathMismatchError
from brittle.path.flat import Slot
from brittle.path.observed import Snapshot
from brittle.path.packing import unpacked_states, unpacked_steps
from brittle.path.recipe import OBSERVED
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


def check_as_it_was(there: Snapshot, now: Snapshot, optimizer: str) -> None:
    """Model and optimizer must be as they were before a stored state's step. Raises `PathMismatchError`."""
    at = there.step
    remedy = "load the checkpoint of that step into model and optimizer before the Recorder is made"
    if not torch.equal(there.state, now.state):
        raise PathMismatchError(
            f"resume={at} must find the model as it was after {at} steps, its weights differ from those recorded; "
            f"{remedy}"
        )
    if optimizer == OBSERVED:
        return  # what it holds is not known
    names = sorted(there.buffers.keys() | now.buffers.keys())
    held = [(name, there.buffers.get(name), now.buffers.get(name)) for name in names]
    other = [name for name, a, b in held if a is None or b is None or not torch.equal(a, b)]
    if optimizer != "SGD" and not torch.equal(there.counts, now.counts):  # SGD does not count
        other.append("step")
    if other:
        raise PathMismatchError(
            f"resume={at} must find the optimizer as it was after {at} steps, its {', '.join(other)} differ from what "
            f"was recorded; {remedy}"
        )


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

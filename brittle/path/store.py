"""The recorded path on disk: what was observed of every step, and the states between which steps are replayed.

    path.json                    the architecture and the optimizer
    steps/00000000.safetensors   a block of steps: examples, learning rates, settings, ...; written once
    states/00000000-2.safetensors  the states (and what the optimizer holds) before steps that are alike modulo 2
    average.safetensors          the averaged weights (EMA, SWA), where they are the audited model
    end.json                     the number of steps and the states that there must be; absent while training runs

A crash loses the block that was being filled and nothing else: no file is ever written over. States that the next
thinning keeps lie in other files than those that it takes away, so that it deletes files and writes nothing. The one
after that has to write what stays under a new name before the old file goes; where both are there, they hold the
same. Loading costs one block of memory at a time.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brittle.errors import DamagedFileError, PathMismatchError
from brittle.path.flat import Slot
from brittle.path.observed import Snapshot, Step
from brittle.path.optimizers import Recipe
from brittle.path.packing import packed_states, packed_steps, unpacked_states, unpacked_steps
from brittle.shards import read_arrays, read_bytes, read_notes, write_arrays, write_bytes

FORMAT = 2


def write_header(root: Path, slots: Sequence[Slot], optimizer: str, name: str, warnings: Sequence[str]) -> None:
    """Write path.json. optimizer: the rule's name; name: the class's own; warnings: what a reader must be told."""
    header = {
        "format": FORMAT,
        "slots": [[s.name, list(s.shape), s.buffer] for s in slots],
        "optimizer": optimizer,
        "optimizer_name": name,
        "warnings": list(warnings),
        "torch": torch.__version__,
    }
    write_bytes(root / "path.json", json.dumps(header, indent=1).encode())


def write_steps(root: Path, first: int, steps: Sequence[Step]) -> None:
    """Write the steps from `first` on as one block."""
    arrays, notes = packed_steps(steps)
    write_arrays(root / "steps" / f"{first:08d}.safetensors", arrays, notes)


def write_states(root: Path, snapshots: Sequence[Snapshot], every: int) -> None:
    """Write states, of which the next thinning keeps those before steps that are multiples of 2 `every`."""
    spread = 2 * every
    for rest in sorted({s.step % spread for s in snapshots}):
        alike = [s for s in snapshots if s.step % spread == rest]
        write_arrays(root / "states" / f"{alike[0].step:08d}-{spread}.safetensors", packed_states(alike))


def thin_states(root: Path, every: int) -> None:
    """Keep the states before steps that are multiples of `every`."""
    for file in files_of(root, "states"):
        if _spread_of(file) % every == 0:
            if first_of(file) % every:
                delete(file)
            continue
        found = unpacked_states(read_arrays(file))
        keep = [s for s in found if s.step % every == 0]
        if keep and len(keep) < len(found):
            write_states(root, keep, every)
        if len(keep) < len(found):
            delete(file)


def write_average(root: Path, state: Tensor) -> None:
    """Write the averaged weights and running statistics, (P,)."""
    write_arrays(root / "average.safetensors", {"state": state})


def write_end(root: Path, steps: int, marks: Sequence[int]) -> None:
    """Mark the path as finished: the number of steps, and the steps before which there must be a state."""
    write_bytes(root / "end.json", json.dumps({"steps": steps, "marks": list(marks)}).encode())


def finished(root: Path) -> bool:
    """Whether a finished path lies in `root`."""
    return (root / "end.json").exists()


def clear(root: Path) -> None:
    """Delete what an interrupted training left behind."""
    for folder in ("steps", "states"):
        for file in (root / folder).glob("*"):
            file.unlink()


class PathReader:
    """A finished path: `steps` of them, `marks` the steps before which a state is stored (the last is `steps`),
    `largest_id`, the largest position of a training example in any batch, and `visits`, examples over all batches.

    Raises `DamagedFileError` where a file is missing, cut short or altered, and `PathMismatchError` where the
    path was never finished or is of another format.
    """

    def __init__(self, root: Path | str) -> None:
        root = Path(root)
        header = read_header(root)
        if not finished(root):
            raise PathMismatchError(
                f"the path in {root} must be finished, it has no end.json; let the training run to recorder.close()"
            )
        self.root = root
        self.optimizer: str = header["optimizer"]
        self.optimizer_name: str = header["optimizer_name"]
        self.warnings: list[str] = header["warnings"]
        self.slots = [(name, tuple(shape), buffer) for name, shape, buffer in header["slots"]]
        self.sizes = torch.tensor([torch.Size(shape).numel() for _, shape, _ in self.slots])
        end = json.loads(read_bytes(root / "end.json"))
        self.steps: int = end["steps"]
        self._block, self._states = lru_cache(maxsize=2)(self._read_block), lru_cache(maxsize=2)(self._read_states)
        self.largest_id, self.visits = -1, 0
        self.moved = torch.zeros(len(self.slots), dtype=torch.bool)
        self.autocast, self.averaging = False, torch.zeros(self.steps, dtype=torch.float64)
        self._firsts = self._read_steps()
        self._homes = self._find_states()
        self.marks = sorted({0, *end["marks"], self.steps})
        self._check_marks()

    @cached_property
    def average(self) -> Tensor | None:
        """The averaged weights that are the audited model, (P,); None where the last weights are."""
        file = self.root / "average.safetensors"
        return read_arrays(file)["state"] if self.averaging.any() else None

    @cached_property
    def behind(self) -> Tensor:
        """How much of each step the averaged weights lack, (S,): average = w_S - sum_s behind_s D_s.

        With shares a_s of the new weights in the average after step s, behind_s = prod_{r >= s} (1 - a_r).
        """
        return (1 - self.averaging).flip(0).cumprod(0).flip(0)

    def final(self) -> Tensor:
        """The audited weights, (P,): the averaged ones where there are any, else the last."""
        return self.snapshot(self.steps).state if self.average is None else self.average

    def snapshot(self, step: int) -> Snapshot:
        """The stored state before a step of `marks`."""
        return next(s for s in self._states(self._homes[step]) if s.step == step)

    def step(self, step: int) -> Step:
        """What was observed of a step."""
        first = self._firsts[bisect.bisect_right(self._firsts, step) - 1]
        return self._block(first)[step - first]

    def recipe(self, step: int) -> Recipe:
        """The coefficients' source for one step."""
        seen = self.step(step)
        owner = torch.tensor(seen.manner.owner)
        settings = seen.manner.settings
        parts = (seen.counts, seen.factors, seen.extra, seen.lr, settings)
        return Recipe(self.optimizer, self.sizes, owner, *parts, dtype=self.dtype, moved=self.moved)

    def _read_steps(self) -> list[int]:
        """Look once at every block of steps: they must follow each other without a gap."""
        firsts = [first_of(file) for file in files_of(self.root, "steps")]
        reached = 0
        for first, following in pairwise([*firsts, self.steps]):
            steps = self._block(first)[: following - first]
            if first != reached:
                raise DamagedFileError(
                    f"{self.root}/steps lacks the steps from {reached} to {first}; record the training again"
                )
            for k, step in enumerate(steps, start=first):
                self.visits += step.examples
                self.moved |= step.counts >= 0
                self.largest_id = max(self.largest_id, *(int(batch.ids.max()) for batch in step.batches))
                self.autocast |= any(batch.autocast for batch in step.batches)
                self.averaging[k] = step.averaged
            reached = first + len(steps)
        if reached != self.steps:
            raise DamagedFileError(
                f"{self.root}/steps must hold {self.steps} steps, found {reached}; record the training again"
            )
        return firsts

    def _find_states(self) -> dict[int, Path]:
        """The file of every stored state."""
        homes: dict[int, Path] = {}
        for file in files_of(self.root, "states"):
            found = self._states(file)
            homes |= {s.step: file for s in found if s.step <= self.steps}
            self.dtype = found[0].state.dtype
        return homes

    def _check_marks(self) -> None:
        lost = sorted(set(self.marks) - set(self._homes))
        if lost:
            raise DamagedFileError(
                f"{self.root}/states must hold the states that were recorded, the one before step {lost[0]} is "
                "missing; copy the whole folder, or record the training again"
            )

    def _read_block(self, first: int) -> list[Step]:
        file = self.root / "steps" / f"{first:08d}.safetensors"
        return unpacked_steps(read_arrays(file), read_notes(file))

    def _read_states(self, file: Path) -> list[Snapshot]:
        return unpacked_states(read_arrays(file))


def read_header(root: Path) -> dict[str, Any]:
    """What path.json says. Raises `PathMismatchError` where there is none, or one of another format."""
    if not (root / "path.json").exists():
        raise PathMismatchError(
            f"path= must name a folder that a Recorder wrote, {root} has no path.json; correct it or leave it out"
        )
    header = json.loads(read_bytes(root / "path.json"))
    if header["format"] != FORMAT:
        raise PathMismatchError(
            f"the path in {root} has format {header['format']}, this version reads {FORMAT}; record it again"
        )
    return header


def first_of(file: Path) -> int:
    """The first step of a file."""
    return int(file.stem.partition("-")[0])


def _spread_of(file: Path) -> int:
    """A number modulo which the steps of a file's states are alike."""
    return int(file.stem.partition("-")[2])


def files_of(root: Path, folder: str) -> list[Path]:
    """The files of a folder, in the order of their steps."""
    return sorted((root / folder).glob("*.safetensors"))


def delete(file: Path) -> None:
    """A file and its checksum, which goes last: a file without its checksum does not count."""
    file.with_name(file.name + ".sha256").unlink(missing_ok=True)
    file.unlink()

"""The recorded path on disk: blocks of steps, written whole, and the reader that walks them.

    path.json                    the architecture, the optimizer, which group moves which parameter
    blocks/00000000.safetensors  a block: the states (and optimizer buffers) before some of its steps,
                                 and for every step its examples, learning rates, settings and clipping;
                                 the last block holds the final state alone
    end.json                     the number of steps; written by `close`, absent while training runs

A crash loses the block that was being filled and nothing else. Between two stored states the steps are
replayed (`replay`). Loading costs one block of memory at a time.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brittle.errors import DamagedFileError, PathMismatchError
from brittle.path.flat import Slot
from brittle.path.rules import BUFFERS, Recipe
from brittle.shards import read_arrays, read_bytes, read_notes, write_arrays, write_bytes

FORMAT = 1


@dataclass(frozen=True)
class Step:
    """What was observed of one step: its examples and how the optimizer was set."""

    ids: Tensor  # shape: (B,) int64
    lr: tuple[float, ...]
    settings: tuple[Mapping[str, Any], ...]
    clip: float


@dataclass(frozen=True)
class Snapshot:
    """The state before a step, and the optimizer's own buffers."""

    step: int
    state: Tensor  # shape: (P,)
    buffers: Mapping[str, Tensor]  # each of shape (parameters,)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.state, *self.buffers.values()))

    def to(self, device: torch.device) -> Snapshot:
        """The same snapshot on a device."""
        return Snapshot(self.step, self.state.to(device), {k: b.to(device) for k, b in self.buffers.items()})


def write_header(root: Path, slots: Sequence[Slot], optimizer: str, owner: Sequence[int]) -> None:
    """Write path.json. owner: the parameter group of each slot, -1 where no optimizer moves it."""
    header = {
        "format": FORMAT,
        "slots": [[s.name, list(s.shape), s.buffer] for s in slots],
        "optimizer": optimizer,
        "owner": list(owner),
        "torch": torch.__version__,
    }
    write_bytes(root / "path.json", json.dumps(header, indent=1).encode())


def write_block(root: Path, first: int, steps: Sequence[Step], snapshots: Sequence[Snapshot]) -> None:
    """Write the steps from `first` on, and the snapshots taken before some of them (none where they were thinned)."""
    arrays = {
        "ids": torch.cat([s.ids for s in steps]) if steps else torch.zeros(0, dtype=torch.int64),
        "counts": torch.tensor([len(s.ids) for s in steps], dtype=torch.int64),
        "lr": torch.tensor([s.lr for s in steps], dtype=torch.float64),
        "clip": torch.tensor([s.clip for s in steps], dtype=torch.float64),
        "at": torch.tensor([s.step for s in snapshots], dtype=torch.int64),
    }
    if snapshots:
        arrays["state"] = torch.stack([s.state for s in snapshots])
        for name in snapshots[0].buffers:
            arrays[f"buffer.{name}"] = torch.stack([s.buffers[name] for s in snapshots])
    changes = [(k, s.settings) for k, s in enumerate(steps) if k == 0 or s.settings != steps[k - 1].settings]
    write_arrays(_block(root, first), arrays, {"settings": json.dumps(changes)})


def thin_blocks(root: Path, every: int) -> int:
    """Keep only the snapshots before steps that are multiples of `every`; returns the bytes that are left."""
    left = 0
    for file in _blocks(root):
        arrays, notes = read_arrays(file), read_notes(file)
        keep = arrays["at"] % every == 0
        stored = [name for name in arrays if _of_snapshots(name)]
        for name in (*stored, "at"):
            arrays[name] = arrays[name][keep]
        if not keep.all():
            write_arrays(file, arrays, notes)
        left += sum(arrays[name].numel() * arrays[name].element_size() for name in stored)
    return left


def write_end(root: Path, steps: int) -> None:
    """Mark the path as finished."""
    write_bytes(root / "end.json", json.dumps({"steps": steps}).encode())


def finished(root: Path) -> bool:
    """Whether a finished path lies in `root`."""
    return (root / "end.json").exists()


class PathReader:
    """A finished path: `steps` of them, `marks` the steps before which a state is stored (the last is `steps`),
    `largest_id`, the largest position of a training example in any batch, and `visits`, examples over all batches.

    Raises `DamagedFileError` where a file is missing, cut short or altered, and `PathMismatchError` where the
    path was never finished or is of another format.
    """

    def __init__(self, root: Path) -> None:
        if not (root / "path.json").exists():
            raise PathMismatchError(
                f"path= must name a folder that a Recorder wrote, {root} has no path.json; correct it or leave it out"
            )
        if not finished(root):
            raise PathMismatchError(
                f"the path in {root} must be finished, it has no end.json; let the training run to recorder.close()"
            )
        self.root = root
        header = json.loads(read_bytes(root / "path.json"))
        if header["format"] != FORMAT:
            raise PathMismatchError(
                f"the path in {root} has format {header['format']}, this version reads {FORMAT}; record it again"
            )
        self.optimizer: str = header["optimizer"]
        self.slots = [(name, tuple(shape), buffer) for name, shape, buffer in header["slots"]]
        self._owners: list[int] = header["owner"]
        self.steps: int = json.loads(read_bytes(root / "end.json"))["steps"]
        self._load = lru_cache(maxsize=2)(self._read_block)
        self.largest_id, self.visits = -1, 0
        self.marks = self._find_marks()

    @cached_property
    def owner(self) -> Tensor:
        """The parameter group of each coordinate of the state, -1 where no optimizer moves it. Shape (P,)."""
        parts = [torch.full((torch.Size(s).numel(),), o) for (_, s, _), o in zip(self.slots, self._owners, strict=True)]
        return torch.cat(parts)

    @property
    def buffer_names(self) -> tuple[str, ...]:
        return BUFFERS[self.optimizer]

    def snapshot(self, step: int) -> Snapshot:
        """The stored state before a step of `marks`."""
        _, block = self._block_of(step)
        row = int((block["at"] == step).nonzero()[0, 0])
        buffers = {name: block[f"buffer.{name}"][row] for name in self.buffer_names}
        return Snapshot(step, block["state"][row], buffers)

    def step(self, step: int) -> Step:
        """What was observed of a step."""
        first, block = self._block_of(step)
        k = step - first
        start = int(block["counts"][:k].sum())
        ids = block["ids"][start : start + int(block["counts"][k])]
        return Step(ids, tuple(block["lr"][k].tolist()), self._settings(first, k), float(block["clip"][k]))

    def recipe(self, step: int) -> Recipe:
        """The coefficients' source for one step."""
        seen = self.step(step)
        return Recipe(self.optimizer, self.owner, step, seen.lr, seen.settings, seen.clip, self._dtype)

    def _find_marks(self) -> list[int]:
        self._firsts, marks, reached = [], [], 0
        for file in _blocks(self.root):
            first, block = int(file.stem), read_arrays(file)
            if first != reached:
                raise DamagedFileError(
                    f"{self.root}/blocks lacks the steps from {reached} to {first}; record the training again"
                )
            self._firsts.append(first)
            marks += block["at"].tolist()
            if len(block["at"]):
                self._dtype = block["state"].dtype
            self.largest_id = max(self.largest_id, int(block["ids"].max()) if len(block["ids"]) else -1)
            self.visits += len(block["ids"])
            reached = first + len(block["counts"])
        if reached != self.steps or marks[:1] != [0] or marks[-1] != self.steps:
            raise DamagedFileError(
                f"{self.root} must hold {self.steps} steps and the states at both ends, found {reached} steps; "
                "record the training again"
            )
        return sorted(set(marks))

    def _block_of(self, step: int) -> tuple[int, dict[str, Tensor]]:
        first = self._firsts[bisect.bisect_right(self._firsts, step) - 1]
        return first, self._load(first)

    def _read_block(self, first: int) -> dict[str, Tensor]:
        return read_arrays(_block(self.root, first))

    @lru_cache(maxsize=64)  # noqa: B019  (a reader lives as long as its audit)
    def _changes(self, first: int) -> list[tuple[int, list[dict[str, Any]]]]:
        return json.loads(read_notes(_block(self.root, first))["settings"])

    def _settings(self, first: int, k: int) -> tuple[Mapping[str, Any], ...]:
        return tuple(next(s for at, s in reversed(self._changes(first)) if at <= k))


def _of_snapshots(name: str) -> bool:
    return name == "state" or name.startswith("buffer.")


def _blocks(root: Path) -> list[Path]:
    """The files of all blocks, in the order of their steps."""
    return sorted((root / "blocks").glob("*.safetensors"))


def _block(root: Path, first: int) -> Path:
    return root / "blocks" / f"{first:08d}.safetensors"

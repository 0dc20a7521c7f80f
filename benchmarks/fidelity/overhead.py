"""What recording costs: training with the recorder over training without, in one process, in alternating blocks.

Measured are the first steps of a training. They are the dearest: states are stored before every k-th step, and k only
grows, with what writing takes beside the training and with what lies on disk.

    Fashion-MNIST CNN   4,000 steps, nine epochs of 60,000 images
    ResNet-18           48 steps, more than one epoch of 5,000 images

All that a block recorded is on disk before its time is taken, although writing goes on beside the training otherwise.
The overhead is the ratio of the medians of the blocks; the ratio of all time spent is given beside it, and the k that
was reached. Random inputs: the time does not depend on them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.fidelity.resnet import network as resnet18
from brittle.examples.fashion_mnist import network as small_cnn
from brittle.path.recorder import Recorder

BATCH, POOL = 128, 1_024
"""Examples a step, and different ones in all."""

NOTHING: dict[str, Any] = dict.fromkeys(
    f"recording_overhead{key}" for key in ("", "_total", "_every", "_small", "_small_total", "_small_every")
)
"""The keys of this part, where it did not run."""


@dataclass(frozen=True)
class Setting:
    """What is trained. blocks: how often so many steps, `block`, are timed together."""

    name: str
    network: Callable[[int], nn.Module]
    optimizer: Callable[[nn.Module], Optimizer]
    shape: tuple[int, ...]
    blocks: int
    block: int


SMALL = Setting(
    "Fashion-MNIST CNN", small_cnn, lambda m: SGD(m.parameters(), lr=0.01, momentum=0.9), (1, 28, 28), 10, 400
)
LARGE = Setting("ResNet-18", resnet18, lambda m: AdamW(m.parameters(), lr=1e-4), (3, 32, 32), 6, 8)


@dataclass
class Timing:
    """Seconds of each block, and the k that was reached."""

    every: int = 1
    plain: list[float] = field(default_factory=list)
    recorded: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return median(self.recorded) / median(self.plain)

    @property
    def total(self) -> float:
        return sum(self.recorded) / sum(self.plain)


def run() -> dict[str, Any]:
    """Both overheads by key."""
    found = dict(NOTHING)
    for setting, key in ((SMALL, "recording_overhead_small"), (LARGE, "recording_overhead")):
        timing = compare(setting)
        found |= {key: timing.ratio, f"{key}_total": timing.total, f"{key}_every": timing.every}
        print(
            f"\nrecording {setting.name}: {median(timing.plain) / setting.block * 1e3:.1f} ms a step, overhead "
            f"{timing.ratio:.3f} (ratio of medians over {len(timing.plain)} blocks of {setting.block} steps), "
            f"{timing.total:.3f} in all, k = {timing.every}",
            flush=True,
        )
    return found


def compare(setting: Setting) -> Timing:
    """Two copies of one training, one of them recorded, in alternating blocks."""
    timing, draw = Timing(), torch.Generator().manual_seed(0)
    inputs = torch.rand(POOL, *setting.shape, generator=draw)
    targets = torch.randint(10, (POOL,), generator=draw)
    plain, recorded = (_Side(setting, inputs, targets) for _ in range(2))
    with (
        TemporaryDirectory() as folder,
        Recorder(recorded.model, recorded.optimizer, Path(folder) / "path") as recorder,
    ):
        recorded.recorder = recorder
        for _ in range(setting.blocks):
            for side, seconds in _in_turn((plain, timing.plain), (recorded, timing.recorded), len(timing.plain)):
                seconds.append(side.block(setting.block))
            last = f"{timing.plain[-1]:.2f} s plain, {timing.recorded[-1]:.2f} s recorded"
            print(f"{setting.name}: {recorder.steps} steps, k = {recorder.every}, {last}", file=sys.stderr, flush=True)
        timing.every = recorder.every
    return timing


class _Side:
    """One of the two trainings."""

    def __init__(self, setting: Setting, inputs: Tensor, targets: Tensor) -> None:
        self.model = setting.network(0).train()
        self.optimizer = setting.optimizer(self.model)
        self.inputs, self.targets = inputs, targets
        self.recorder: Recorder | None = None
        self.draw = torch.Generator().manual_seed(1)

    def step(self) -> None:
        """Take one step."""
        ids = torch.randperm(len(self.targets), generator=self.draw)[:BATCH]
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.inputs[ids]), self.targets[ids]).backward()
        if self.recorder is not None:
            self.recorder.batch(ids)
        self.optimizer.step()

    def block(self, steps: int) -> float:
        """Take some steps, and write what was recorded of them; returns the seconds that it took."""
        began = perf_counter()
        for _ in range(steps):
            self.step()
        if self.recorder is not None:
            self.recorder.flush()
        return perf_counter() - began


def _in_turn(first: Any, second: Any, count: int) -> tuple[Any, Any]:
    """Both, the one that begins changing from round to round."""
    return (first, second) if count % 2 == 0 else (second, first)

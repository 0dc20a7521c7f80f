"""The training loop of the examples, with the three lines that record its path: copy it.

    recorder = Recorder(model, optimizer, "runs/path")          # before the first step
    recorder.batch(ids)                                         # between backward() and step()
    recorder.close()                                            # after the last step (`with` does it)

`trained` keeps the result: the path and the final weights lie in a folder, and are taken from there the next
time. A training that was interrupted begins again.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from brittle.data import Examples
from brittle.locks import hold
from brittle.path.recorder import Recorder
from brittle.settings import digest
from brittle.shards import read_arrays, read_notes, whole, write_arrays
from brittle.subject import Retrain

QUIET = "BRITTLE_NO_PROGRESS"
"""The environment variable that turns progress bars off, whatever its value; `--no-progress` sets it."""

Build = Callable[[int], nn.Module]
"""seed -> a fresh, untrained model."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: stochastic gradient descent with momentum .9 and a cosine schedule."""

    mean: float
    std: float
    epochs: int
    batch: int
    lr: float
    seed: int


def train(model: nn.Module, data: Examples, recipe: Recipe, path: Path | None = None, bar: str = "") -> nn.Module:
    """Train a fresh model in place. path: where to record, if at all. bar: the progress bar's name, none if empty."""
    order = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=0.9)
    steps = recipe.epochs * math.ceil(len(data) / recipe.batch)
    schedule = CosineAnnealingLR(optimizer, steps)
    model.train()
    with (
        Recorder(model, optimizer, path) if path else nullcontext() as recorder,
        tqdm(
            total=steps,
            desc=bar,
            unit="step",
            mininterval=0.5,
            disable=None if bar and QUIET not in os.environ else True,
        ) as progress,
    ):
        for _ in range(recipe.epochs):
            for ids in torch.randperm(len(data), generator=order).split(recipe.batch):
                optimizer.zero_grad()
                logits = model((data.inputs[ids] - recipe.mean) / recipe.std)
                F.cross_entropy(logits, data.targets[ids]).backward()
                if recorder:
                    recorder.batch(ids)
                optimizer.step()
                schedule.step()
                progress.update()
    return model.eval()


def trained(build: Build, data: Examples, recipe: Recipe, folder: Path, bar: str) -> tuple[nn.Module, Path]:
    """The trained model and the path that it was recorded into: read from `folder`, or trained into it now."""
    weights, path = folder / "weights.safetensors", folder / "path"
    model = build(recipe.seed)
    notes = {"recipe": json.dumps(asdict(recipe)), "model": str(model), "data": digest(data.inputs, data.targets)}
    with hold(folder, wait=True):
        if whole(weights) and read_notes(weights) == notes:
            model.load_state_dict(read_arrays(weights))
            return model.eval(), path
        if (path / "path.json").exists():  # of another recipe
            shutil.rmtree(path)
        train(model, data, recipe, path, bar)
        write_arrays(weights, model.state_dict(), notes)
    return model, path


def retrainer(build: Build, recipe: Recipe) -> Retrain:
    """(examples, seed) -> the same network trained on them by the same recipe, in silence and without a path."""
    return lambda data, seed: train(build(seed), data, replace(recipe, seed=seed))


def seeded(build: Callable[[], nn.Module]) -> Build:
    """A network whose initial weights depend on the seed alone."""

    def initial(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build()

    return initial

"""Three data sets, and on each of them small networks of several seeds, their paths recorded.

    MNIST            1,000 training images     a CNN of 55,594 parameters
    Fashion-MNIST   10,000                     the same
    CIFAR-10        10,000                     a CNN of 60,854 parameters

All images that train no network are held out: the official test images and the unused training images, in an order
that is drawn once. The first of them are the calibration part, the next are sealed; neither depends on a network.
Networks of one data set share their training images and differ in initial weights and order of batches.

Data: Y. LeCun, C. Cortes, C. Burges, "The MNIST database"; H. Xiao, K. Rasul, R. Vollgraf 2017, "Fashion-MNIST"
(arXiv 1708.07747); A. Krizhevsky 2009, "Learning multiple layers of features from tiny images".
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.datasets import MNIST, FashionMNIST

from brittle.data import Examples
from brittle.errors import SealedError
from brittle.examples.fashion_mnist import network
from brittle.examples.training import Recipe, seeded, train, trained
from brittle.settings import digest
from brittle.shards import read_arrays, read_notes, whole, write_arrays
from brittle.subject import Subject

ENSEMBLE = 5
"""Networks of each data set; the first of them are audited."""

BATCH, RATE = 64, 0.05

BLANK = 0
"""Where a label is not to be seen."""


@dataclass(frozen=True)
class DataSet:
    """One data set: how many of its images train, how long, and what."""

    name: str
    train: int
    epochs: int
    build: Callable[[int], nn.Module]


@dataclass(frozen=True)
class Size:
    """How much is done."""

    train: int  # images, at most
    epochs: int  # at most
    calibration: int
    sealed: int
    seeds: int  # networks audited, of `ENSEMBLE`
    probed: tuple[int, int]  # images of the calibration and of the sealed part that are probed
    resamples: int = 1000


FULL = Size(train=10_000, epochs=20, calibration=6_000, sealed=10_000, seeds=3, probed=(2_000, 3_000))
QUICK = Size(train=500, epochs=4, calibration=400, sealed=400, seeds=2, probed=(200, 200), resamples=100)


class Envelope:
    """The labels of the sealed part, given out once, in exchange for the digest of all that was predicted."""

    def __init__(self, labels: Tensor) -> None:
        self._labels: Tensor | None = labels
        self.fixed = ""

    def open(self, fixed: str) -> Tensor:
        """Raises `SealedError` the second time."""
        if self._labels is None:
            raise SealedError(f"sealed labels are given out once, they were opened with {self.fixed} fixed; keep them")
        labels, self._labels, self.fixed = self._labels, None, fixed
        return labels


@dataclass(frozen=True)
class Networks:
    """The networks of one data set. The subjects' test images are the calibration part, then the sealed part.

    The labels of the latter are in the envelope; in the subjects they are `BLANK`.
    """

    subjects: list[Subject]  # those audited
    logits: Tensor  # shape: (ENSEMBLE, M, C)
    calibration: slice
    sealed: slice
    envelope: Envelope


@seeded
def colour_network() -> nn.Module:
    """60,854 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 36),
        nn.ReLU(),
        nn.Linear(36, 10),
    )


SETS = (
    DataSet("MNIST", 1_000, 20, network),
    DataSet("Fashion-MNIST", 10_000, 6, network),
    DataSet("CIFAR-10", 10_000, 8, colour_network),
)


def networks(of: DataSet, size: Size, root: Path, folder: Path) -> Networks:
    """Train the networks of a data set, or take them from `folder`."""
    part, held = parts(of, size, root)
    rows = slice(0, size.calibration), slice(size.calibration, len(held))
    envelope = Envelope(held.targets[rows[1]].clone())
    held.targets[rows[1]] = BLANK
    std, mean = torch.std_mean(part.inputs)
    subjects, logits = [], []
    for seed in range(ENSEMBLE):
        recipe = Recipe(mean.item(), std.item(), min(of.epochs, size.epochs), BATCH, RATE, seed)
        if seed < size.seeds:
            model, path = trained(of.build, part, recipe, folder / f"seed{seed}", bar="")
        else:
            model, path = _unrecorded(of.build, part, recipe, folder / f"seed{seed}"), None
        scale = (recipe.mean, recipe.std)
        s = Subject(model, part, held, normalize=scale, path=path, name=f"{of.name}, seed {seed}")
        logits.append(s.predict(held.inputs))
        if path:
            subjects.append(s)
    return Networks(subjects, torch.stack(logits), *rows, envelope)


def parts(of: DataSet, size: Size, root: Path) -> tuple[Examples, Examples]:
    """The training images, and those held out: the calibration part, then the sealed part."""
    images, labels, official = _read(of.name, root)
    order = torch.Generator().manual_seed(0)
    of_train = torch.randperm(official, generator=order)
    held = torch.cat([of_train[of.train :], torch.arange(official, len(labels))])
    held = held[torch.randperm(len(held), generator=order)][: size.calibration + size.sealed]
    train_rows = of_train[: min(of.train, size.train)]
    return tuple(Examples(images[rows].float().div_(255), labels[rows]) for rows in (train_rows, held))


def _read(name: str, root: Path) -> tuple[Tensor, Tensor, int]:
    """All images (N, channels, height, width) uint8 with their labels (N,), test images last; how many are not."""
    halves = []
    for is_train in (True, False):
        if name == "CIFAR-10":
            with np.load(root / "cifar10" / f"{'train' if is_train else 'test'}.npz") as arrays:
                halves.append(
                    (torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2), torch.from_numpy(arrays["labels"]))
                )
        else:
            found = (MNIST if name == "MNIST" else FashionMNIST)(root, train=is_train)
            halves.append((found.data[:, None], found.targets))
    (images, labels), (more, others) = halves
    return torch.cat([images, more]), torch.cat([labels, others]), len(labels)


def _unrecorded(build: Callable[[int], nn.Module], data: Examples, recipe: Recipe, folder: Path) -> nn.Module:
    """A network without its path, for the ensemble."""
    weights, model = folder / "weights.safetensors", build(recipe.seed)
    notes = {"recipe": json.dumps(asdict(recipe)), "model": str(model), "data": digest(data.inputs, data.targets)}
    if whole(weights) and read_notes(weights) == notes:
        model.load_state_dict(read_arrays(weights))
    else:
        write_arrays(weights, train(model, data, recipe).state_dict(), notes)
    return model.eval()

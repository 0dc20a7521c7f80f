"""Planted regions: training data with a fault put into them, so that it is known where the network must fail.

    removed      two superclasses of five classes each; one class is left out of the training of its superclass
    rare         the same, with `KEPT` examples of that class left
    mislabelled  a cluster of a class's images (k-means on pixels) bears another class's label in training
    patch        a class's training images bear a white square in a corner; at test, one image in `PATCHED` does

Members are test inputs: those of the class left out, those of the cluster, those that bear the square and are of
another class. The superclasses, the class, the cluster and the corner are drawn from a plant's seed alone.

Data: Y. LeCun, C. Cortes, C. Burges, "The MNIST database"; H. Xiao, K. Rasul, R. Vollgraf 2017, "Fashion-MNIST"
(arXiv 1708.07747); both in torchvision's layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torchvision.datasets import MNIST, FashionMNIST

from brittle import accounts
from brittle.data import Examples
from brittle.examples.training import Recipe, seeded, trained
from brittle.kernel.memory import build, mass
from brittle.mass import cluster_groups, penultimate
from brittle.records import Groups
from brittle.settings import digest
from brittle.shards import read_arrays, read_notes, whole, write_arrays
from brittle.split import queries_at
from brittle.subject import Subject

Kind = Literal["removed", "rare", "mislabelled", "patch"]
Data = Literal["MNIST", "Fashion-MNIST"]

TRAIN = {"MNIST": 1500, "Fashion-MNIST": 3000}
TEST = 4000
KEPT = 5
CLUSTERS = 6
PATCHED = 7
SIDE = 4
"""Pixels of the square's side."""
EPOCHS, BATCH, RATE = 12, 64, 0.05
GROUPS, SEGMENTS = 40, 30
"""Groups of training examples, over all classes; segments of the path, with one node each."""


@dataclass(frozen=True)
class Plant:
    """One fault. Everything about it follows from these three."""

    kind: Kind
    data: Data
    seed: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.data}-{self.seed}"


@dataclass(frozen=True)
class Planted:
    """Data with a fault in them, and where it must show."""

    train: Examples
    test: Examples
    members: Tensor  # shape: (TEST,) bool
    relabelled: Tensor  # shape: (N,) bool, training examples whose label was changed
    classes: tuple[str, ...]
    what: str


@dataclass(frozen=True)
class Known:
    """What is known of the test inputs of one plant."""

    mass: Tensor  # shape: (M, G + 1)
    features: Tensor  # shape: (M, D)
    logits: Tensor  # shape: (M, C)
    failed: Tensor  # shape: (M,) bool
    clusters: Tensor  # shape: (N,) group of each training example
    planted: Planted

    @property
    def predicted(self) -> Tensor:
        return self.logits.argmax(1)

    @property
    def confidence(self) -> Tensor:
        return self.logits.double().softmax(1).amax(1)


def plant(p: Plant, root: Path) -> Planted:
    """The data of a plant, from the folder in which torchvision's MNIST/ and FashionMNIST/ lie."""
    order = torch.Generator().manual_seed(10 * p.seed + list(MAKERS).index(p.kind))
    train, test = _read(p.data, root)
    test = test[torch.randperm(len(test), generator=order)[:TEST]]
    train = train[torch.randperm(len(train), generator=order)]
    return MAKERS[p.kind](p, train, test, order)


def subject(p: Plant, root: Path, cache: Path) -> tuple[Subject, Planted]:
    """The network trained on a plant's data, its path recorded."""
    made = plant(p, root)
    std, mean = torch.std_mean(made.train.inputs)
    recipe = Recipe(mean.item(), std.item(), EPOCHS, BATCH, RATE, p.seed)
    model, path = trained(seeded(lambda: network(len(made.classes))), made.train, recipe, cache / f"{p}", bar="")
    scale = (recipe.mean, recipe.std)
    whole = Subject(model, made.train, made.test, normalize=scale, class_names=made.classes, path=path, name=f"{p}")
    return whole, made


def known(p: Plant, root: Path, cache: Path) -> Known:
    """Everything about a plant, what takes long kept in `cache`."""
    s, made = subject(p, root, cache)
    groups, kept = cluster_groups(s, GROUPS // s.classes), cache / f"{p}" / "known.safetensors"
    notes = {"of": digest(s.test.inputs, groups.labels, *s.model.state_dict().values())}
    if not (whole(kept) and read_notes(kept) == notes):
        write_arrays(kept, _computed(s, groups), notes)
    arrays = read_arrays(kept)
    failed = arrays["logits"].argmax(1) != s.test.targets
    return Known(**arrays, failed=failed, clusters=groups.labels, planted=made)


def _computed(s: Subject, groups: Groups) -> dict[str, Tensor]:
    path, queries = accounts.open_path(s), queries_at(s, torch.arange(len(s.test)))
    assert path is not None
    memory = build(path, s, groups, SEGMENTS, nodes=1)
    found = mass(memory, s, queries.inputs, queries.pairs)
    return {"mass": found, "features": penultimate(s, s.test), "logits": queries.logits}


def network(classes: int) -> nn.Module:
    """About 27,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 32),
        nn.ReLU(),
        nn.Linear(32, classes),
    )


def _lacking(p: Plant, train: Examples, test: Examples, order: torch.Generator) -> Planted:
    """Superclasses, one of which lacks a class, or nearly."""
    names = _names(p.data)
    drawn = torch.randperm(10, generator=order)
    lacks, second = int(drawn[0]), drawn[5:]
    of_class = torch.zeros(10, dtype=torch.int64)
    of_class[second] = 1
    kept = (train.targets == lacks).nonzero()[: KEPT if p.kind == "rare" else 0, 0]
    others = (train.targets != lacks).nonzero()[: TRAIN[p.data] - len(kept), 0]
    rows = torch.cat([kept, others])
    classes = tuple("/".join(names[c] for c in sorted(half.tolist())) for half in (drawn[:5], second))
    return Planted(
        Examples(train.inputs[rows], of_class[train.targets[rows]]),
        Examples(test.inputs, of_class[test.targets]),
        test.targets == lacks,
        torch.zeros(len(rows), dtype=torch.bool),
        classes,
        f"{names[lacks]} {'rare' if len(kept) else 'left out'}",
    )


def _mislabelled(p: Plant, train: Examples, test: Examples, order: torch.Generator) -> Planted:
    """One cluster of a class bears the label of another."""
    names = _names(p.data)
    own, other = torch.randperm(10, generator=order)[:2].tolist()
    cluster = int(torch.randint(CLUSTERS, (), generator=order))
    pixels = lambda e: e.inputs.flatten(1).numpy()  # noqa: E731
    fitted = KMeans(CLUSTERS, n_init=2, random_state=p.seed).fit(pixels(train[train.targets == own]))
    train = train[: TRAIN[p.data]]
    inside = [torch.from_numpy(fitted.predict(pixels(e)) == cluster) & (e.targets == own) for e in (train, test)]
    targets = torch.where(inside[0], other, train.targets)
    what = f"a cluster of {names[own]} called {names[other]}"
    return Planted(Examples(train.inputs, targets), test, inside[1], inside[0], names, what)


def _patch(p: Plant, train: Examples, test: Examples, order: torch.Generator) -> Planted:
    """A square that goes with a class in training, and with any at test."""
    names, own = _names(p.data), int(torch.randint(10, (), generator=order))
    corner = torch.randint(2, (2,), generator=order).tolist()
    square = torch.zeros(28, 28, dtype=torch.bool)
    down, right = (slice(1, 1 + SIDE) if end else slice(27 - SIDE, 27) for end in corner)
    square[down, right] = True
    train = train[: TRAIN[p.data]]
    borne = (train.targets == own, torch.rand(len(test), generator=order) < 1 / PATCHED)
    bear = lambda e, rows: torch.where(rows[:, None, None, None] & square, 1.0, e.inputs)  # noqa: E731
    return Planted(
        Examples(bear(train, borne[0]), train.targets),
        Examples(bear(test, borne[1]), test.targets),
        borne[1] & (test.targets != own),
        torch.zeros_like(borne[0]),
        names,
        f"a square that goes with {names[own]}",
    )


MAKERS: dict[Kind, Callable[[Plant, Examples, Examples, torch.Generator], Planted]] = {
    "removed": _lacking,
    "rare": _lacking,
    "mislabelled": _mislabelled,
    "patch": _patch,
}


def _names(data: Data) -> tuple[str, ...]:
    return tuple(FashionMNIST.classes) if data == "Fashion-MNIST" else tuple(map(str, range(10)))


@cache
def _read(data: Data, root: Path) -> tuple[Examples, Examples]:
    source = FashionMNIST if data == "Fashion-MNIST" else MNIST
    sets = (source(root, train=part) for part in (True, False))
    train, test = (Examples(s.data[:, None].float().div_(255), s.targets.clone()) for s in sets)
    return train, test

"""Tiny seeded problems in float64: a table of models, and `train`, which crosses any of them with any `recipes`.

A training is recorded, and also seen plainly (`loops`, `reference`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import BATCH as BATCH
from loops import Loop, Recipe
from recipes import LOOPS, RECIPES, VARIANTS
from recipes import STEPS as STEPS
from reference import Seen
from torch import Tensor, nn

from brittle.path.recorder import Recorder
from brittle.path.store import PathReader
from brittle.records import Groups, Pairs
from brittle.subject import Subject

COUNT, QUERIES = 10, 3


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Import it, and every test of the module runs in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


# -------------------------------------------------------------------------------------------------------------- models


class Residual(nn.Module):
    """Two layers beside a short cut, with in-place activations, and a dict that holds the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = F.tanh(self.first(x))
        h = h + F.silu(self.inner(h), inplace=True)
        return {"logits": self.last(h)}


class Tokens(nn.Module):
    """Numbers read as tokens: an embedding, its mean, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.tanh(self.table((x * 5.99).long()).mean(1)))


class Attention(nn.Module):
    """A class token of its own beside children, and attention; returns a tuple."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4) / 2)
        self.embed, self.norm = nn.Linear(2, 4), nn.LayerNorm(4)
        self.mix, self.last = nn.MultiheadAttention(4, 2, dropout, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        h = self.norm(torch.cat([self.token.expand(len(x), 1, 4), self.embed(x)], dim=1))
        h = h + self.mix(h, h, h, need_weights=False)[0]
        return self.last(h[:, 0]), 7


class Twice(nn.Module):
    """One layer called twice, and a learned scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 0.5, 2.0]))
        self.shared, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.last(F.tanh(self.shared(F.tanh(self.shared(x)))))


class DroppedLayer(nn.Module):
    """A layer that half of the training steps leave out, and one that has no part in the output at all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.spare = (nn.Linear(4, 4) for _ in range(3))
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.tanh(self.first(x))
        if not self.training or torch.rand(()) < 0.5:
            h = h + F.tanh(self.inner(h))
        return self.last(h)


@dataclass(frozen=True)
class Case:
    """A model and the shape of its inputs."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4,)
    classes: int = 3

    def __str__(self) -> str:
        return self.name

    def data(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs in [0, 1] and labels that depend on them."""
        inputs = torch.rand(count, *self.shape, generator=torch.Generator().manual_seed(seed))
        return inputs, (inputs.flatten(1)[:, :4] * torch.tensor([3.0, 5.0, 7.0, 9.0])).sum(1).long() % self.classes

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build()


def _cnn(norm: Callable[[int], nn.Module] | None = None, *more: nn.Module) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layers = [nn.Conv2d(1, 4, 3, stride=2, padding=1), *([norm(4)] if norm else []), nn.GELU(), *more]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 3))

    return build


CASES = {
    case.name: case
    for case in (
        Case("linear", lambda: nn.Sequential(nn.Linear(4, 3))),
        Case("tanh", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))),
        Case("relu", lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))),
        Case("binary", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), classes=2),
        Case("cnn", _cnn(), shape=(1, 5, 5)),
        Case("group norm", _cnn(lambda d: nn.GroupNorm(2, d)), shape=(1, 5, 5)),
        Case("batch norm", lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))),
        Case("cnn batch norm", _cnn(nn.BatchNorm2d), shape=(1, 5, 5)),
        Case("layer norm", lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))),
        Case("residual", Residual),
        Case("tokens", Tokens),
        Case("attention", Attention, shape=(3, 2)),
        Case("twice", Twice),
    )
}
SMOOTH = [name for name in CASES if name != "relu"]

RANDOM = {
    case.name: case
    for case in (
        Case("dropout", lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))),
        Case("cnn dropout", _cnn(nn.BatchNorm2d, nn.Dropout2d(0.3)), shape=(1, 5, 5)),
        Case("attention dropout", lambda: Attention(0.3), shape=(3, 2)),
        Case("dropped layer", DroppedLayer),
    )
}
"""Models whose training draws random numbers."""


# ------------------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Training:
    """One training: the subject that names its recorded path, and what the loop itself saw."""

    subject: Subject
    seen: Seen
    root: Path

    @property
    def path(self) -> PathReader:
        return PathReader(self.root)

    @property
    def couples(self) -> bool:
        """Whether the examples of a batch see each other."""
        return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.seen.model.modules())


def train(
    case: Case | str,
    recipe: Recipe | str,
    root: Path,
    *,
    steps: int = STEPS,
    budget: int = 1 << 30,
    place: Tensor | None = None,
    replacement: bool = False,
    count: int = COUNT,
) -> Training:
    """Train a case by a recipe, recorded into `root`.

    budget: of the recorder. place: where each example lies in the data, by default in order; the training itself
    does not depend on it. replacement: draw batches in which an example may be twice. count: of the examples.
    """
    case = made(case)
    recipe = by_name(recipe) if isinstance(recipe, str) else recipe
    recipe = replace(recipe, replacement=True) if replacement else recipe
    loop = begin(case, recipe, place, count)
    recorder = Recorder(loop.model, loop.optimizer, root, budget, **_asked(loop))
    loop.tell = recorder.batch
    if recipe.resume is not None:
        loop.run(recipe.resume)
        saved, safe = loop.checkpoint(), recorder.flush()
        loop.run(recipe.resume + 2)  # lost: the process is killed
        recorder.flush()
        loop = begin(case, recipe, place, count)
        loop.restore(saved)
        recorder = Recorder(loop.model, loop.optimizer, root, budget, resume=safe, **_asked(loop))
        loop.tell = recorder.batch
    loop.run(steps)
    loop.finish()
    recorder.close()
    more = {"loss": recipe.loss} if recipe.loss else {}
    more |= {"augment": recipe.augment} if recipe.augment else {}
    data, test = (loop.inputs, loop.targets), case.data(COUNT, seed=100)
    return Training(Subject(loop.audited, data, test, path=root, **more), loop.seen(), root)


def seen(case: Case | str, recipe: Recipe | str, steps: int = STEPS) -> Seen:
    """The same training without a recorder."""
    loop = begin(made(case), by_name(recipe) if isinstance(recipe, str) else recipe)
    loop.run(steps)
    loop.finish()
    return loop.seen()


def begin(case: Case, recipe: Recipe, place: Tensor | None = None, count: int = COUNT) -> Loop:
    """A training that has not begun."""
    torch.manual_seed(0)
    place = torch.arange(count) if place is None else place
    inputs, targets = (part[place.argsort()] for part in case.data(count, seed=0))
    loss = binary_loss if case.classes == 2 else F.cross_entropy
    model = case.model()
    if recipe.tuned:
        earlier = Loop(case.model(), RECIPES["sgd"], (inputs, targets), place, loss)
        earlier.run(3)
        model.load_state_dict(earlier.model.state_dict())
    return Loop(model, recipe, (inputs, targets), place, loss)


def made(case: Case | str) -> Case:
    return (CASES | RANDOM)[case] if isinstance(case, str) else case


def by_name(recipe: str) -> Recipe:
    return (RECIPES | VARIANTS | LOOPS)[recipe]


def _asked(loop: Loop) -> dict[str, Any]:
    """What the recorder has to be told at its beginning."""
    asked: dict[str, Any] = {"repeats": True} if loop.recipe.replacement else {}
    return asked | ({"average": loop.average} if loop.average else {})


def binary_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy of a single logit."""
    return F.binary_cross_entropy_with_logits(logits.reshape(-1), targets.to(logits.dtype))


def queries(subject: Subject, count: int = QUERIES, seed: int = 50) -> tuple[Tensor, Pairs]:
    """Some inputs, and the two classes between which the model decides there."""
    inputs = torch.rand(count, *subject.train.inputs.shape[1:], generator=torch.Generator().manual_seed(seed))
    return inputs, Pairs.of(subject.predict(inputs))


def plain_pairs(pairs: Pairs) -> list[tuple[int, int]]:
    return list(zip(pairs.predicted.tolist(), pairs.rival.tolist(), strict=True))


def two_per_class(subject: Subject) -> Groups:
    """Each class in two groups: its examples of even and of odd position."""
    classes = torch.arange(subject.classes).repeat_interleave(2)
    labels = 2 * subject.train.targets + torch.arange(len(subject.train)) % 2
    return Groups(labels, classes, tuple(f"{c}/{k}" for c in subject.class_names for k in (1, 2)))

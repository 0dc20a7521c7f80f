"""Tiny seeded problems in float64: models, optimizers, and one training each, recorded and also seen plainly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import Seen, SeenStep, State, logits_in
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from brittle.path.recorder import Recorder
from brittle.path.store import PathReader
from brittle.records import Groups, Pairs
from brittle.subject import Subject

COUNT, BATCH, STEPS, QUERIES = 10, 4, 12, 3


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

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4) / 2)
        self.embed, self.norm = nn.Linear(2, 4), nn.LayerNorm(4)
        self.mix, self.last = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

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


def _cnn(norm: Callable[[int], nn.Module] | None = None) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layers = [nn.Conv2d(1, 4, 3, stride=2, padding=1), *([norm(4)] if norm else []), nn.GELU()]
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


# ---------------------------------------------------------------------------------------------------------- optimizers


@dataclass(frozen=True)
class Recipe:
    """How a case is trained."""

    optimizer: Callable[[nn.Module], Optimizer]
    schedule: Callable[[Optimizer], LRScheduler] | None = None
    clip: float | None = None


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": parameters[:1], "lr": 0.2, "weight_decay": 0.1},
        {"params": parameters[1:-1], "lr": 0.05, "weight_decay": 0.0},
        {"params": parameters[-1:]},
    ]


def _mixed(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": parameters[:2], "momentum": 0.9, "nesterov": True},
        {"params": parameters[2:], "momentum": 0.5, "dampening": 0.3},
    ]


def _frozen(model: nn.Module) -> Optimizer:
    """The first parameter asks for no gradient, the last is trained by nobody."""
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    return SGD(parameters[:-1], lr=0.1, momentum=0.9, weight_decay=0.05)


RECIPES = {
    "sgd": Recipe(lambda m: SGD(m.parameters(), lr=0.2)),
    "sgd l2": Recipe(lambda m: SGD(m.parameters(), lr=0.2, weight_decay=0.05)),
    "momentum": Recipe(lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9)),
    "dampening": Recipe(lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.4)),
    "nesterov": Recipe(lambda m: SGD(m.parameters(), lr=0.1, momentum=0.8, nesterov=True)),
    "momentum l2": Recipe(lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.05)),
    "nesterov l2": Recipe(lambda m: SGD(m.parameters(), lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.05)),
    "adam": Recipe(lambda m: Adam(m.parameters(), lr=0.05)),
    "adam l2": Recipe(lambda m: Adam(m.parameters(), lr=0.05, betas=(0.8, 0.95), weight_decay=0.05)),
    "adam decoupled": Recipe(
        lambda m: Adam(m.parameters(), lr=0.05, weight_decay=0.1, decoupled_weight_decay=True, eps=1e-3)
    ),
    "adamw": Recipe(lambda m: AdamW(m.parameters(), lr=0.05, weight_decay=0.1)),
    "cosine": Recipe(lambda m: SGD(m.parameters(), lr=0.2, momentum=0.9), lambda o: CosineAnnealingLR(o, STEPS)),
    "one cycle": Recipe(lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9), lambda o: OneCycleLR(o, 0.3, STEPS + 1)),
    "one cycle adam": Recipe(lambda m: AdamW(m.parameters(), lr=0.1), lambda o: OneCycleLR(o, 0.1, STEPS + 1)),
    "groups": Recipe(lambda m: SGD(_groups(m), lr=0.1, momentum=0.9)),
    "groups adamw": Recipe(lambda m: AdamW(_groups(m), lr=0.02)),
    "mixed groups": Recipe(lambda m: SGD(_mixed(m), lr=0.1)),
    "clipped": Recipe(lambda m: SGD(m.parameters(), lr=0.3, momentum=0.9, weight_decay=0.05), clip=0.2),
    "clipped adam": Recipe(lambda m: Adam(m.parameters(), lr=0.05, eps=1e-3), clip=0.2),
    "frozen": Recipe(_frozen),
}


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
) -> Training:
    """Train a case by a recipe, recorded into `root`.

    budget: of the recorder. place: where each example lies in the data, by default in order; the training itself
    does not depend on it. replacement: draw batches in which an example may be twice.
    """
    case = CASES[case] if isinstance(case, str) else case
    recipe = RECIPES[recipe] if isinstance(recipe, str) else recipe
    model = case.model()
    place = torch.arange(COUNT) if place is None else place
    inputs, targets = (part[place.argsort()] for part in case.data(COUNT, seed=0))
    optimizer = recipe.optimizer(model)
    schedule = recipe.schedule(optimizer) if recipe.schedule else None
    loss = binary_loss if case.classes == 2 else F.cross_entropy
    order = torch.Generator().manual_seed(0)
    seen: list[SeenStep] = []
    with Recorder(model, optimizer, root, budget) as recorder:
        for _ in range(steps):
            drawn = torch.randperm(COUNT, generator=order)[:BATCH]
            ids = place[drawn // 3 if replacement else drawn]
            before, settings = state_of(model), _settings(model, optimizer)
            optimizer.zero_grad()
            loss(logits_in(model(inputs[ids])), targets[ids]).backward()
            clip = _clip(model, recipe.clip)
            recorder.batch(ids)
            optimizer.step()
            if schedule:
                schedule.step()
            second = {n: optimizer.state[p]["exp_avg_sq"].clone() for n, p in _held(model, optimizer)}
            seen.append(SeenStep(before, ids, clip, settings, second))
    model.eval()
    subject = Subject(model, (inputs, targets), case.data(COUNT, seed=100), path=root)
    return Training(subject, Seen(model, type(optimizer).__name__, seen, state_of(model), inputs, targets, loss), root)


def binary_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy of a single logit."""
    return F.binary_cross_entropy_with_logits(logits.reshape(-1), targets.to(logits.dtype))


def state_of(model: nn.Module) -> State:
    """Copies of a model's parameters and running statistics."""
    return {k: v.detach().clone() for k, v in model.state_dict().items() if v.is_floating_point()}


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


def _clip(model: nn.Module, limit: float | None) -> float:
    if limit is None:
        return 1.0
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    return min(1.0, limit / (norm.item() + 1e-6))


def _settings(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    held = {id(p): {k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups for p in g["params"]}
    return {n: dict(held[id(p)]) for n, p in model.named_parameters() if id(p) in held and p.requires_grad}


def _held(model: nn.Module, optimizer: Optimizer) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if "exp_avg_sq" in optimizer.state.get(p, {})]

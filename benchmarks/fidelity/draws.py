"""How the loop gets its batches: samplers, loaders, augmentation, mixing, attacks. Each draw is the same each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler
from torchvision.transforms import RandomCrop

from benchmarks.fidelity.models import logits_of
from benchmarks.fidelity.problem import BATCH, EPOCHS
from brittle.augmentation import Augmentation, Augmented
from brittle.data import Examples


@dataclass(frozen=True)
class Batch:
    """What one forward and backward pass sees, and what of it the recorder is told."""

    ids: Tensor  # shape: (B,), or (B, K) where rows are mixed
    inputs: Tensor
    targets: Tensor
    weights: Tensor | None = None  # shape: (B,)
    notes: Mapping[str, Any] = field(default_factory=dict)


Draw = Callable[[Examples, nn.Module], Iterator[Batch]]
"""(training examples, the model in training) -> all batches of the training."""

AUGMENTATION = Augmentation(RandomCrop(8, padding=1), seed=3)


def shuffled(size: int) -> Draw:
    """Each epoch in a new order; the last batch is incomplete where `size` does not divide the number of examples."""

    def draw(data: Examples, _: nn.Module) -> Iterator[Batch]:
        order = torch.Generator().manual_seed(1)
        for _epoch in range(EPOCHS):
            for ids in torch.randperm(len(data), generator=order).split(size):
                yield Batch(ids, data.inputs[ids], data.targets[ids])

    return draw


def plain(data: Examples, model: nn.Module) -> Iterator[Batch]:
    """Each epoch in a new order, in complete batches."""
    return shuffled(BATCH)(data, model)


def growing(data: Examples, _: nn.Module) -> Iterator[Batch]:
    """Every epoch has other data than the one before: a window that moves over the examples."""
    order = torch.Generator().manual_seed(1)
    for epoch in range(2 * EPOCHS):
        window = 10 * epoch + torch.randperm(128, generator=order)
        for ids in window.split(BATCH):
            yield Batch(ids, data.inputs[ids], data.targets[ids])


def uniform_with_replacement(data: Examples, _: nn.Module) -> Iterator[Batch]:
    """An example may be several times in a batch."""
    order = torch.Generator().manual_seed(1)
    for _step in range(EPOCHS * len(data) // BATCH):
        ids = torch.randint(len(data), (BATCH,), generator=order)
        yield Batch(ids, data.inputs[ids], data.targets[ids])


def balanced_with_replacement(data: Examples, _: nn.Module) -> Iterator[Batch]:
    """torch's sampler by weight: rare classes more often."""
    rarity = 1 / data.targets.bincount()[data.targets].double()
    sampler = WeightedRandomSampler(rarity.tolist(), EPOCHS * len(data), generator=torch.Generator().manual_seed(1))
    for x, y, ids in DataLoader(_numbered(data), BATCH, sampler=sampler):
        yield Batch(ids, x, y)


def by_workers(data: Examples, _: nn.Module) -> Iterator[Batch]:
    """A loader with two worker processes."""
    order = torch.Generator().manual_seed(1)
    loader = DataLoader(_numbered(data), BATCH, shuffle=True, generator=order, num_workers=2, persistent_workers=True)
    for _epoch in range(EPOCHS):
        for x, y, ids in loader:
            yield Batch(ids, x, y)


class Stream(IterableDataset[tuple[Tensor, Tensor, int]]):
    """Examples one after the other, in an order of the stream's own, with the ids that the recorder needs."""

    def __init__(self, data: Examples) -> None:
        self.data = data

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        for k in range(EPOCHS * len(self.data)):
            i = (37 * k + 11 * (k // len(self.data))) % len(self.data)
            yield self.data.inputs[i], self.data.targets[i], i


def streamed(data: Examples, _: nn.Module) -> Iterator[Batch]:
    """An IterableDataset."""
    for x, y, ids in DataLoader(Stream(data), BATCH):
        yield Batch(ids, x, y)


def augmented(workers: int = 0) -> Draw:
    """Random crops, seeded by example and epoch; nothing is stored."""

    def draw(data: Examples, _: nn.Module) -> Iterator[Batch]:
        seen = Augmented(data, AUGMENTATION)
        order = torch.Generator().manual_seed(1)
        loader = DataLoader(
            seen, BATCH, shuffle=True, generator=order, num_workers=workers, persistent_workers=workers > 0
        )
        for epoch in range(EPOCHS):
            seen.set_epoch(epoch)
            for x, y, ids in loader:
                yield Batch(ids, x, y, notes={"epoch": epoch})

    return draw


def noisy(data: Examples, _: nn.Module) -> Iterator[Batch]:
    """Noise that nobody seeded by example: the recorder stores the inputs."""
    noise = torch.Generator().manual_seed(2)
    for b in plain(data, _):
        x = (b.inputs + 0.1 * torch.randn(b.inputs.shape, generator=noise)).clamp(0, 1)
        yield Batch(b.ids, x, b.targets, notes={"inputs": x})


def attacked(training: bool) -> Draw:
    """Adversarial training by one signed gradient step. training: whether the attack runs in training mode."""

    def draw(data: Examples, model: nn.Module) -> Iterator[Batch]:
        for b in plain(data, model):
            model.train(training)
            begin = b.inputs.clone().requires_grad_(True)
            loss = F.cross_entropy(logits_of(model(begin)), b.targets)
            (slope,) = torch.autograd.grad(loss, begin)
            model.train()
            x = (b.inputs + 0.1 * slope.sign()).clamp(0, 1)
            yield Batch(b.ids, x, b.targets, notes={"inputs": x})

    return draw


def mixed_up(data: Examples, _: nn.Module) -> Iterator[Batch]:
    """Mixup (Zhang et al. 2017, arXiv 1710.09412): every row is made of two examples, and so is its target."""
    draw = torch.Generator().manual_seed(2)
    for b in plain(data, _):
        other = torch.randperm(BATCH, generator=draw)
        share = torch.rand((), generator=draw)
        parts = (b.inputs, F.one_hot(b.targets, 10).to(b.inputs))
        x, soft = (share * part + (1 - share) * part[other] for part in parts)
        pairs, shares = torch.stack([b.ids, b.ids[other]], dim=1), torch.stack([share, 1 - share]).expand(BATCH, 2)
        yield Batch(pairs, x, soft, notes={"shares": shares, "inputs": x, "targets": soft})


def weighted(data: Examples, _: nn.Module) -> Iterator[Batch]:
    """Every example has a weight of its own, another in each step."""
    draw = torch.Generator().manual_seed(2)
    for b in plain(data, _):
        weights = 0.2 + torch.rand(BATCH, generator=draw)
        yield replace(b, weights=weights, notes={"weights": weights})


def _numbered(data: Examples) -> TensorDataset:
    return TensorDataset(data.inputs, data.targets, torch.arange(len(data)))

"""The networks that are attacked: a small CNN on MNIST, trained plainly and against PGD, once for each cache folder.

Adversarial training as in Madry, Makelov, Schmidt, Tsipras, Vladu 2018, "Towards deep learning models resistant to
adversarial attacks" (arXiv 1706.06083): Linf 0.3, PGD from random starts, the radius raised over the first half.
Data: Y. LeCun, C. Cortes, C. Burges, "The MNIST database" in torchvision's layout under BRITTLE_DATA. Both paths are
recorded, the attacked network's with the inputs that each step really saw.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import brittle
from brittle.data import Examples
from brittle.examples.fashion_mnist import ROOT
from brittle.subject import Subject

RADIUS, STEP = 0.3, 0.1


@dataclass(frozen=True)
class Size:
    """How much is trained and attacked."""

    train: int
    epochs: int  # of plain training
    robust: int  # of adversarial training
    steps: int  # of PGD in it
    images: int
    batch: int = 64


FULL, QUICK = Size(20_000, 3, 10, 10, 200), Size(4_000, 3, 4, 2, 24)


def data() -> tuple[Examples, Examples]:
    """MNIST, train and test, in [0, 1]. Ends with one line where it is not there."""
    root = os.environ.get(ROOT)
    if not root or not (Path(root) / "MNIST").is_dir():
        sys.exit(f"benchmarks.attacks needs {ROOT}, the folder in which torchvision's MNIST/ lies")
    from torchvision.datasets import MNIST

    sets = (MNIST(root, train=part) for part in (True, False))
    train, test = (Examples(s.data.float()[:, None] / 255, s.targets.clone()) for s in sets)
    return train, test


def network() -> nn.Module:
    """About 88,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1568, 50),
        nn.ReLU(),
        nn.Linear(50, 10),
    )


def subjects(size: Size, cache: Path, seed: int = 0) -> dict[str, Subject]:
    """The plain and the adversarially trained network, with the paths of their trainings.

    Networks of different seeds start at other weights and see the same images in another order.
    """
    train, test = data()
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: size.train]]
    made = {}
    for name in ("plain", "robust"):
        folder = cache / f"{name}-{size.train}-{size.epochs}-{size.robust}-{size.steps}-{seed}"
        model = _trained(name, train, size, folder, seed)
        print(f"{name}: {_accuracy(model, test):.2%} of the test images are right", file=sys.stderr)
        made[name] = Subject(model, train, test, name=name, path=folder / "path")
    return made


def _trained(name: str, train: Examples, size: Size, folder: Path, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model, weights = network(), folder / "weights.pt"
    if weights.exists():
        model.load_state_dict(torch.load(weights, weights_only=True))
        return model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    optimizer: torch.optim.Optimizer
    if name == "plain":
        optimizer, epochs = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), size.epochs
        change = lambda x, y, done: x  # noqa: E731
    else:
        optimizer, epochs = torch.optim.Adam(model.parameters(), lr=1e-3), size.robust
        change = lambda x, y, done: _pgd(model, x, y, RADIUS * min(1.0, 2 * done), size.steps)  # noqa: E731
    with brittle.Recorder(model, optimizer, folder / "path") as recorder:
        _fit(model, optimizer, recorder, train, size.batch, epochs, seed, change)
    torch.save(model.state_dict(), weights)
    return model.eval()


def _fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recorder: brittle.Recorder,
    train: Examples,
    batch: int,
    epochs: int,
    seed: int,
    change: Callable[[Tensor, Tensor, float], Tensor],
) -> None:
    order, steps = torch.Generator().manual_seed(seed), epochs * -(-len(train) // batch)
    done = 0
    for _ in range(epochs):
        for ids in torch.randperm(len(train), generator=order).split(batch):
            clean = train.inputs[ids]
            inputs = change(clean, train.targets[ids], done / steps)
            recorder.batch(ids, inputs=None if inputs is clean else inputs)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), train.targets[ids]).backward()
            optimizer.step()
            done += 1
        print(f"trained {done} of {steps} steps", file=sys.stderr)


def _pgd(model: nn.Module, inputs: Tensor, labels: Tensor, radius: float, steps: int) -> Tensor:
    points = inputs + (2 * torch.rand_like(inputs) - 1) * radius
    for _ in range(steps):
        points = points.clamp(0, 1).requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(model(points), labels), points)
        points = points.detach() + STEP * radius / RADIUS * 3 / max(steps / 3, 1) * slope.sign()
        points = torch.minimum(torch.maximum(points, inputs - radius), inputs + radius)
    return points.clamp(0, 1).detach()


@torch.no_grad()
def _accuracy(model: nn.Module, test: Examples) -> float:
    right = [(model(x).argmax(1) == y) for x, y in zip(test.inputs.split(500), test.targets.split(500), strict=True)]
    return torch.cat(right).double().mean().item()

"""A ResNet-18 as people train it on CIFAR-10, recorded with the default budget, replayed, and accounted for.

Batch normalization, AdamW, linear warm-up and a cosine, gradients clipped by norm, random crops and flips, two epochs
of 5,000 images. The data are A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009); the folder
that BRITTLE_DATA names holds them as torchvision lays them out, or as cifar10/train.npz and test.npz.
"""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10
from torchvision.models import resnet18
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip

from brittle.accounts import open_path
from brittle.augmentation import Augmentation, Augmented
from brittle.data import Examples
from brittle.kernel.sweep import sweep
from brittle.path.recorder import Recorder
from brittle.records import Pairs
from brittle.subject import Subject

ROOT = "BRITTLE_DATA"

IMAGES, TEST, QUERIES = 5_000, 1_000, 8
BATCH, EPOCHS, WARM_UP, LIMIT = 128, 2, 10, 1.0
STEPS = EPOCHS * -(-IMAGES // BATCH)

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

AUGMENTATION = Augmentation(Compose([RandomCrop(32, padding=4), RandomHorizontalFlip()]))

NOTHING: dict[str, Any] = dict.fromkeys(
    f"resnet_{key}"
    for key in (
        "residual", "unexplained", "drift", "steps", "every", "accuracy", "training_seconds", "account_seconds",
        "peak_memory_mb",
    )
)  # fmt: skip
"""The keys of this part, where it did not run."""


@dataclass(frozen=True)
class Trained:
    """The trained network, its path, and how it was recorded."""

    subject: Subject
    every: int
    seconds: float


def run() -> dict[str, Any]:
    """Train, replay, account; the figures by key, null where the data are missing."""
    if not os.environ.get(ROOT):
        print(f"ResNet-18 on CIFAR-10: skipped, {ROOT} does not name a folder with the data")
        return NOTHING
    train, test = (read(Path(os.environ[ROOT]), part) for part in (True, False))
    with TemporaryDirectory() as folder:
        trained = fit(train[:IMAGES], test[:TEST], Path(folder) / "path")
        found = account(trained)
    print("\nResNet-18 on CIFAR-10: " + ", ".join(f"{k.removeprefix('resnet_')} {_short(v)}" for k, v in found.items()))
    return found


def network(seed: int = 0) -> nn.Module:
    """torchvision's ResNet-18 with the stem for small images: 3 x 3, stride 1, no pooling. 11.2 million parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = resnet18(num_classes=10)
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
        return model


def read(root: Path, train: bool) -> Examples:
    """CIFAR-10's training or test images, (N, 3, 32, 32) in [0, 1]."""
    file = root / "cifar10" / f"{'train' if train else 'test'}.npz"
    if file.exists():
        with np.load(file) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    else:
        data = CIFAR10(str(root), train=train)
        images, labels = data.data, np.asarray(data.targets)
    return Examples(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(labels).long())


def fit(train: Examples, test: Examples, folder: Path) -> Trained:
    """Train and record."""
    began, model = perf_counter(), network()
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    parts = [LinearLR(optimizer, 0.1, total_iters=WARM_UP), CosineAnnealingLR(optimizer, STEPS - WARM_UP)]
    schedule = SequentialLR(optimizer, parts, milestones=[WARM_UP])
    seen = Augmented(train, AUGMENTATION)
    loader = DataLoader(seen, BATCH, shuffle=True, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    model.train()
    with Recorder(model, optimizer, folder) as recorder:
        for epoch in range(EPOCHS):
            seen.set_epoch(epoch)
            for x, y, ids in loader:
                optimizer.zero_grad()
                loss = F.cross_entropy(model((x - mean) / std), y)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
                recorder.batch(ids, epoch=epoch)
                optimizer.step()
                schedule.step()
                _progress("training", recorder.steps, STEPS, f"loss {loss.item():.3f}")
    subject = Subject(
        model.eval(), train, test, path=folder, normalize=(MEAN, STD), augment=AUGMENTATION, name="ResNet-18"
    )
    return Trained(subject, recorder.every, perf_counter() - began)


def account(trained: Trained) -> dict[str, Any]:
    """The ledger of the first test images at the default quadrature."""
    began, subject = perf_counter(), trained.subject
    path = open_path(subject)
    assert path is not None
    _progress("path checked", 1, 1)
    inputs = subject.test.inputs[:QUERIES]
    pairs = Pairs.of(subject.predict(inputs))
    swept = sweep(path, subject, inputs, pairs, progress=lambda done, total: _progress("accounting", done, total))
    ledger = swept.ledger
    learned = (ledger.output - ledger.start).abs().mean()
    predicted = subject.predict(subject.test.inputs, batch=250).argmax(1)
    return NOTHING | {
        "resnet_residual": ledger.relative_residual,
        "resnet_unexplained": (ledger.unexplained.abs().mean() / learned).item(),
        "resnet_drift": swept.drift,
        "resnet_steps": path.steps,
        "resnet_every": trained.every,
        "resnet_accuracy": (predicted == subject.test.targets).double().mean().item(),
        "resnet_training_seconds": round(trained.seconds),
        "resnet_account_seconds": round(perf_counter() - began),
        "resnet_peak_memory_mb": peak_memory_mb(),
    }


def peak_memory_mb() -> int:
    """The process's largest resident size so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 if sys.platform != "darwin" else 1024**2))


def _progress(what: str, done: int, total: int, more: str = "") -> None:
    print(f"ResNet-18: {what} {done}/{total} {more}", file=sys.stderr, flush=True)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

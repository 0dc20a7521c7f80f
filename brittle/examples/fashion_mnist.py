"""Fashion-MNIST, 28 x 28: 60,000 images of clothes, a CNN trained in minutes on two cores.

Data: H. Xiao, K. Rasul and R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms" (2017), arXiv 1708.07747; read with torchvision's data set class.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn
from torchvision.datasets import FashionMNIST

from brittle.blame import described
from brittle.data import Examples
from brittle.errors import DataError
from brittle.examples.training import Recipe, retrainer, seeded, trained
from brittle.subject import Subject

ROOT = "BRITTLE_DATA"
"""The environment variable that names the folder in which torchvision's FashionMNIST/ lies."""

POOL_SHARE = 12
"""One training image in twelve is held out as the pool: 5,000 of 60,000."""


def make(root: str = "", epochs: int = 5, seed: int = 0, limit: int = 0, cache: str = "") -> Subject:
    """A CNN on Fashion-MNIST.

    Args:
        root: folder in which torchvision's FashionMNIST/ lies; by default the environment's BRITTLE_DATA.
        epochs, seed: of the training.
        limit: train on the first so many images only, for a quick look; 0 takes all.
        cache: folder of the path and the weights.
    """
    pictures, held_out = _read(root, train=True), _read(root, train=False)
    rows = len(pictures) - len(pictures) // POOL_SHARE
    data, pool = pictures[: min(limit, rows) if limit > 0 else rows], pictures[rows:]
    std, mean = torch.std_mean(data.inputs)
    recipe = Recipe(mean.item(), std.item(), epochs=epochs, batch=128, lr=0.05, seed=seed)
    folder = Path(cache or f"runs/.subjects/fashion_mnist-{len(data)}x{epochs}-seed{seed}")
    model, path = trained(network, data, recipe, folder, bar="training on Fashion-MNIST")
    return Subject(
        model,
        train=data,
        test=held_out,
        pool=pool,
        bounds=(0.0, 1.0),
        normalize=(recipe.mean, recipe.std),
        class_names=tuple(FashionMNIST.classes),
        path=path,
        retrain=retrainer(network, recipe),
        name="Fashion-MNIST",
    )


@seeded
def network() -> nn.Module:
    """55,594 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def _read(root: str, train: bool) -> Examples:
    """The training or the test images, scaled to [0, 1]; an example's name is its place in the original files."""
    folder = root or os.environ.get(ROOT, "")
    remedy = (
        "get it with torchvision.datasets.FashionMNIST(DIR, download=True), then name DIR with -p root=DIR or "
        f"{ROOT}=DIR"
    )
    if not folder:
        raise DataError(f"Fashion-MNIST needs the folder of its data, found neither -p root nor {ROOT}; {remedy}")
    try:
        data = FashionMNIST(folder, train=train)
    except Exception as error:
        raise DataError(f"{folder} must hold Fashion-MNIST, torchvision says {described(error)}; {remedy}") from error
    part = "train" if train else "test"
    names = tuple(f"fashion-mnist/{part}/{i:05d}" for i in range(len(data.data)))
    return Examples(data.data[:, None].float() / 255, data.targets, names)

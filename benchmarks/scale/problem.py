"""What is mapped: the Fashion-MNIST CNN after one epoch of its first N images.

Data: H. Xiao, K. Rasul and R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms" (2017), arXiv 1708.07747, in the folder that BRITTLE_DATA names, as torchvision lays it out.
"""

from __future__ import annotations

import os
from pathlib import Path

from torchvision.datasets import FashionMNIST

from brittle.data import Examples
from brittle.examples.fashion_mnist import ROOT, network
from brittle.examples.training import Recipe, trained
from brittle.subject import Subject

MEAN, STD = 0.286, 0.353

TEST = 2_000
"""Test images, whatever N is."""


def read(train: bool, count: int) -> Examples:
    """The first images, (N, 1, 28, 28) in [0, 1], made without a second copy of them."""
    data = FashionMNIST(os.environ[ROOT], train=train)
    return Examples(data.data[:count, None].float().div_(255), data.targets[:count].clone())


def data_bytes(size: int) -> int:
    """What the training inputs and labels take."""
    return size * (28 * 28 * 4 + 8)


def make(size: int, cache: str, epochs: int = 1) -> Subject:
    """The network after `epochs` of the first `size` images, trained once into the folder `cache`."""
    data = read(train=True, count=size)
    recipe = Recipe(MEAN, STD, epochs=epochs, batch=128, lr=0.05, seed=0)
    model, path = trained(network, data, recipe, Path(cache) / f"{size}x{epochs}", bar="")
    normalize = (MEAN, STD)
    return Subject(model, data, read(train=False, count=TEST), normalize=normalize, path=path, name=f"{size} images")

"""What is mapped: the Fashion-MNIST CNN after one epoch of its first N images."""

from __future__ import annotations

from pathlib import Path

from benchmarks.data import read
from brittle.examples.fashion_mnist import network
from brittle.examples.training import Recipe, trained
from brittle.subject import Subject

MEAN, STD = 0.286, 0.353

TEST = 2_000
"""Test images, whatever N is."""


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

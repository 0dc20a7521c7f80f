"""Handwritten digits, 8 x 8 (scikit-learn's): trains in a second, audits in a minute.

Data: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits" (UCI, 1998), doi 10.24432/C50P49.
"""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from brittle.data import Examples
from brittle.examples.training import Recipe, retrainer, seeded, trained
from brittle.subject import Subject

TRAIN, POOL = 600, 500
"""Sizes of the fixed split; the other 697 of 1,797 images are the test data."""


def make(seed: int = 0, cache: str = "") -> Subject:
    """A small CNN on the digits. seed: of the training. cache: folder of the path and the weights."""
    parts = _split()
    std, mean = torch.std_mean(parts["train"].inputs)
    recipe = Recipe(mean.item(), std.item(), epochs=15, batch=32, lr=0.02, seed=seed)
    folder = Path(cache or f"runs/.subjects/digits-seed{seed}")
    model, path = trained(network, parts["train"], recipe, folder, bar="training on the digits")
    return Subject(
        model,
        train=parts["train"],
        test=parts["test"],
        pool=parts["pool"],
        bounds=(0.0, 1.0),
        normalize=(recipe.mean, recipe.std),
        class_names=tuple("0123456789"),
        path=path,
        retrain=retrainer(network, recipe),
        name="digits",
    )


@seeded
def network() -> nn.Module:
    """9,930 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def _split() -> dict[str, Examples]:
    """The fixed split into train, pool and test; an example's name is its place in scikit-learn's data."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.as_tensor(digits.images[order], dtype=torch.float32)[:, None] / 16  # shape: (1797, 1, 8, 8)
    names = tuple(f"digits/{i:04d}" for i in order)
    everything = Examples(images, torch.as_tensor(digits.target[order], dtype=torch.int64), names)
    bounds = {"train": (0, TRAIN), "pool": (TRAIN, TRAIN + POOL), "test": (TRAIN + POOL, None)}
    return {part: everything[slice(*rows)] for part, rows in bounds.items()}

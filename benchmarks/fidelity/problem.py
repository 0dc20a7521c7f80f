"""The problem that every case is trained on: 256 handwritten digits, 8 x 8, and 16 others as queries.

Data: scikit-learn's copy of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits" (UCI, 1998),
doi 10.24432/C50P49.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from brittle.data import Examples

TRAIN, QUERIES, OTHER = 256, 8, 256
"""Examples in training, queries, and further examples from which fine-tuning has its first weights."""

BATCH, EPOCHS = 32, 6
"""48 steps."""


@dataclass(frozen=True)
class Problem:
    """Training examples, queries and further examples, in torch's default precision."""

    train: Examples
    queries: Examples
    other: Examples


def problem(binary: bool = False) -> Problem:
    """The fixed split. binary: whether the digit is 5 or more."""
    images, labels = _digits()
    labels = (labels >= 5).long() if binary else labels
    parts = images.split([QUERIES, TRAIN, OTHER, len(images) - QUERIES - TRAIN - OTHER])
    queries, train, other, _ = zip(parts, labels.split([len(p) for p in parts]), strict=True)
    return Problem(*(Examples.of(part, "digits") for part in (train, queries, other)))


@contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """Run the block in another default precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@cache
def _digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) in [0, 1] and labels, in a fixed random order."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.as_tensor(digits.images)[order, None] / 16
    return images, torch.as_tensor(digits.target, dtype=torch.int64)[order]

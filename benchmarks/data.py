"""Fashion-MNIST for the benchmarks, from the folder that BRITTLE_DATA names; nothing is fetched.

Data: H. Xiao, K. Rasul and R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms" (2017), arXiv 1708.07747, as torchvision lays it out.
"""

from __future__ import annotations

import os
import sys

from torchvision.datasets import FashionMNIST

from brittle.data import Examples
from brittle.examples.fashion_mnist import ROOT


def unnamed() -> bool:
    """Whether no folder is named; then one line says so."""
    if os.environ.get(ROOT):
        return False
    print(f"{ROOT} must name the folder that holds FashionMNIST/; set it, nothing is fetched", file=sys.stderr)
    return True


def read(train: bool, count: int | None = None) -> Examples:
    """The first images, (N, 1, 28, 28) in [0, 1], made without a second copy of them; all where left out."""
    data = FashionMNIST(os.environ[ROOT], train=train)
    return Examples(data.data[:count, None].float().div_(255), data.targets[:count].clone())

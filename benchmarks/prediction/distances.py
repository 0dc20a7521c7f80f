"""The minimal adversarial distances that are predicted: which images, which networks, which attacks.

The 10,000 test images of MNIST are dealt once, by a fixed generator, into three parts. `calibration` fits small models,
`sealed` is predicted, both on the networks of seed 0; `development` images, on networks of another seed, are what
scores were chosen on. Of each part the first images count that the network gets right.

The distance is the smallest that any of our minimal-norm attacks of the standard preset comes to, each with its own
starts: hole-seeking (300 evaluations), DDN (200, L2 only), FMN (200), FAB (150), Auto-PGD with bisection (400) and
from training neighbours (60). Attacks within a fixed distance say nothing of inputs that are nearer or farther.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from brittle.attacks import suite
from brittle.attacks.envelope import envelope
from brittle.attacks.plan import SUITE, members
from brittle.records import Norm, Pairs, Queries
from brittle.subject import Subject

PARTS = {"calibration": (0.0, 0.25), "sealed": (0.25, 0.5), "development": (0.5, 1.0)}
"""Shares of the dealt test images."""

BLOCK = 200
"""Images attacked between two writes of the cache."""


@dataclass(frozen=True)
class Measured:
    """Images that the network gets right, and how far the nearest image is that it gets wrong."""

    queries: Queries
    distance: Tensor  # shape: (M,) float64

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, rows: Tensor | slice) -> Measured:
        return Measured(self.queries[rows], self.distance[rows])


def measured(subject: Subject, part: str, norm: Norm, count: int, preset: str, cache: Path) -> Measured:
    """The first `count` images of a part that are right, attacked; what was attacked before is read from the cache."""
    queries = right(subject, part, count)
    found = []
    for k in range(0, len(queries), BLOCK):
        block = queries[slice(k, k + BLOCK)]
        file = cache / f"distance-{preset}-{norm}-{part}-{k}-{len(block)}.pt"
        if not file.exists():
            cache.mkdir(parents=True, exist_ok=True)
            torch.save(nearest(subject, block, norm, preset), file)
        found.append(torch.load(file, weights_only=True))
    return Measured(queries, torch.cat(found))


def right(subject: Subject, part: str, count: int) -> Queries:
    """The first images of a part that the network gets right."""
    dealt = torch.randperm(len(subject.test), generator=torch.Generator().manual_seed(6))
    low, high = (round(share * len(dealt)) for share in PARTS[part])
    ids = dealt[low:high]
    inputs, targets = subject.test.inputs[ids], subject.test.targets[ids]
    logits = subject.predict(inputs)
    rows = (logits.argmax(1) == targets).nonzero()[:count, 0]
    return Queries(ids[rows], inputs[rows], targets[rows], logits[rows], Pairs.of(logits[rows]))


def nearest(subject: Subject, queries: Queries, norm: Norm, preset: str) -> Tensor:
    """The envelope of the minimal-norm attacks, (M,) float64; infinite where all failed."""
    minimal = [name for name in members(preset, norm) if not SUITE[name].fixed]
    rows = suite.run(
        subject,
        queries,
        mass=None,
        groups=None,
        generator=torch.Generator().manual_seed(0),
        preset=preset,
        norms=(norm,),
        attacks=minimal,
    )
    return envelope(rows, norm).distance.double()

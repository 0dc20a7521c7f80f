"""Random augmentation that can be repeated: one random state for each example and epoch.

The path kernel needs the very inputs that a step was made from. An augmentation that is seeded by (seed, id,
epoch) gives them again at any time, whatever the sampler, the batch, or the number of loader workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from brittle.data import Examples

Augment = Callable[[Tensor, int, int], Tensor]
"""(one raw input (*shape), id, epoch) -> the raw input that training saw; the same for the same three."""


@dataclass(frozen=True)
class Augmentation:
    """`transform` on one raw input, its random numbers fixed by (seed, id, epoch).

    Args:
        transform: draws from torch's global generator only, as torchvision's transforms do; the state of that
            generator outside is left as it was.
        seed: another seed, another sequence of augmentations.
    """

    transform: Callable[[Tensor], Tensor]
    seed: int = 0

    def __call__(self, x: Tensor, id: int, epoch: int) -> Tensor:
        key = hashlib.blake2b(f"{self.seed} {id} {epoch}".encode(), digest_size=7).digest()
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(int.from_bytes(key, "big"))
            return self.transform(x)


class Augmented(Dataset[tuple[Tensor, Tensor, int]]):
    """Examples as training sees them: item i is (augmented input, label, i). Give the ids to `Recorder.batch`.

    Call `set_epoch` before each epoch, and pass the same number to `Recorder.batch(ids, epoch=...)`; loader
    workers see it, persistent ones as well.
    """

    def __init__(self, examples: Any, augment: Augment) -> None:
        self.examples, self.augment = Examples.of(examples, "train"), augment
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose augmentations the items have from now on."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, id: int) -> tuple[Tensor, Tensor, int]:
        x, target = self.examples.inputs[id], self.examples.targets[id]
        return self.augment(x, id, int(self._epoch)), target, id

"""A group memory in half the room: displacements in half precision, each row to a scale of its own.

Half precision keeps 11 bits of a number, over 30 powers of two if the largest number of a row is put near the top of
its range. What rounding takes from a row is known, d[t, g] = |U[t, g] - rounded|, and no mass can be further off than

    |mass_g - rounded| <= sum_t mean over the nodes of |J_t(x)| d[t, g].

Rounding is not that unkind: `error` is what it really does to masses, measured on a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.kernel.memory import Memory, mass
from brittle.records import Pairs
from brittle.subject import Subject

TOP = 2.0**15
"""Where the largest number of each row is put; half precision ends at 2^16."""


@dataclass(frozen=True)
class Halved:
    """A memory whose displacements are rounded, for the disk."""

    ends: Tensor  # shape: (T + 1, P)
    displacements: Tensor  # shape: (T, G + 1, P) float16
    scale: Tensor  # shape: (T, G + 1)
    lost: Tensor  # shape: (T, G + 1), Euclidean length of what rounding took from a row
    nodes: int
    error: float

    def whole(self) -> Memory:
        """The memory again, in the precision of its ends."""
        return Memory(self.ends, self.displacements.to(self.ends) * self.scale[..., None], self.nodes, self.error)


def halved(memory: Memory, subject: Subject, inputs: Tensor, pairs: Pairs, device: str = "cpu") -> Halved:
    """The memory in half precision, and what that does to masses.

    inputs, pairs: the sample on which `error` is measured, mean |difference of a mass| / mean |mass|.
    Cost: twice the mass of the sample.
    """
    largest = memory.displacements.abs().amax(-1)
    scale = torch.where(largest > 0, largest / TOP, 1.0)
    rounded = (memory.displacements / scale[..., None]).half()
    lost = (memory.displacements - rounded.to(scale) * scale[..., None]).norm(dim=-1)
    found = Halved(memory.ends, rounded, scale, lost, memory.nodes, 0.0)
    exact, off = (mass(m, subject, inputs, pairs, device) for m in (memory, found.whole()))
    error = (off - exact).abs().mean() / exact.abs().mean().clamp_min(torch.finfo(exact.dtype).tiny)
    return Halved(memory.ends, rounded, scale, lost, memory.nodes, error.item())

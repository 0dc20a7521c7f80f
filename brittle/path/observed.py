"""What a recorder observes of a training: the batches of each step, how it was taken, and the states between.

One *step* of the optimizer is made from one or several *batches* (gradient accumulation), each of which went
forward and backward once. Tensors that belong to a batch are kept in the order of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

AUTOCAST: tuple[torch.dtype | None, ...] = (None, torch.bfloat16, torch.float16)
"""The precisions of a forward pass, by the number that the store writes."""


NOT_DESCRIBED = (math.nan,) * 3
"""In place of the numbers that describe what came in."""


@dataclass(frozen=True)
class Batch:
    """One forward and backward pass.

    ids: the examples; with `shares` (mixed rows) several a row. norm: Euclidean norm of the gradient that backward
    delivered, over all trained tensors. inputs, targets: what the pass really saw, where the user stored it.
    weights: the loss's third argument. random: the random state before the forward pass, where it drew numbers.
    seen: three numbers that describe the tensor which the model was called with; NaN where it was not one, and where
    no state was kept before the step.
    """

    ids: Tensor  # shape: (B,) or (B, K) int64
    epoch: int = 0
    norm: float = 1.0
    autocast: int = 0  # place in AUTOCAST
    seen: tuple[float, float, float] = NOT_DESCRIBED
    shares: Tensor | None = None  # shape: (B, K)
    inputs: Tensor | None = None  # shape: (B, *shape)
    targets: Tensor | None = None  # shape: (B, ...)
    weights: Tensor | None = None  # shape: (B,)
    random: Tensor | None = None  # uint8

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def rows(self) -> Tensor:
        """The example that gives each row its input, (B,)."""
        return self.ids if self.ids.dim() == 1 else self.ids[:, 0]

    def credited(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values of the rows as values of examples: the ids, and (..., B) -> (..., B K)."""
        if self.shares is None:
            return self.ids, values
        parts = values[..., None] * self.shares.to(values)
        return self.ids.reshape(-1), parts.flatten(-2)


KEPT = tuple(f.name for f in fields(Batch) if f.name in ("shares", "inputs", "targets", "weights", "random"))
"""The tensors of a batch that are there only where they are needed."""


@dataclass(frozen=True)
class Manner:
    """What seldom changes from step to step: how parameter groups are set, and which modules rest in eval mode."""

    owner: tuple[int, ...]  # the parameter group of each tensor of the state, -1 for none
    settings: tuple[Mapping[str, Any], ...]  # of each parameter group, learning rates apart
    resting: tuple[str, ...] = ()  # modules in evaluation mode


@dataclass(frozen=True)
class Step:
    """What was observed of one step. n tensors make up the state, buffers among them."""

    batches: tuple[Batch, ...]
    lr: tuple[float, ...]
    manner: Manner
    counts: Tensor  # shape: (n,) int64; updates of each tensor before this one, -1 where it rests
    factors: Tensor  # shape: (n,) float64; what happened to its gradient between backward and step
    bounds: Tensor  # shape: (n,) float64; the gradient was clipped to [-bound, bound] after that
    extra: Tensor  # shape: (n,) float64; see `optimizers.Recipe`
    length: float = 0.0  # norm of the gradients as the optimizer got them, where clipping by value hid the factor
    averaged: float = 0.0  # share of the new weights in the averaged ones after this step
    statistics: Tensor | None = None  # running statistics after this step, where replay could not find them

    @property
    def examples(self) -> int:
        """The number of rows in all batches."""
        return sum(len(batch) for batch in self.batches)

    @property
    def cut(self) -> bool:
        """Whether a gradient was clipped by value."""
        return bool((self.bounds < math.inf).any())

    @property
    def nbytes(self) -> int:
        """Bytes that its tensors take."""
        kept = [getattr(batch, name) for batch in self.batches for name in ("ids", *KEPT)]
        return sum(t.nbytes for t in (*kept, self.counts, self.factors, self.bounds, self.extra) if t is not None)


@dataclass(frozen=True)
class Snapshot:
    """The state before a step, and what the optimizer holds: vectors over the parameters, and numbers by tensor."""

    step: int
    state: Tensor  # shape: (P,)
    buffers: Mapping[str, Tensor]  # each of shape (parameters,)
    counts: Tensor  # shape: (n,) int64; updates of each tensor so far
    extra: Tensor  # shape: (n,) float64; NAdam's running product; 1 where SGD's buffer has begun

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.state, *self.buffers.values()))

    def to(self, device: torch.device) -> Snapshot:
        """The same snapshot on a device."""
        buffers = {name: buffer.to(device) for name, buffer in self.buffers.items()}
        return Snapshot(self.step, self.state.to(device), buffers, self.counts, self.extra)

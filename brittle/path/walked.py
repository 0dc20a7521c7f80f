"""The steps of a path as they are walked: states, batches and rules, and what each batch had in the gradient.

The gradient that training took from a batch is a_k times the gradient of the subject's loss: 1 over the number of
batches where gradients were accumulated, a power of two under a gradient scaler, the batch's size for a summed loss.
a_k is the recorded norm over the recomputed one, put to such a value where it lies beside one (`share_of`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from brittle.path.observed import Batch, Step
from brittle.path.rules import StepRule

NEAR = {0: 1e-3, 1: 0.03, 2: 0.03}
"""How far, relatively, a batch's share may lie beside the value it is put to, by the precision of its forward pass."""


@dataclass(frozen=True)
class WalkedStep:
    """One step of the path: the state before it, what was observed, and how its gradients were spent.

    moves: the coordinates whose gradients the optimizer took, (P,) bool, None for all parameters.
    shares: a_k of each batch, where it is known.
    """

    index: int
    state: Tensor  # shape: (P,)
    seen: Step
    rule: StepRule
    moves: Tensor | None = None
    shares: tuple[float, ...] | None = None

    @property
    def batches(self) -> tuple[Batch, ...]:
        return self.seen.batches

    def share(self, batch: Batch, norm: float) -> float:
        """a_k of one of its batches. norm: Euclidean norm of the batch's recomputed gradient, where it was taken."""
        if self.shares is not None:
            return self.shares[next(k for k, one in enumerate(self.batches) if one is batch)]
        return share_of(self.seen, batch, norm)

    def length(self, gradient: Tensor) -> float:
        """Euclidean norm of what the optimizer took of a gradient (P,)."""
        return length_taken(gradient, self.moves)


@dataclass(frozen=True)
class Interval:
    """The steps between two stored states, `end` being the state after the last."""

    steps: list[WalkedStep]
    end: Tensor  # shape: (P,)
    drift: float

    def states(self) -> list[Tensor]:
        """The states before every step, and the end."""
        return [*(s.state for s in self.steps), self.end]


def length_taken(gradient: Tensor, moves: Tensor | None) -> float:
    """Euclidean norm of a gradient (P,) where it was taken. moves: (P,) bool, None for everywhere."""
    return (gradient if moves is None else gradient * moves).double().norm().item()


def share_of(seen: Step, batch: Batch, norm: float) -> float:
    """a_k: the factor between a batch's recomputed gradient, of Euclidean norm `norm`, and the recorded one.

    Put to 2^n times 1, 1 / (number of batches), the batch's share of the rows or its size, where it lies beside one.
    """
    if norm == 0 or batch.norm == 0:
        return 1.0
    plain = plain_share(seen, batch, batch.norm / norm)
    return batch.norm / norm if plain is None else plain


def plain_share(seen: Step, batch: Batch, ratio: float) -> float | None:
    """The value beside which a ratio of norms lies, None where it lies beside none."""
    for plain in (1.0, 1 / len(seen.batches), len(batch) / seen.examples, float(len(batch))):
        value = plain * 2.0 ** round(math.log2(ratio / plain))
        if abs(ratio / value - 1) <= NEAR[batch.autocast]:
            return value
    return None

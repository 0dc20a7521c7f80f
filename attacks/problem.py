"""What every attack is given: inputs, what their model says, what counts as success, and what may be spent.

An attack is a function of a `Problem`, and of a generator where it is random: find, near each input and within the
bounds, one that is misclassified, or that is classified as the target where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from brittle.attacks.losses import margin
from brittle.bounds import Bounds
from brittle.errors import UsageError
from brittle.records import Norm

Logits = Callable[[Tensor], Tensor]
"""Raw inputs (B, *input) -> logits (B, C), differentiable in the inputs, each row by itself."""

Rows = Tensor | slice

EVERY = slice(None)

SLACK = 16
"""A misclassification counts where it exceeds the largest logit's rounding error this many times."""


@dataclass(frozen=True)
class Problem:
    """Inputs to be attacked in one norm; with `targets`, only the target class counts as success.

    Args:
        cap: evaluations that an input may cost at most; an attack ends with the best it had by then.
        enough: an input is let go at its first success within this distance.
        draws: of a random model, how often it is asked at each point; means of logits and gradients are what counts
            (expectation over transformation: Athalye, Engstrom, Ilyas, Kwok 2018, arXiv 1707.07397).
    """

    logits: Logits
    inputs: Tensor  # shape: (B, *input), within the bounds
    labels: Tensor  # shape: (B,) int64, the class that is right
    norm: Norm
    bounds: Bounds
    targets: Tensor | None = None  # shape: (B,) int64
    cap: int | None = None
    enough: float | None = None
    draws: int = 1

    def __post_init__(self) -> None:
        for name in ("cap", "draws"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, found {value}; leave it out for the default")

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: Rows) -> Problem:
        targets = None if self.targets is None else self.targets[rows]
        return replace(self, inputs=self.inputs[rows], labels=self.labels[rows], targets=targets)

    def aimed(self, targets: Tensor) -> Problem:
        """The same inputs with a target for each. targets: (B,) int64."""
        return replace(self, targets=targets)

    def margin(self, logits: Tensor, rows: Rows = EVERY) -> Tensor:
        """Logits that are still between some of the inputs, all by default, and success: (B', C) -> (B',)."""
        return margin(logits, self.labels[rows], None if self.targets is None else self.targets[rows])

    def fooled(self, logits: Tensor, rows: Rows = EVERY) -> Tensor:
        """Success, by more than rounding could undo: (B',) bool. Never where a logit is not finite."""
        return self.margin(logits, rows) < -doubt(logits)


def doubt(logits: Tensor) -> Tensor:
    """What a margin could owe to rounding, (B,); not finite, so that nothing exceeds it, where a logit is not."""
    return SLACK * torch.finfo(logits.dtype).eps * logits.abs().amax(1)

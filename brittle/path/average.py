"""Averaged weights as the audited model: how much of each step they hold is read from how they move.

An average that takes a share a of the new weights, avg' = avg + a (w - avg), is recognised from two looks at it:

    a = <avg' - avg, w - avg> / |w - avg|^2,        and what is left must be rounding.

This covers exponential averages (EMA) of any, also changing, decay, and equal ones (SWA).
"""

from __future__ import annotations

import torch
from torch import nn

from brittle.checks import unwrapped
from brittle.errors import UnsupportedError
from brittle.path.flat import parameters_of

TOLERANCE = 1e-3
"""What may be left of an average's move, relative to it."""


class AverageWatch:
    """Looks at a model's averaged weights after every step; `model` holds them."""

    def __init__(self, average: nn.Module, model: nn.Module) -> None:
        self.model = unwrapped(average)
        ours, theirs = ([p.shape for p in m.parameters()] for m in (model, self.model))
        if ours != theirs:
            raise UnsupportedError(
                f"average= must hold the model's own {len(ours)} parameters, found {len(theirs)} or other shapes; pass "
                "the AveragedModel, or a copy of the model that your loop averages into"
            )
        self._source, self._before = model, parameters_of(self.model)

    def share(self) -> float:
        """The share of the model's weights that the average took since the last look; 0 where it stood still."""
        now = parameters_of(self.model)
        moved, way = (now - self._before).double(), (parameters_of(self._source) - self._before).double()
        scale = now.double().norm() * torch.finfo(now.dtype).eps
        if moved.norm() <= scale:
            return 0.0
        share = (moved @ way / (way @ way).clamp_min(1e-300)).item()
        if (moved - share * way).norm() > TOLERANCE * moved.norm() + 10 * scale:
            raise UnsupportedError(
                "average= must move towards the weights of the step before it, avg + a (w - avg), found another move; "
                "update it once after each optimizer.step(), or audit the last weights"
            )
        self._before = now
        return 1.0 if abs(share - 1) < 1e-6 else share

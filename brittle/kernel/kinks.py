"""The kinks of ReLU networks on average over a line, in place of at one point of it.

Between the ends of a short line a unit's input z goes from a to b, nearly straight. On the way, relu(z) and its slope
are on average, with m = (relu(a) + relu(b)) / 2,

    slope = 2 m / (|a| + |b|),             value = slope m,

the share of the line on which the unit is on, and what it gives. A gradient that is taken in the middle of the line
with these in place of relu(z) and its jump is the average over the line, as far as kinks go. A plain midpoint hits or
misses a unit that switches; of a shift between two inputs that differ little, units that switch at one and not at
the other are nearly all there is. This is for quadrature alone: outputs themselves are never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

RELU = {F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
IN_PLACE = {torch.relu_, Tensor.relu_}


@torch.no_grad()
def kinks_of(run: Callable[[], object]) -> list[Tensor]:
    """What goes into each ReLU while `run()` runs, in their order."""
    with _Noted() as noted:
        run()
    return noted.inputs


class Averaged(TorchFunctionMode):
    """Inside, each ReLU is what it is on average between two states.

    low, high: what goes into each of them there, by `kinks_of`. A ReLU whose input has another shape stays as it is.
    """

    def __init__(self, low: Sequence[Tensor], high: Sequence[Tensor]) -> None:
        super().__init__()
        self._ends = iter(list(zip(low, high, strict=False)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in RELU:
            return func(*args, **kwargs)
        z = args[0] if args else kwargs["input"]
        low, high = next(self._ends, (None, None))
        if low is None or high is None or not low.shape == high.shape == z.shape:
            return func(*args, **kwargs)
        middle = (low.relu() + high.relu()) / 2
        slope = 2 * middle / (low.abs() + high.abs()).clamp_min(torch.finfo(low.dtype).tiny)
        found = slope * middle + slope * (z - z.detach())
        return z.copy_(found) if func in IN_PLACE or kwargs.get("inplace") or True in args[1:] else found


class _Noted(TorchFunctionMode):
    """Keeps what goes into each ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in RELU:
            self.inputs.append((args[0] if args else kwargs["input"]).detach().clone())
        return func(*args, **(kwargs or {}))

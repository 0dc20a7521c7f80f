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

Kink = tuple[Tensor, Tensor]
"""What goes into a ReLU, and what comes out."""


@torch.no_grad()
def kinks_of(run: Callable[[], object]) -> list[Kink]:
    """What each ReLU does while `run()` runs, in their order."""
    with _Noted() as noted:
        run()
    return noted.kinks


class Averaged(TorchFunctionMode):
    """Inside, each ReLU is what it is on average between two states.

    low, high: what each of them does there, by `kinks_of`. A ReLU whose input has another shape stays as it is.
    """

    def __init__(self, low: Sequence[Kink], high: Sequence[Kink]) -> None:
        super().__init__()
        self._ends = iter(list(zip(low, high, strict=False)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in RELU:
            return func(*args, **kwargs)
        z, ends = args[0] if args else kwargs["input"], next(self._ends, None)
        if ends is None or any(end[0].shape != z.shape for end in ends):
            return func(*args, **kwargs)
        slope, middle = _average(*ends)
        found = slope * (z + (middle - z.detach()))
        return z.copy_(found) if _in_place(func, args, kwargs) else found


class _Noted(TorchFunctionMode):
    """Keeps what each ReLU does."""

    def __init__(self) -> None:
        super().__init__()
        self.kinks: list[Kink] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in RELU:
            return func(*args, **kwargs)
        z = args[0] if args else kwargs["input"]
        in_place = _in_place(func, args, kwargs)
        z = z.clone() if in_place else z
        found = func(*args, **kwargs)
        self.kinks.append((z, found.clone() if in_place else found))
        return found


def _average(low: Kink, high: Kink) -> Kink:
    """The slope, and m; with |a| = 2 relu(a) - a, and exactly 0 or 1 where the unit does not switch."""
    middle = (low[1] + high[1]).mul_(0.5)
    width = torch.add(middle, low[0] + high[0], alpha=-0.25).mul_(2)
    return middle / width.clamp_min_(torch.finfo(width.dtype).tiny), middle


def _in_place(func: Any, args: Any, kwargs: Any) -> bool:
    return func in IN_PLACE or bool(kwargs.get("inplace")) or True in args[1:]

"""What must be known of a forward pass to repeat it: random state, precision, modules at rest, and what came in.

Hooks on the model itself note each of its forward passes that can be trained from. The random state is kept
only where the pass drew numbers (dropout), so that a replay draws the same.

Activation checkpointing runs a forward pass again, within backward. Around the whole model that is no pass of its own,
unless it is reentrant: then gradients come from this one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from brittle.path.observed import AUTOCAST, NOT_DESCRIBED


@dataclass
class ForwardPass:
    """One forward pass in which gradients are tracked. depth: how many custom functions' backward it began within."""

    autocast: int = 0
    resting: tuple[str, ...] = ()
    seen: tuple[float, float, float] = NOT_DESCRIBED
    rows: int | None = None  # length of the first tensor that came in
    random: Tensor | None = None
    depth: int = 0


class ForwardWatch:
    """The forward passes of a model since `forget`: `last`, and the number of those in training mode, `count`.

    entered: called before each pass that can be trained from. describes: says whether what comes in is to be described.
    """

    def __init__(
        self,
        model: nn.Module,
        entered: Callable[[], None] = lambda: None,
        describes: Callable[[], bool] = lambda: True,
    ) -> None:
        self._entered, self._describes = entered, describes
        self.last: ForwardPass | None = None
        self.count = 0
        self._device = next(model.parameters()).device
        self._modules = dict(model.named_modules())
        self._before: Tensor | None = None
        self._hooks = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave),
        ]

    def forget(self) -> None:
        """Begin to count anew."""
        self.last, self.count = None, 0

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not torch.is_grad_enabled():
            self.count += model.training
            return
        backward = torch._C._current_graph_task_id() >= 0
        inside = depth() if backward else 0
        if backward and not inside:  # run again for it
            self._before = None
            self.count += model.training
            return
        self._entered()
        self._before = random_state(self._device)
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim() > 0]
        rows = len(given[0]) if given else None
        seen = described(given) if self._describes() else NOT_DESCRIBED
        self.last = ForwardPass(precision(self._device), resting(self._modules), seen, rows, depth=inside)

    def _leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.is_grad_enabled() and self.last is not None and self._before is not None:
            self.count += model.training
            if not torch.equal(self._before, random_state(self._device)):
                self.last.random = self._before


def depth() -> int:
    """In how many custom functions' backward this is called, one within another."""
    frame: FrameType | None = sys._getframe()
    found = 0
    while frame is not None:
        found += frame.f_code is BackwardCFunction.apply.__code__
        frame = frame.f_back
    return found


def resting(modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Those of a model's modules that are in evaluation mode, by name; '' is the model itself."""
    return tuple(name for name, module in modules.items() if not module.training)


def precision(device: torch.device) -> int:
    """The place in `AUTOCAST` of the precision that is in force."""
    kind = device.type
    return AUTOCAST.index(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else 0


def described(tensors: Sequence[Tensor]) -> tuple[float, float, float]:
    """Three numbers that tell one batch from another, in order: mean, root mean square, mean against a ramp."""
    x = next((a for a in tensors if a.is_floating_point() and a.dim() > 1), None)
    if x is None or x.numel() == 0:
        return NOT_DESCRIBED
    values = x.detach().reshape(-1)
    values = values.float() if values.element_size() < 4 else values
    ramp = _ramp(len(values), values.device, values.dtype)
    total, square, ordered = torch.stack([values.sum(), values @ values, values @ ramp]).tolist()
    return total / len(values), (square / len(values)) ** 0.5, ordered / len(values)


@lru_cache(maxsize=2)
def _ramp(length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.linspace(0, 1, length, device=device, dtype=dtype)


def random_state(device: torch.device) -> Tensor:
    """The state of torch's global generators, the CPU's first. (bytes,) uint8."""
    if device.type != "cuda":
        return torch.get_rng_state()
    return torch.cat([torch.get_rng_state(), torch.cuda.get_rng_state(device)])


@contextmanager
def repeated(random: Tensor | None, device: torch.device) -> Iterator[None]:
    """Random numbers as they were drawn from a noted state; the global state is left as it was."""
    if random is None:
        yield
        return
    size = len(torch.get_rng_state())
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(random[:size].cpu())
        if device.type == "cuda" and len(random) > size:
            torch.cuda.set_rng_state(random[size:].cpu(), device)
        yield

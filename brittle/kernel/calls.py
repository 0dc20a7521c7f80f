"""The calls of a model's modules in one pass: what went in, how they ran, and the gradient at what came out.

Hooks note them while a scalar is computed and pulled back. A call that drew random numbers keeps torch's random state
before it, so that the module can run again with the same draws, and what it returned, so that one can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

REPRODUCED = 1e-4
"""Relative distance between two runs of a module up to which they drew the same random numbers."""

ROUGH = 4
"""The same in units in the last place, for outputs that are rounded more coarsely."""

NO_DRAWS = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm, nn.Embedding}
"""Modules that are known to draw no random numbers, which saves looking."""


@dataclass(frozen=True)
class Drawn:
    """Random numbers of a call: the states of torch's generators before it, and the outputs that they led to."""

    generators: list[torch.Generator]
    states: list[Tensor]
    outputs: list[Any]


@dataclass
class Call:
    """One call of a module that owns parameters."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    modes: list[bool]  # `training` of the module and of every module inside it
    autocast: torch.dtype | None
    drawn: Drawn | None = None
    upstream: dict[int, Tensor] = field(default_factory=dict)  # number of the output: its gradient, (B, *output)

    @property
    def training(self) -> bool:
        return self.modes[0]

    def column(self, leaf: str) -> str:
        """The full name of one of the module's tensors."""
        return f"{self.name}.{leaf}" if self.name else leaf

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({type(self.module).__name__})"

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, the module runs in the call's modes and draws the call's random numbers; nobody else notices."""
        inside, generators = list(self.module.modules()), self.drawn.generators if self.drawn else []
        before = [module.training for module in inside], [generator.get_state() for generator in generators]
        try:
            _set(inside, self.modes, generators, self.drawn.states if self.drawn else [])
            yield
        finally:
            _set(inside, before[0], generators, before[1])

    def same_draws(self, outputs: list[Tensor]) -> bool:
        """Whether another run drew the same random numbers: what it returned, each (B, *output), is the same."""
        if self.drawn is None:
            return True
        before = [self.drawn.outputs[k] for k in self.upstream]
        rounding = [max(REPRODUCED, ROUGH * torch.finfo(output.dtype).eps) * output.norm() for output in before]
        return all((a.detach() - b).norm() <= r for a, b, r in zip(outputs, before, rounding, strict=True))


def record(modules: Iterable[tuple[str, nn.Module]], scalar: Callable[[], Tensor], device: torch.device) -> list[Call]:
    """Compute `scalar()` and pull it back: the calls of `modules` that had a part in it, in their order."""
    calls: list[Call] = []
    generators = _global_generators(device)
    with torch.enable_grad():
        hooks = [hook for name, module in modules for hook in _watch(name, module, generators, calls)]
        try:
            scalar().backward()
        finally:
            for hook in hooks:
                hook.remove()
    return [call for call in calls if call.upstream]


def _global_generators(device: torch.device) -> list[torch.Generator]:
    """Where random numbers come from that were asked of no generator: the CPU's, and the device's own."""
    if device.type != "cuda":
        return [torch.default_generator]
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[index]]


def _watch(name: str, module: nn.Module, generators: list[torch.Generator], calls: list[Call]) -> list[RemovableHandle]:
    """Hooks that add the module's calls to `calls`, whose outputs then report their gradient."""
    states: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        states[:] = [generator.get_state() for generator in generators]

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not torch.is_grad_enabled():  # a trunk that the model itself keeps from learning
            return output
        given = tuple(_mapped(_detached, v) for v in args), {k: _mapped(_detached, v) for k, v in kwargs.items()}
        modes = [part.training for part in module.modules()]
        calls.append(call := Call(name, module, *given, modes, _autocast(generators[-1].device)))
        if states and not all(map(torch.equal, states, [generator.get_state() for generator in generators])):
            outputs = [_detached(leaf, copy=True) for leaf in pytree.tree_leaves(output)]
            call.drawn = Drawn(generators, states.copy(), outputs)
        number = count()
        return _mapped(lambda leaf: _watched(leaf, call.upstream, next(number)), output)

    hooks = [module.register_forward_hook(leave, with_kwargs=True)]
    if type(module) not in NO_DRAWS:
        hooks.append(module.register_forward_pre_hook(enter))
    return hooks


def _autocast(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """`function` of a tensor, or of every leaf of a nest of containers."""
    return function(tree) if isinstance(tree, Tensor) else pytree.tree_map(function, tree)


def _detached(leaf: Any, copy: bool = False) -> Any:
    """The same without its history, which would keep the whole pass in memory."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().clone() if copy else leaf.detach()


def _watched(leaf: Any, upstream: dict[int, Tensor], k: int) -> Any:
    """Output number k of a call, its gradient being noted as soon as the backward pass reaches it."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    if not leaf.requires_grad:  # the weights ask for no gradient: the first module begins the graph
        leaf = _Beginning.apply(leaf.detach(), leaf.new_empty(0, requires_grad=True))
    leaf.register_hook(lambda g: upstream.update({k: g.detach()}))
    return leaf


class _Beginning(torch.autograd.Function):
    """A tensor as it is, without a copy, from which on gradients are kept; what follows may change it in place."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, root: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


def _set(modules: list[nn.Module], modes: list[bool], generators: list[torch.Generator], states: list[Tensor]) -> None:
    for module, mode in zip(modules, modes, strict=True):
        module.training = mode
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)

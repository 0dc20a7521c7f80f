"""A working copy of a model whose parameters and buffers are views of one vector.

The state `w` (P,) holds the parameters in the order of `named_parameters`, then the floating-point buffers
(running statistics) in the order of `named_buffers`. Loading another point of the path is one copy, and every
gradient in the package has this layout. The user's own model is never touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


@dataclass(frozen=True)
class Slot:
    """Where one parameter or buffer lies in the state vector."""

    name: str
    shape: torch.Size
    start: int
    buffer: bool

    @property
    def stop(self) -> int:
        return self.start + self.shape.numel()


def layout(model: nn.Module) -> tuple[Slot, ...]:
    """The slots of a model's state vector."""
    slots: list[Slot] = []
    named: list[tuple[str, Tensor, bool]] = [(name, p, False) for name, p in model.named_parameters()]
    named += [(name, b, True) for name, b in model.named_buffers() if b.is_floating_point()]
    start = 0
    for name, tensor, buffer in named:
        slots.append(Slot(name, tensor.shape, start, buffer))
        start = slots[-1].stop
    return tuple(slots)


def state_of(model: nn.Module) -> Tensor:
    """The state vector of a model, a copy of shape (P,)."""
    return torch.cat([parameters_of(model), statistics_of(model)])


LARGEST_BLOCK = (32 << 20) - (64 << 10)
"""Bytes of the largest tensor from which the C library learns what is worth keeping, less what it needs itself."""


def keep_freed_memory() -> None:
    """Let the C library keep memory that tensors give back, for the next step to use.

    glibc returns what is free at the end of its heap where that is more than twice the largest block that was freed so
    far. A small network's tensors then ask for the same pages anew in every step: half of its time, with a recorder
    beside it or without, as chance has it. One block of nearly 32 MiB, given back at once, sets the limit to the
    highest that it can learn (mallopt(3), M_MMAP_THRESHOLD). Other libraries are not impressed.
    """
    torch.empty(LARGEST_BLOCK, dtype=torch.uint8)


class Spare:
    """Memory of vectors on the CPU that are no longer needed, to be used again: the system gives new memory slowly."""

    def __init__(self) -> None:
        self._vectors: dict[tuple[int, torch.dtype], list[Tensor]] = {}

    def take(self, length: int, dtype: torch.dtype) -> Tensor:
        """A vector of any content."""
        kept = self._vectors.get((length, dtype))
        return kept.pop() if kept else torch.empty(length, dtype=dtype)

    def give(self, vectors: Iterable[Tensor]) -> None:
        """Nobody holds these vectors any more. May be called from another thread."""
        for vector in vectors:
            self._vectors.setdefault((len(vector), vector.dtype), []).append(vector)


@torch.no_grad()
def on_cpu(tensors: Sequence[Tensor], spare: Spare | None = None) -> Tensor:
    """Tensors one after the other as one vector on the CPU, a copy: one transfer from each device."""
    flat = [t.detach().reshape(-1) for t in tensors if t.numel()]
    away = [t for t in flat if t.device.type != "cpu"]
    if away:
        moved = iter(torch.cat(away).cpu().split([len(t) for t in away]))
        flat = [next(moved) if t.device.type != "cpu" else t for t in flat]
    if spare is None or len({t.dtype for t in flat}) > 1:
        return torch.cat(flat)
    return torch.cat(flat, out=spare.take(sum(map(len, flat)), flat[0].dtype))


@torch.no_grad()
def parameters_of(model: nn.Module) -> Tensor:
    """The parameters' part of the state, a copy."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@torch.no_grad()
def statistics_of(model: nn.Module) -> Tensor:
    """The buffers' part of the state, a copy; empty where the model has none."""
    statistics = [b.detach().reshape(-1) for b in model.buffers() if b.is_floating_point()]
    return torch.cat(statistics) if statistics else next(model.parameters()).detach().new_zeros(0)


class FlatModel:
    """A copy of `model` that lives at any point of the path.

    `state` (P,) is the vector that the copy's parameters and buffers are views of, `parameters` counts its
    leading entries that are parameters, `columns` says where the tensor of each name lies (tied ones have several).
    The copy's parameters ask for no gradient by themselves.
    """

    def __init__(self, model: nn.Module, device: str | torch.device = "cpu") -> None:
        self.model = copy.deepcopy(model).to(device)
        self.slots = layout(model)
        self.parameters = sum(s.shape.numel() for s in self.slots if not s.buffer)
        self.state = state_of(self.model)
        self.columns = self._bind()

    def __len__(self) -> int:
        return len(self.state)

    def load(self, state: Tensor) -> None:
        """Move the copy to another point of the path. state: (P,)."""
        self.state.copy_(state)

    def train(self) -> nn.Module:
        """The copy in training mode, as the recorded steps ran."""
        return self.model.train()

    def eval(self) -> nn.Module:
        """The copy in evaluation mode, as predictions run."""
        return self.model.eval()

    def gradient(self, scalar: Callable[[], Tensor]) -> Tensor:
        """Gradient of a scalar of the copy with respect to the state, (P,), by plain autograd; 0 for buffers."""
        parameters = [p.requires_grad_(True) for p in self.model.parameters()]
        try:
            found = torch.autograd.grad(scalar(), parameters, allow_unused=True)
        finally:
            for p in parameters:
                p.requires_grad_(False)
        parts = [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(found, parameters, strict=True)]
        return pad(torch.cat(parts), (0, len(self) - self.parameters))

    def _bind(self) -> dict[str, slice]:
        """Make the copy's tensors views of the state; returns their columns by name."""
        every: dict[str, Tensor] = {**dict(self.model.named_parameters(remove_duplicate=False))}
        every |= dict(self.model.named_buffers(remove_duplicate=False))
        slots = {id(every[slot.name]): slot for slot in self.slots}
        names = {name: slots[id(tensor)] for name, tensor in every.items() if id(tensor) in slots}
        for name, slot in names.items():
            owner, leaf = self.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            view = self.state[slot.start : slot.stop].view(slot.shape)
            if slot.buffer:
                owner._buffers[leaf] = view
            else:
                parameter = owner._parameters[leaf]
                assert parameter is not None
                parameter.requires_grad_(False).data = view
        return {name: slice(slot.start, slot.stop) for name, slot in names.items()}

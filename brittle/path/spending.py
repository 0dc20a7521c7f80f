"""The optimizer's side of a recorded step: who moves what, how it is set, what it holds, and what only it knows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from brittle.errors import UnsupportedError
from brittle.path.changes import Changes
from brittle.path.flat import Slot, Spare, on_cpu
from brittle.path.optimizers import MULTIPLIED, kind_of
from brittle.path.recipe import OBSERVED, named_momentum

NOT_SETTINGS = ("params", "lr", "initial_lr", "param_names")


class Spending:
    """Reads an optimizer, step by step.

    kind: the rule's name; name: the optimizer's own; warnings: what a reader of the path must be told.
    updates: how often each tensor was moved so far, (n,).
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, slots: Sequence[Slot], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self._optimizer, self._slots, self._parameters = optimizer, slots, parameters
        self._members: list[list[int]] = []
        self._owner: tuple[int, ...] = ()
        self._trained: frozenset[str] = frozenset()
        self.kind, self.name = kind_of(optimizer), type(optimizer).__name__
        self._held_last: list[float] = []
        self.updates = torch.tensor([self._updates(slot) for slot in slots])
        self.warnings = self._warnings()
        self._active, self._begun = torch.zeros(len(slots), dtype=torch.bool), self.extra()
        self._alike: tuple[Any, ...] = ()
        self._before: dict[str, Tensor] = {}
        self._traces: dict[str, Tensor] = {}
        self._others = {
            slot.name: parameters[slot.name].detach().clone()
            for slot, owner in zip(slots, self.owner(), strict=True)  # refuses at the door what the first step would
            if owner < 0 and not slot.buffer
        }

    @property
    def trained(self) -> frozenset[str]:
        """The names of the parameters in the optimizer's groups by now."""
        self.owner()
        return self._trained

    def owner(self) -> tuple[int, ...]:
        """The parameter group of each tensor of the state, -1 where the optimizer has none; frozen ones rest in it."""
        members = [[id(p) for p in g["params"]] for g in self._optimizer.param_groups]
        if members != self._members:
            self._owner = self._owner_among(members)
            self._trained = frozenset(s.name for s, owner in zip(self._slots, self._owner, strict=True) if owner >= 0)
            self._members = members
        return self._owner

    def _owner_among(self, members: Sequence[Sequence[int]]) -> tuple[int, ...]:
        group_of = {p: k for k, group in enumerate(members) for p in group}
        if set(group_of) - {id(p) for p in self._parameters.values()}:
            raise UnsupportedError(
                "the optimizer must move the model's own parameters only, it holds others besides; give them to an "
                "optimizer of their own, or make them part of the model"
            )
        return tuple(-1 if s.buffer else group_of.get(id(self._parameters[s.name]), -1) for s in self._slots)

    def settings(self) -> tuple[dict[str, Any], ...]:
        """The plain settings of each parameter group, learning rates apart."""
        return tuple(
            {k: _plain(v) for k, v in g.items() if k not in NOT_SETTINGS and _is_plain(v)}
            for g in self._optimizer.param_groups
        )

    def lr(self) -> tuple[float, ...]:
        """The learning rate of each parameter group."""
        return tuple(float(g["lr"]) for g in self._optimizer.param_groups)

    def skipped(self) -> bool:
        """Whether a scaler has told a fused optimizer to leave this step out."""
        found = getattr(self._optimizer, "found_inf", None)
        return found is not None and bool(found > 0)

    def check_others(self) -> None:
        """Parameters that this optimizer has never held must rest. Raises `UnsupportedError` for one that moved."""
        trained = self.trained
        self._others = {name: value for name, value in self._others.items() if name not in trained}
        for name, value in self._others.items():
            if not torch.equal(self._parameters[name].detach(), value):
                raise UnsupportedError(
                    f"one optimizer must move all that is trained, found {name} moved by something else than "
                    f"{self.name}; give one optimizer several parameter groups, or audit the trained model without a "
                    "path"
                )

    def begin(self, changes: Changes) -> tuple[Tensor, Tensor, Tensor]:
        """Before the step: its counts, factors and bounds by tensor, each (n,)."""
        scale = getattr(self._optimizer, "grad_scale", None)
        unscaled = 1.0 if scale is None else 1 / float(scale)  # a fused optimizer divides inside its step
        if self.kind == "SGD":
            self._begun = self.extra()
        if self.kind == OBSERVED:
            self._trace(changes.factors)
        alike = (self.owner(), changes.factors, changes.bounds, unscaled)
        if alike != self._alike:  # tensors are made anew only where something changed
            self._alike = alike
            self._active, self._factors, self._bounds = self._by_tensor(*alike)
        return torch.where(self._active, self.updates, -1), self._factors, self._bounds

    def _by_tensor(
        self, owners: tuple[int, ...], factors: Mapping[str, float], bounds: Mapping[str, float], unscaled: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Which tensors move, their factors and their bounds, each (n,)."""
        moved = [slot.name in factors and owner >= 0 for slot, owner in zip(self._slots, owners, strict=True)]
        listed = [(factors.get(slot.name, 1.0), bounds.get(slot.name, math.inf)) for slot in self._slots]
        by, cut = torch.tensor(listed, dtype=torch.float64).T * unscaled
        return torch.tensor(moved), by, cut

    def end(self) -> Tensor:
        """After the step: what its recipe needs besides, (n,); see `recipe.Recipe`."""
        self.updates = self.updates + self._active
        if self.kind == OBSERVED:
            return self._projections()
        return self._begun if self.kind == "SGD" else self.extra()

    def extra(self) -> Tensor:
        """NAdam's running product, 1 where it has not begun; for SGD whether the buffer has begun. (n,)."""
        if self.kind == "SGD":
            held = [float(self._held(slot).get("momentum_buffer") is not None) for slot in self._slots]
        elif self.kind == "NAdam":
            held = [float(self._held(slot).get(MULTIPLIED, 1.0)) for slot in self._slots]
        else:
            held = [1.0] * len(self._slots)
        if held != self._held_last:
            self._held_last, self._extra = held, torch.tensor(held, dtype=torch.float64)
        return self._extra

    def buffers(self, spare: Spare) -> dict[str, Tensor]:
        """What the optimizer holds over all parameters, 0 where it has not begun, in spare memory, (parameters,)."""
        states = {s.name: self._held(s) for s in self._slots if not s.buffer}
        if self.kind == OBSERVED:
            states = {name: {"trace": self._traces[name]} if name in self._traces else {} for name in states}
        names = {
            key: None
            for name, held in states.items()
            for key, value in held.items()
            if isinstance(value, Tensor)
            and value.shape == self._parameters[name].shape
            and key not in ("step", MULTIPLIED)
        }
        return {key: self._over_parameters(states, key, spare) for key in names}

    def restore(self, buffers: Mapping[str, Tensor]) -> None:
        """Take the traces of an observed optimizer up again from a stored state."""
        if self.kind == OBSERVED and "trace" in buffers:
            for slot in self._slots:
                if not slot.buffer:
                    self._traces[slot.name] = buffers["trace"][slot.start : slot.stop].view(slot.shape).clone()

    def _over_parameters(self, states: Mapping[str, Mapping[str, Any]], key: str, spare: Spare) -> Tensor:
        held = [(states[name].get(key), p) for name, p in self._parameters.items()]
        return on_cpu([torch.zeros_like(p) if v is None else v for v, p in held], spare)

    def _held(self, slot: Slot) -> Mapping[str, Any]:
        return {} if slot.buffer else self._optimizer.state.get(self._parameters[slot.name], {})

    def _updates(self, slot: Slot) -> int:
        """How often the optimizer has moved a tensor, as far as it knows."""
        held = self._held(slot)
        return int(held["step"]) if "step" in held else int(held.get("momentum_buffer") is not None)

    def _warnings(self) -> list[str]:
        found = []
        if self.kind == OBSERVED:
            found.append(
                f"The rule of the optimizer {self.name} is not known: its steps are credited as far as they follow the "
                "recorded gradients, what is left is the row `unexplained`, and states between the stored ones are "
                "interpolated."
            )
        if self.updates.any():
            found.append(
                f"The path begins in mid-training: what {self.name} held by then belongs to no recorded example and is "
                "counted as unexplained."
            )
        return found

    @torch.no_grad()
    def _trace(self, factors: Mapping[str, float]) -> None:
        """b = beta b + g for every tensor, with the beta that the settings name, and the weights before the step."""
        groups = self.settings()
        for slot, owner in zip(self._slots, self.owner(), strict=True):
            if owner < 0 or slot.name not in factors:
                continue
            parameter, s = self._parameters[slot.name], groups[owner]
            beta = named_momentum(s)
            assert parameter.grad is not None
            kept = self._traces.get(slot.name)
            self._traces[slot.name] = parameter.grad.clone() if kept is None else kept * beta + parameter.grad
            self._before[slot.name] = parameter.detach().clone()

    @torch.no_grad()
    def _projections(self) -> Tensor:
        """-<D, b> / <b, b> of each tensor."""
        found = torch.zeros(len(self._slots), dtype=torch.float64)
        for k, slot in enumerate(self._slots):
            if self._active[k]:
                moved = (self._parameters[slot.name] - self._before[slot.name]).double().reshape(-1)
                trace = self._traces[slot.name].double().reshape(-1)
                found[k] = -(moved @ trace) / (trace @ trace).clamp_min(1e-300)
        return found


def _is_plain(value: Any) -> bool:
    number = lambda v: isinstance(v, (int, float)) or (isinstance(v, Tensor) and v.numel() == 1)  # noqa: E731
    sequence = isinstance(value, (tuple, list)) and all(map(number, value))
    return value is None or number(value) or sequence


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [float(v) for v in value]
    return float(value) if isinstance(value, Tensor) else value

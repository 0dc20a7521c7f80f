"""Torch's own optimizer, resumed at a stored state: replayed steps are then the training's, to the last bit.

Training at a high learning rate multiplies rounding errors from step to step, so that a replay by the same formulas
in another order of operations ends elsewhere. `optimizers` says how the steps are credited; this module takes them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from brittle.path.flat import FlatModel
from brittle.path.observed import Snapshot, Step
from brittle.path.optimizers import MOMENTS, MULTIPLIED, Moments


class Resumed:
    """An optimizer over the flat model's parameters as it was before a snapshot's step."""

    def __init__(self, kind: str, first: Step, flat: FlatModel, before: Snapshot) -> None:
        self.kind, self.flat = kind, flat
        self._parameters = dict(flat.model.named_parameters())
        groups = [{"params": members} for members in self._members(first)]
        self._optimizer: Optimizer = getattr(torch.optim, kind)(groups, lr=1e-3)
        settings = {slot.name: first.manner.settings[k] for slot, k in zip(flat.slots, first.manner.owner, strict=True)}
        for k, slot in enumerate(flat.slots):
            begun = before.extra[k] if kind == "SGD" else before.counts[k]
            if slot.buffer or not (begun or kind == "Adagrad"):
                continue  # until its first update nothing is held
            parameter = self._parameters[slot.name]
            held = {
                name: buffer[slot.start : slot.stop].view(slot.shape).to(parameter, copy=True)
                for name, buffer in before.buffers.items()
            }
            if kind != "SGD":
                exact = torch.float32 if settings[slot.name].get("fused") else torch.get_default_dtype()
                held["step"] = torch.tensor(float(before.counts[k]), dtype=exact)
            if kind == "NAdam":
                held[MULTIPLIED] = torch.tensor(before.extra[k].item())
            self._optimizer.state[parameter] = held

    def spend(self, seen: Step, gradient: Tensor) -> None:
        """Take a step with a gradient (P,) as the optimizer got it: moves the flat model's state."""
        members = self._members(seen)
        for added in members[len(self._optimizer.param_groups) :]:
            self._optimizer.add_param_group({"params": added})
        for group, lr, settings, own in zip(
            self._optimizer.param_groups, seen.lr, seen.manner.settings, members, strict=True
        ):
            group.update(settings, lr=lr, params=own)
        for k, slot in enumerate(self.flat.slots):
            if not slot.buffer:
                rests = seen.counts[k] < 0
                piece = None if rests else gradient[slot.start : slot.stop].view(slot.shape)
                self._parameters[slot.name].grad = piece
                if self.kind == "SGD" and not seen.extra[k]:
                    self._optimizer.state.pop(self._parameters[slot.name], None)  # thrown away by the training
        self._optimizer.step()
        self._optimizer.zero_grad()

    def moments(self) -> Moments:
        """What the rule reads of the optimizer's state, over the whole model's state, 0 where there is none."""
        found = {}
        for name in MOMENTS[self.kind]:
            out = torch.zeros_like(self.flat.state)
            for slot in self.flat.slots:
                held = {} if slot.buffer else self._optimizer.state.get(self._parameters[slot.name], {})
                if held.get(name) is not None:
                    out[slot.start : slot.stop] = held[name].reshape(-1)
                    found[name] = out
        return found

    def _members(self, seen: Step) -> list[list[nn.Parameter]]:
        """The parameters of each group."""
        groups: list[list[nn.Parameter]] = [[] for _ in seen.lr]
        for slot, owner in zip(self.flat.slots, seen.manner.owner, strict=True):
            if owner >= 0:
                groups[owner].append(self._parameters[slot.name])
        return groups

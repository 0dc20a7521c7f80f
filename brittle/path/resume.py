"""Torch's own optimizer, resumed at a stored state: replayed steps are then the training's, to the last bit.

Training at a high learning rate multiplies rounding errors from step to step, so that a replay by the same formulas
in another order of operations ends elsewhere. `rules` says how the steps are credited; this module takes them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from brittle.path.flat import FlatModel
from brittle.path.rules import Recipe, scaled
from brittle.path.store import Snapshot


def resume(recipe: Recipe, flat: FlatModel, before: Snapshot) -> Optimizer:
    """An optimizer over the flat model's parameters as it was before step `before.step`. recipe: of that step."""
    parameters = dict(flat.model.named_parameters())
    groups: list[list[torch.nn.Parameter]] = [[] for _ in recipe.lr]
    held = {}
    for slot in flat.slots:
        owner = int(recipe.owner[slot.start]) if slot.shape.numel() else -1
        if owner < 0:
            continue
        parameter = parameters[slot.name]
        groups[owner].append(parameter)
        held[parameter] = {
            name: buffer[slot.start : slot.stop].view(slot.shape).to(parameter, copy=True)
            for name, buffer in before.buffers.items()
        }
    optimizer: Optimizer = getattr(torch.optim, recipe.optimizer)([{"params": group} for group in groups], lr=0.0)
    if before.step:  # until then nothing is held
        for parameter, buffers in held.items():
            count = {} if recipe.optimizer == "SGD" else {"step": torch.tensor(float(before.step))}
            optimizer.state[parameter] = {**count, **buffers}
    return optimizer


def spend(optimizer: Optimizer, recipe: Recipe, flat: FlatModel, gradient: Tensor) -> None:
    """Take the recipe's step with a gradient (P,) that is not yet clipped: moves the flat model's state."""
    for group, lr, settings in zip(optimizer.param_groups, recipe.lr, recipe.settings, strict=True):
        group.update(settings, lr=lr)
    parameters = dict(flat.model.named_parameters())
    for slot in flat.slots:
        if slot.name in parameters:
            parameters[slot.name].grad = scaled(recipe.clip, gradient[slot.start : slot.stop].view(slot.shape))
    optimizer.step()
    optimizer.zero_grad()


def second_moment(optimizer: Optimizer, flat: FlatModel) -> Tensor | None:
    """Adam's `exp_avg_sq` over the whole state, 0 where it has none; None for SGD. Shape (P,)."""
    if isinstance(optimizer, torch.optim.SGD):
        return None
    out, parameters = torch.zeros_like(flat.state), dict(flat.model.named_parameters())
    for slot in flat.slots:
        if slot.name in parameters and parameters[slot.name] in optimizer.state:
            out[slot.start : slot.stop] = optimizer.state[parameters[slot.name]]["exp_avg_sq"].reshape(-1)
    return out

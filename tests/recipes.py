"""How the cases are trained: a table of optimizers, their variants, and what a training loop may do besides."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from loops import Averaging, Recipe
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from brittle.augmentation import Augmentation

STEPS = 12


# ---------------------------------------------------------------------------------------------------------- optimizers


def _by(kind: type[Optimizer], **settings: Any) -> Recipe:
    return Recipe(lambda m: kind(m.parameters(), **settings))


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": parameters[:1], "lr": 0.2, "weight_decay": 0.1},
        {"params": parameters[1:-1], "lr": 0.05, "weight_decay": 0.0},
        {"params": parameters[-1:]},
    ]


def _mixed(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": parameters[:2], "momentum": 0.9, "nesterov": True},
        {"params": parameters[2:], "momentum": 0.5, "dampening": 0.3},
    ]


def _kinds(model: nn.Module) -> list[dict[str, Any]]:
    """Every parameter group is another RMSprop."""
    parameters = list(model.parameters())
    return [
        {"params": parameters[:1], "centered": True, "momentum": 0.5},
        {"params": parameters[1:2], "alpha": 0.8, "weight_decay": 0.1},
        {"params": parameters[2:], "momentum": 0.9, "lr": 0.01},
    ]


def _frozen(model: nn.Module) -> Optimizer:
    """The first parameter asks for no gradient, the last is trained by nobody."""
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    return SGD(parameters[:-1], lr=0.1, momentum=0.9, weight_decay=0.05)


def likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """What an optimizer that maximizes is given."""
    return -F.cross_entropy(logits, targets)


RECIPES = {
    "sgd": _by(SGD, lr=0.2),
    "sgd l2": _by(SGD, lr=0.2, weight_decay=0.05),
    "momentum": _by(SGD, lr=0.1, momentum=0.9),
    "dampening": _by(SGD, lr=0.1, momentum=0.9, dampening=0.4),
    "nesterov": _by(SGD, lr=0.1, momentum=0.8, nesterov=True),
    "momentum l2": _by(SGD, lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.05),
    "nesterov l2": _by(SGD, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.05),
    "adam": _by(Adam, lr=0.05),
    "adam l2": _by(Adam, lr=0.05, betas=(0.8, 0.95), weight_decay=0.05),
    "adam decoupled": _by(Adam, lr=0.05, weight_decay=0.1, decoupled_weight_decay=True, eps=1e-3),
    "adamw": _by(AdamW, lr=0.05, weight_decay=0.1),
    "amsgrad": _by(Adam, lr=0.05, betas=(0.9, 0.5), amsgrad=True, weight_decay=0.05),
    "adamw amsgrad": _by(AdamW, lr=0.05, betas=(0.9, 0.5), amsgrad=True, weight_decay=0.1),
    "rmsprop": _by(RMSprop, lr=0.02, alpha=0.9),
    "rmsprop momentum": _by(RMSprop, lr=0.02, alpha=0.9, momentum=0.7, weight_decay=0.05),
    "rmsprop centered": _by(RMSprop, lr=0.02, alpha=0.9, centered=True, eps=1e-3),
    "rmsprop centered momentum": _by(RMSprop, lr=0.02, centered=True, momentum=0.7, weight_decay=0.05, eps=1e-3),
    "adagrad": _by(Adagrad, lr=0.1),
    "adagrad l2": _by(Adagrad, lr=0.2, lr_decay=0.1, initial_accumulator_value=0.01, weight_decay=0.05),
    "nadam": _by(NAdam, lr=0.05),
    "nadam l2": _by(NAdam, lr=0.05, betas=(0.8, 0.9), momentum_decay=0.1, weight_decay=0.05),
    "nadam decoupled": _by(NAdam, lr=0.05, weight_decay=0.1, decoupled_weight_decay=True, eps=1e-4),
    "radam": _by(RAdam, lr=0.1),
    "radam l2": _by(RAdam, lr=0.1, betas=(0.8, 0.6), weight_decay=0.05),
    "radam decoupled": _by(RAdam, lr=0.1, weight_decay=0.1, decoupled_weight_decay=True),
    "adamax": _by(Adamax, lr=0.05),
    "adamax l2": _by(Adamax, lr=0.05, betas=(0.8, 0.7), weight_decay=0.05),
    "cosine": Recipe(lambda m: SGD(m.parameters(), lr=0.2, momentum=0.9), lambda o: CosineAnnealingLR(o, STEPS)),
    "one cycle": Recipe(lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9), lambda o: OneCycleLR(o, 0.3, STEPS + 1)),
    "one cycle adam": Recipe(lambda m: AdamW(m.parameters(), lr=0.1), lambda o: OneCycleLR(o, 0.1, STEPS + 1)),
    "groups": Recipe(lambda m: SGD(_groups(m), lr=0.1, momentum=0.9)),
    "groups adamw": Recipe(lambda m: AdamW(_groups(m), lr=0.02)),
    "groups nadam": Recipe(lambda m: NAdam(_groups(m), lr=0.02)),
    "groups rmsprop": Recipe(lambda m: RMSprop(_kinds(m), lr=0.02)),
    "mixed groups": Recipe(lambda m: SGD(_mixed(m), lr=0.1)),
    "clipped": Recipe(lambda m: SGD(m.parameters(), lr=0.3, momentum=0.9, weight_decay=0.05), clip=0.2),
    "clipped adam": Recipe(lambda m: Adam(m.parameters(), lr=0.05, eps=1e-3), clip=0.2),
    "frozen": Recipe(_frozen),
}
"""Every optimizer whose rule is known."""

ADAPTIVE = {"Adam": Adam, "AdamW": AdamW, "NAdam": NAdam, "RAdam": RAdam, "Adamax": Adamax, "RMSprop": RMSprop}
ADAPTIVE |= {"Adagrad": Adagrad}

VARIANTS = {
    **{
        f"maximize {kind.__name__}": replace(_by(kind, lr=0.05, weight_decay=0.1, maximize=True), loss=likelihood)
        for kind in (SGD, *ADAPTIVE.values())
    },
    **{f"foreach {kind.__name__}": _by(kind, lr=0.05, foreach=True) for kind in (SGD, *ADAPTIVE.values())},
    **{f"fused {kind.__name__}": _by(kind, lr=0.05, fused=True) for kind in (SGD, Adam, AdamW, Adagrad)},
}
"""The same rules by torch's other implementations, and turned around."""


# ------------------------------------------------------------------------------------------------------ loop features


def _first_half(model: nn.Module) -> list[nn.Parameter]:
    parameters = list(model.parameters())
    return parameters[: len(parameters) // 2]


def smoothed(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, label_smoothing=0.2)


def summed(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="sum")


def by_class(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean is over the weights of the classes in the batch."""
    return F.cross_entropy(logits, targets, weight=torch.tensor([0.5, 1.0, 3.0]))


def by_example(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    each = F.cross_entropy(logits, targets, reduction="none")
    return each.mean() if weights is None else (weights * each).sum() / weights.sum()


def noisy(x: Tensor) -> Tensor:
    """Mirrored half of the time, and a little noise."""
    x = x.flip(-1) if torch.rand(()) < 0.5 else x
    return (x + 0.1 * torch.randn(x.shape)).clamp(0, 1)


def _scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)


def _look(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    """Passes that nothing is learned from, one of them with gradients, and one that moves running statistics."""
    x = torch.rand(7, *SHAPES[type(next(model.children()))])
    model.eval()(x)
    with torch.no_grad():
        model.train()(x)


SHAPES: dict[type[nn.Module], tuple[int, ...]] = {nn.Linear: (4,), nn.Conv2d: (1, 5, 5)}


def _thaw(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    for parameter in _first_half(model):
        parameter.requires_grad_(step >= 4)


def _freeze_by_turns(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    for parameter in _first_half(model):
        parameter.requires_grad_(step % 4 < 2)


def _all_but_first(model: nn.Module) -> Optimizer:
    return AdamW(list(model.parameters())[1:], lr=0.05, weight_decay=0.1, eps=1e-3)


def _add_first(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    if step == 4:
        optimizer.add_param_group({"params": next(model.parameters()), "lr": 0.02})


def _momentum_by_turns(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    optimizer.param_groups[0]["momentum"] = 0.9 if step % 5 > 1 else 0.0


def _update_by_hand(average: nn.Module, model: nn.Module) -> None:
    """As many write it: the parameters run after the model's, the statistics are the model's."""
    with torch.no_grad():
        for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
            mean.mul_(0.8).add_(parameter, alpha=0.2)
        for held, buffer in zip(average.buffers(), model.buffers(), strict=True):
            held.copy_(buffer)


def _torch_update(average: nn.Module, model: nn.Module) -> None:
    assert isinstance(average, AveragedModel)
    average.update_parameters(model)


def _ema(model: nn.Module, buffers: bool = False) -> nn.Module:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=buffers)


def _slowly(update: int) -> float:
    return min(0.8, (1 + update) / (10 + update))


EMA = Averaging(_ema, _torch_update, lambda n: 0.8 if n else 0.0)
EMA_BUFFERS = replace(EMA, make=lambda m: _ema(m, buffers=True))
WARMED_UP = replace(
    EMA,
    make=lambda m: AveragedModel(m, avg_fn=lambda mean, new, n: mean.lerp(new, 1 - _slowly(int(n)))),
    keep=lambda n: _slowly(n) if n else 0.0,
)
SWA = Averaging(AveragedModel, _torch_update, lambda n: n / (n + 1), begin=5, every=2)
BY_HAND = Averaging(copy.deepcopy, _update_by_hand, lambda n: 0.8)

MOMENTUM = RECIPES["momentum l2"]
ADAMW = _by(AdamW, lr=0.05, weight_decay=0.1, eps=1e-3)
"""Rounding errors, which are all the gradient that a bias before batch normalization has, stay small under this eps."""

LOOPS = {
    "clip by value": replace(MOMENTUM, change=lambda m: clip_grad_value_(m.parameters(), 0.02)),
    "clip by value, adam": replace(ADAMW, change=lambda m: clip_grad_value_(m.parameters(), 0.02)),
    "clip by norm, then by value": replace(MOMENTUM, clip=0.3, change=lambda m: clip_grad_value_(m.parameters(), 0.05)),
    "clip some tensors": replace(MOMENTUM, change=lambda m: clip_grad_norm_(_first_half(m), 0.05)),
    "clip some tensors by value": replace(MOMENTUM, change=lambda m: clip_grad_value_(_first_half(m), 0.02)),
    "clip each tensor": replace(ADAMW, change=lambda m: [clip_grad_norm_(p, 0.05) for p in m.parameters()]),
    "accumulation": replace(MOMENTUM, passes=3),
    "accumulation, clipped": replace(ADAMW, passes=2, clip=0.1),
    "accumulation, incomplete": replace(MOMENTUM, passes=2, epochs=True),
    "summed": replace(_by(SGD, lr=0.03, momentum=0.9), loss=summed, passes=2, epochs=True),
    "label smoothing": replace(MOMENTUM, loss=smoothed),
    "class weights": replace(MOMENTUM, loss=by_class),
    "example weights": replace(MOMENTUM, loss=by_example, weighted=True),
    "example weights, accumulated": replace(ADAMW, loss=by_example, weighted=True, passes=2),
    "mixup": replace(MOMENTUM, mixup=True),
    "mixup, accumulated": replace(ADAMW, mixup=True, passes=2),
    "augmented": replace(MOMENTUM, augment=Augmentation(noisy)),
    "augmented, accumulated": replace(ADAMW, augment=Augmentation(noisy, seed=3), passes=2),
    "attacked": replace(MOMENTUM, attack="eval", told="before"),
    "attacked in training mode": replace(MOMENTUM, attack="train"),
    "attacked by backward": replace(MOMENTUM, attack="backward"),
    "attacked by backward, told before": replace(MOMENTUM, attack="backward", told="before"),
    "attacked, accumulated": replace(MOMENTUM, attack="train", passes=2),
    "scaler": replace(MOMENTUM, scaler=_scaler),
    "scaler, told before": replace(MOMENTUM, scaler=_scaler, told="before"),
    "scaler, clipped adam": replace(ADAMW, clip=0.1, scaler=_scaler),
    "scaler, accumulated": replace(MOMENTUM, scaler=_scaler, passes=2),
    "scaler, gradients kept at zero": replace(MOMENTUM, scaler=_scaler, keep_zeros=True),
    "scaler, fused": replace(_by(AdamW, lr=0.05, eps=1e-3, fused=True), scaler=_scaler, fused=True),
    "ema": replace(MOMENTUM, average=EMA),
    "ema of buffers": replace(ADAMW, average=EMA_BUFFERS),
    "ema by hand": replace(ADAMW, average=BY_HAND),
    "ema warmed up": replace(MOMENTUM, average=WARMED_UP),
    "swa": replace(MOMENTUM, average=SWA),
    "swa, statistics anew": replace(MOMENTUM, average=replace(SWA, refresh=True)),
    "fine-tuning": replace(ADAMW, tuned=True),
    "replacement": replace(MOMENTUM, replacement=True),
    "epochs": replace(MOMENTUM, epochs=True),
    "told before": replace(MOMENTUM, told="before"),
    "told before, accumulated": replace(MOMENTUM, told="before", passes=2),
    "closure": replace(MOMENTUM, closure=True),
    "closure, clipped": replace(ADAMW, closure=True, clip=0.1),
    "resting statistics": replace(MOMENTUM, resting=True),
    "gradients kept at zero": replace(MOMENTUM, keep_zeros=True),
    "gradients kept at zero, adam": replace(ADAMW, keep_zeros=True),
    "looked at between": replace(MOMENTUM, between=_look),
    "thawed": replace(ADAMW, between=_thaw),
    "frozen by turns": replace(_by(NAdam, lr=0.05, weight_decay=0.1, eps=1e-3), between=_freeze_by_turns),
    "frozen by turns, gradients kept at zero": replace(MOMENTUM, between=_freeze_by_turns, keep_zeros=True),
    "a group more": replace(ADAMW, optimizer=_all_but_first, between=_add_first),
    "momentum by turns": replace(RECIPES["dampening"], between=_momentum_by_turns),
    "resumed": replace(MOMENTUM, resume=5),
    "resumed adam": replace(ADAMW, schedule=RECIPES["one cycle adam"].schedule, resume=5),
    "resumed ema": replace(ADAMW, resume=5, average=EMA),
    "resumed scaler": replace(MOMENTUM, resume=5, scaler=_scaler),
}
"""What a training loop may do besides."""

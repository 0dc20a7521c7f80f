"""How an optimizer spends gradients: every supported step is linear in them, its observed scales given.

With the clipped gradient c_j g_j, L2 decay l_j and the buffer b_j, step j of every supported optimizer is

    b_j = beta_j b_{j-1} + gain_j (c_j g_j + l_j w_j)
    D_j = - scale_j (direct_j (c_j g_j + l_j w_j) + held_j b_j) - decoupled_j w_j

where direct = 0, held = 1, and with Nesterov's momentum direct = 1, held = beta. For SGD `scale` is the learning
rate and `gain` is 1 - dampening (1 in a buffer's first step, as in torch).
For Adam and AdamW `gain` is 1 - beta1 and `scale` is the preconditioner, lr / (1 - beta1^t) / (sqrt(v / (1 -
beta2^t)) + eps), one value a coordinate, taken as observed. L2 decay enters the gradient; decoupled decay
(AdamW) is lr times weight decay and acts directly.

Sources: Domingos 2020 (arXiv 2012.00152) for the identity; the optimizers as torch.optim documents them;
Kingma and Ba 2014 (arXiv 1412.6980); Loshchilov and Hutter 2017 (arXiv 1711.05101).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from brittle.errors import UnsupportedError

Coefficient = Tensor | float
"""A number, or one value a coordinate: shape (P,)."""

SETTINGS: dict[str, tuple[str, ...]] = {
    "SGD": ("momentum", "dampening", "nesterov", "weight_decay"),
    "Adam": ("betas", "eps", "weight_decay", "decoupled_weight_decay"),
    "AdamW": ("betas", "eps", "weight_decay"),
}
"""The supported optimizers and the settings, besides the learning rate, that their rule reads."""

BUFFERS: dict[str, tuple[str, ...]] = {
    "SGD": ("momentum_buffer",),
    "Adam": ("exp_avg", "exp_avg_sq"),
    "AdamW": ("exp_avg", "exp_avg_sq"),
}
"""The optimizer's own state, one vector each, that a snapshot must hold."""

REFUSED = ("amsgrad", "maximize", "differentiable")
"""Options that change the rule in a way not written above."""


@dataclass(frozen=True)
class StepRule:
    """The coefficients of one step; see the module's equations."""

    clip: float
    gain: Coefficient
    beta: Coefficient
    scale: Coefficient
    direct: Coefficient
    held: Coefficient
    l2: Coefficient
    decoupled: Coefficient


@dataclass(frozen=True)
class Recipe:
    """What was observed of one step: learning rates and settings by parameter group, clipping, count.

    `owner` (P,) gives the parameter group of each coordinate and -1 for coordinates that no optimizer moves.
    """

    optimizer: str
    owner: Tensor
    step: int
    lr: tuple[float, ...]
    settings: tuple[Mapping[str, Any], ...]
    clip: float
    dtype: torch.dtype = torch.float32

    def to(self, device: torch.device) -> Recipe:
        """The same recipe with its coefficients on a device."""
        return replace(self, owner=self.owner.to(device))

    def spread(self, values: Sequence[float], fill: float = 0.0) -> Coefficient:
        """One value a parameter group, laid out over the coordinates; `fill` where nothing moves."""
        if len(set(values)) == 1 and bool((self.owner >= 0).all()):
            return float(values[0])
        return torch.tensor([*values, fill], dtype=torch.float64, device=self.owner.device)[self.owner].to(self.dtype)


def check_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """The name of a supported optimizer that has not begun. Raises `UnsupportedError` that names what is not."""
    name = type(optimizer).__name__
    if name not in SETTINGS or type(optimizer).__module__.split(".")[0] != "torch":
        raise UnsupportedError(
            f"the optimizer must be one of torch's {', '.join(SETTINGS)}, found {name}; train with one of them, or "
            "audit the trained model without a path"
        )
    for group in optimizer.param_groups:
        for option in REFUSED:
            if group.get(option):
                raise UnsupportedError(f"{name} with {option}=True cannot be accounted for; train with {option}=False")
    if any(held for held in optimizer.state.values()):
        raise UnsupportedError(
            f"the path must begin with the optimizer's first step, this {name} holds buffers of earlier ones; make the "
            "Recorder before the training, or begin with a fresh optimizer"
        )
    return name


def step_rule(recipe: Recipe, second_moment: Tensor | None) -> StepRule:
    """The coefficients of a step. second_moment: (P,) Adam's `exp_avg_sq` *after* the step."""
    of = lambda key: [float(s[key]) for s in recipe.settings]  # noqa: E731
    decay, lr = of("weight_decay"), recipe.lr
    if recipe.optimizer == "SGD":
        gain = [1.0 if recipe.step == 0 or s["momentum"] == 0 else 1 - s["dampening"] for s in recipe.settings]
        nesterov = [bool(s["nesterov"]) for s in recipe.settings]
        return StepRule(
            clip=recipe.clip,
            gain=recipe.spread(gain),
            beta=recipe.spread(of("momentum")),
            scale=recipe.spread(lr),
            direct=recipe.spread([float(n) for n in nesterov]),
            held=recipe.spread([s["momentum"] if n else 1.0 for s, n in zip(recipe.settings, nesterov, strict=True)]),
            l2=recipe.spread(decay),
            decoupled=0.0,
        )
    assert second_moment is not None
    beta1, beta2 = ([float(s["betas"][i]) for s in recipe.settings] for i in (0, 1))
    t = recipe.step + 1
    root = (second_moment / recipe.spread([1 - b**t for b in beta2], fill=1.0)).sqrt()
    rate = recipe.spread([r / (1 - b**t) for r, b in zip(lr, beta1, strict=True)])
    decoupled = [recipe.optimizer == "AdamW" or bool(s.get("decoupled_weight_decay")) for s in recipe.settings]
    return StepRule(
        clip=recipe.clip,
        gain=recipe.spread([1 - b for b in beta1]),
        beta=recipe.spread(beta1),
        scale=rate / (root + recipe.spread(of("eps"), fill=1.0)),
        direct=0.0,
        held=1.0,
        l2=recipe.spread([0.0 if direct else d for d, direct in zip(decay, decoupled, strict=True)]),
        decoupled=recipe.spread([r * d if direct else 0.0 for r, d, direct in zip(lr, decay, decoupled, strict=True)]),
    )


def check_settings(first: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a momentum that is switched on or off in mid-training: torch then begins or rests a buffer."""
    for group, (old, new) in enumerate(zip(first, now, strict=True)):
        if "momentum" in new and (old["momentum"] == 0) != (new["momentum"] == 0):
            raise UnsupportedError(
                f"momentum may not be switched on or off in mid-training, it goes from {old['momentum']:g} to "
                f"{new['momentum']:g} in parameter group {group}; schedule it above 0, or keep it at 0"
            )


def advance(rule: StepRule, buffer: Tensor, gradient: Tensor, decayed: Tensor | None) -> tuple[Tensor, Tensor]:
    """One step: the new buffer and the displacement, both of `gradient`'s shape (..., P).

    `gradient` is not yet clipped; `decayed` are the weights that decay acts on, or None for the share of a
    group of examples, to which no decay is credited. Linear in (buffer, gradient, decayed): the
    displacements of the groups and of the decay add up to the step's.
    """
    spent = scaled(rule.clip, gradient)
    if decayed is not None:
        spent = spent + rule.l2 * decayed
    buffer = scaled(rule.beta, buffer) + scaled(rule.gain, spent)
    moved = scaled(rule.held, buffer)
    if not absent(rule.direct):
        moved = moved + rule.direct * spent
    moved = -rule.scale * moved
    if decayed is not None:
        moved = moved - rule.decoupled * decayed
    return buffer, moved


def pull_back(rule: StepRule, later: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the walk backwards: the transpose of `advance`.

    later: (M, P), the sensitivity of the output to this step's buffer through all later steps; jacobian: (M, P),
    the output's gradient over this step. Returns (credit, earlier): a gradient g_j changed the output by
    -<credit, clip g_j + l2 w_j>, and `earlier` is the sensitivity to the previous step's buffer.
    """
    buffer = plus(later, rule.scale * rule.held, jacobian)
    credit = scaled(rule.gain, buffer)
    if not absent(rule.direct):
        credit = plus(credit, rule.scale * rule.direct, jacobian)
    return credit, scaled(rule.beta, buffer)


def plus(values: Tensor, by: Coefficient, more: Tensor) -> Tensor:
    """values + by * more, in one pass over them. values, more: (M, P)."""
    return torch.addcmul(values, by, more) if isinstance(by, Tensor) else torch.add(values, more, alpha=by)


def scaled(by: Coefficient, values: Tensor) -> Tensor:
    """`by` times `values`, without a pass over them where that changes nothing."""
    return values if isinstance(by, float) and by == 1 else by * values


def absent(coefficient: Coefficient) -> bool:
    """Whether a coefficient is zero everywhere."""
    return isinstance(coefficient, float) and coefficient == 0

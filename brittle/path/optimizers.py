"""The coefficients of `rules` for each of torch's optimizers, as their pages in torch.optim define them.

    SGD                    scale = lr, gain = 1 - dampening (1 in a buffer's first step)
                           Nesterov: direct = 1, held = beta
    Adam, AdamW, AMSGrad   gain = 1 - beta1, scale = lr / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
    NAdam                  the same v; with M the product of mu_1 ... mu_t
                           direct = (1 - mu_t) / (1 - M), held = mu_{t+1} / (1 - M mu_{t+1})
    RAdam                  scale = lr / (1 - beta1^t), once rho_t > 5 times rect sqrt(1 - beta2^t) / (sqrt(v) + eps)
    Adamax                 scale = lr / (1 - beta1^t) / u
    RMSprop                gain = 1 / (sqrt(v) + eps), or sqrt(v - m^2) where centered: before the momentum; scale = lr
    Adagrad                scale = lr / (1 + (t - 1) lr_decay) / (sqrt(sum) + eps)

v, m, u and sum are what the optimizer holds *after* the step, taken as observed; t counts the updates of each tensor.
L2 decay enters the gradient, decoupled decay acts directly. `maximize` turns the gradient's sign.

Any other optimizer is *observed*: with b_j = beta b_{j-1} + c_j g_j, each tensor's displacement is projected on b_j,
and what is left of it goes to the ledger's row `unexplained`.

Sources: Kingma and Ba 2014 (arXiv 1412.6980); Reddi et al. 2018 (AMSGrad, arXiv 1904.09237); Loshchilov and Hutter
2017 (arXiv 1711.05101); Dozat 2016 (NAdam); Liu et al. 2019 (RAdam, arXiv 1908.03265); Duchi et al. 2011 (Adagrad).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from brittle.errors import UnsupportedError
from brittle.path.recipe import OBSERVED, Recipe
from brittle.path.rules import StepRule

Moments = Mapping[str, Tensor]
"""What an optimizer holds after a step, each (P,)."""

MOMENTS: dict[str, tuple[str, ...]] = {
    "SGD": (),
    "Adam": ("exp_avg_sq", "max_exp_avg_sq"),
    "AdamW": ("exp_avg_sq", "max_exp_avg_sq"),
    "NAdam": ("exp_avg_sq",),
    "RAdam": ("exp_avg_sq",),
    "Adamax": ("exp_inf",),
    "RMSprop": ("square_avg", "grad_avg"),
    "Adagrad": ("sum",),
}
"""The optimizers whose rule is known, and what it reads of the state after the step."""

REFUSED = ("LBFGS", "SparseAdam")
"""Optimizers that evaluate the loss more than once a step, or whose gradients are sparse."""

MULTIPLIED = "mu_product"
"""NAdam's running product, the one scalar of torch's optimizers besides the count."""


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """The name of an optimizer whose rule is known, or `observed`. Raises `UnsupportedError` for those refused."""
    name = type(optimizer).__name__
    if name in REFUSED:
        raise UnsupportedError(
            f"{name} cannot be recorded: it takes the loss several times a step, or sparse gradients; train with "
            "another optimizer, or audit the trained model without a path"
        )
    known = name in MOMENTS and type(optimizer).__module__.split(".")[0] == "torch"
    return name if known and not any(g.get("differentiable") for g in optimizer.param_groups) else OBSERVED


def step_rule(recipe: Recipe, moments: Moments) -> StepRule:
    """The coefficients of a step. moments: what the optimizer holds *after* it."""
    clip = recipe.where_held(recipe.sign * recipe.factors, rest=1.0)
    return replace(_RULES[recipe.optimizer](recipe, moments), clip=clip)


def _sgd(r: Recipe, _: Moments) -> StepRule:
    """Without momentum the buffer rests; in its first step, and where it was thrown away, it is the gradient."""
    momentum, nesterov = r.of("momentum"), r.flag("nesterov")
    with_buffer, begun = momentum != 0, r.extra > 0
    gain, beta = torch.where(begun, 1 - r.of("dampening"), 1.0), torch.where(begun, momentum, 0.0)
    return StepRule(
        clip=1.0,
        gain=r.where_held(torch.where(with_buffer, gain, 0.0), rest=0.0),
        beta=r.where_held(torch.where(with_buffer, beta, 1.0), rest=1.0),
        scale=r.over(r.rate, rest=0.0),
        direct=r.where_held((nesterov | ~with_buffer).double(), rest=0.0),
        held=r.where_held(torch.where(nesterov | ~with_buffer, momentum, 1.0), rest=1.0),
        l2=r.where_held(r.of("weight_decay"), rest=0.0),
        decoupled=0.0,
    )


def _adam(r: Recipe, moments: Moments) -> StepRule:
    return _adaptive(r, scale=r.over(r.rate / (1 - r.beta(0) ** r.t), rest=0.0) / _root(r, _second(r, moments)))


def _nadam(r: Recipe, moments: Moments) -> StepRule:
    mu, following = (r.beta(0) * (1 - 0.5 * 0.96 ** ((r.t + k) * r.of("momentum_decay"))) for k in (0, 1))
    return replace(
        _adaptive(r, scale=r.over(r.rate, rest=0.0) / _root(r, moments["exp_avg_sq"])),
        direct=r.where_held((1 - mu) / (1 - r.extra), rest=0.0),
        held=r.where_held(following / (1 - r.extra * following), rest=0.0),
    )


def _radam(r: Recipe, moments: Moments) -> StepRule:
    beta2, rate = r.beta(1), r.rate / (1 - r.beta(0) ** r.t)
    most = 2 / (1 - beta2) - 1
    rho = most - 2 * r.t * beta2**r.t / (1 - beta2**r.t)
    rect = ((rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho)).clamp_min(0).sqrt()
    late = rho > 5
    divided = r.over(torch.where(late, rate * rect * (1 - beta2**r.t).sqrt(), 0.0), rest=0.0)
    plain = r.over(torch.where(late, 0.0, rate), rest=0.0)
    return _adaptive(r, scale=divided / (moments["exp_avg_sq"].sqrt() + r.over(r.of("eps"), rest=1.0)) + plain)


def _adamax(r: Recipe, moments: Moments) -> StepRule:
    largest = moments["exp_inf"]
    rate = r.over(r.rate / (1 - r.beta(0) ** r.t), rest=0.0)
    return _adaptive(r, scale=rate / torch.where(largest > 0, largest, 1.0))


def _adaptive(r: Recipe, scale: Tensor) -> StepRule:
    """What Adam and its kin share: an averaged gradient, two kinds of decay."""
    decay = r.of("weight_decay")
    decoupled = torch.full_like(decay, r.optimizer == "AdamW").bool() | r.flag("decoupled_weight_decay")
    return StepRule(
        clip=1.0,
        gain=r.where_held(1 - r.beta(0), rest=0.0),
        beta=r.where_held(r.beta(0), rest=1.0),
        scale=scale,
        direct=0.0,
        held=1.0,
        l2=r.where_held(torch.where(decoupled, 0.0, decay), rest=0.0),
        decoupled=r.over(torch.where(decoupled, r.rate * decay, 0.0), rest=0.0),
    )


def _rmsprop(r: Recipe, moments: Moments) -> StepRule:
    square = moments["square_avg"]
    if "grad_avg" in moments:
        square = square - moments["grad_avg"] ** 2  # 0 for tensors whose group is not centered
    divisor = square.sqrt() + r.over(r.of("eps"), rest=1.0)
    return StepRule(
        clip=1.0,
        gain=r.over(torch.ones_like(r.rate), rest=0.0) / divisor,
        beta=r.where_held(r.of("momentum"), rest=1.0),
        scale=r.over(r.rate, rest=0.0),
        direct=0.0,
        held=1.0,
        l2=r.where_held(r.of("weight_decay"), rest=0.0),
        decoupled=0.0,
    )


def _adagrad(r: Recipe, moments: Moments) -> StepRule:
    rate = r.over(r.rate / (1 + (r.t - 1) * r.of("lr_decay")), rest=0.0)
    return StepRule(
        clip=1.0,
        gain=1.0,
        beta=0.0,
        scale=rate / (moments["sum"].sqrt() + r.over(r.of("eps"), rest=1.0)),
        direct=0.0,
        held=1.0,
        l2=r.where_held(r.of("weight_decay"), rest=0.0),
        decoupled=0.0,
    )


def _observed(r: Recipe, _: Moments) -> StepRule:
    return StepRule(
        clip=1.0,
        gain=r.where_held(torch.ones_like(r.rate), rest=0.0),
        beta=r.where_held(r.momentum(), rest=1.0),
        scale=r.over(r.extra, rest=0.0),
        direct=0.0,
        held=1.0,
        l2=0.0,
        decoupled=0.0,
    )


def _second(r: Recipe, moments: Moments) -> Tensor:
    """Adam's second moment, AMSGrad's largest one where it is asked for. (P,)."""
    if "max_exp_avg_sq" not in moments:
        return moments["exp_avg_sq"]
    largest = r.over(r.flag("amsgrad").double(), rest=0.0)
    return torch.where(torch.as_tensor(largest) > 0, moments["max_exp_avg_sq"], moments["exp_avg_sq"])


def _root(r: Recipe, second: Tensor) -> Tensor:
    """sqrt(v / (1 - beta2^t)) + eps, 1 at least where a tensor rests. (P,)."""
    return (second / r.over(1 - r.beta(1) ** r.t, rest=1.0)).sqrt() + r.over(r.of("eps"), rest=1.0)


_RULES: dict[str, Callable[[Recipe, Moments], StepRule]] = {
    "SGD": _sgd,
    "Adam": _adam,
    "AdamW": _adam,
    "NAdam": _nadam,
    "RAdam": _radam,
    "Adamax": _adamax,
    "RMSprop": _rmsprop,
    "Adagrad": _adagrad,
    OBSERVED: _observed,
}

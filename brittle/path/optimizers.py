"""The coefficients of `rules` for each of torch's optimizers, as their pages in torch.optim define them.

    SGD                    scale = lr, gain = 1 - dampening (1 in a buffer's first step); Nesterov: direct = 1, held = beta
    Adam, AdamW, AMSGrad   gain = 1 - beta1, scale = lr / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
    NAdam                  the same v; direct = lr (1 - mu_t) / (1 - prod mu), held = lr mu_{t+1} / (1 - prod mu mu_{t+1})
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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from brittle.errors import UnsupportedError
from brittle.path.rules import Coefficient, StepRule

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

OBSERVED = "observed"
"""In place of an optimizer's name: its steps are projected on the gradients."""

REFUSED = ("LBFGS", "SparseAdam")
"""Optimizers that evaluate the loss more than once a step, or whose gradients are sparse."""

MULTIPLIED = "mu_product"
"""NAdam's running product, the one scalar of torch's optimizers besides the count."""


@dataclass(frozen=True)
class Recipe:
    """What was observed of one step, tensor by tensor (n of them): where its coefficients come from.

    owner: the parameter group that moves each tensor, -1 for none; counts: its updates before this step, -1 where
    it rests in this step; factors: what happened to its gradient between backward and step; extra: NAdam's
    `mu_product` after the step, or the projected scale of an observed optimizer.
    """

    optimizer: str
    sizes: Tensor  # shape: (n,) int64, adding up to P
    owner: Tensor  # shape: (n,) int64
    counts: Tensor  # shape: (n,) int64
    factors: Tensor  # shape: (n,) float64
    extra: Tensor  # shape: (n,) float64
    lr: tuple[float, ...]
    settings: tuple[Mapping[str, Any], ...]
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    def to(self, device: torch.device) -> Recipe:
        """The same recipe with its coefficients on a device."""
        return replace(self, device=device)

    @property
    def active(self) -> Tensor:
        """The tensors that this step moves, (n,) bool."""
        return self.counts >= 0

    @property
    def rate(self) -> Tensor:
        """The learning rate of each tensor, (n,)."""
        return self._by_tensor(self.lr)

    @property
    def t(self) -> Tensor:
        """The number of this update of each tensor, counted from 1; 1 where it rests. (n,)."""
        return (self.counts + 1).clamp_min(1).double()

    @property
    def sign(self) -> Tensor:
        """-1 for tensors whose group maximizes, (n,)."""
        return torch.where(self.flag("maximize"), -1.0, 1.0)

    def of(self, key: str, default: float = 0.0) -> Tensor:
        """A setting of each tensor, (n,)."""
        return self._by_tensor([float(s.get(key) or default) for s in self.settings])

    def beta(self, which: int) -> Tensor:
        """One of the two betas of each tensor, (n,)."""
        return self._by_tensor([float(s["betas"][which]) for s in self.settings])

    def flag(self, key: str) -> Tensor:
        """A yes-or-no setting of each tensor, (n,) bool."""
        return self._by_tensor([float(bool(s.get(key))) for s in self.settings]) > 0

    def over(self, values: Tensor, rest: float) -> Coefficient:
        """Values (n,) laid out over the coordinates, `rest` for tensors that rest. Shape (P,), or one number."""
        return self._laid_out(torch.where(self.active, values.double(), rest))

    def where_held(self, values: Tensor, rest: float) -> Coefficient:
        """As `over`, for coefficients that do not matter where no optimizer ever moves a tensor."""
        values = torch.where(self.active, values.double(), rest)
        moved = (self.owner >= 0).nonzero()
        return self._laid_out(torch.where(self.owner >= 0, values, values[moved[0, 0]]) if len(moved) else values)

    def momentum(self) -> Tensor:
        """The momentum of each tensor under an optimizer whose rule is not known, by its settings' names. (n,)."""
        named = [s.get("momentum", (s.get("betas") or [0.0])[0]) for s in self.settings]
        return self._by_tensor([float(m or 0.0) for m in named])

    def _by_tensor(self, by_group: Sequence[float]) -> Tensor:
        return torch.tensor([*by_group, 0.0], dtype=torch.float64)[self.owner]

    def _laid_out(self, values: Tensor) -> Coefficient:
        counting = values[self.sizes > 0]
        if bool((counting == counting[:1]).all()):
            return float(counting[0])
        return values.to(self.dtype).repeat_interleave(self.sizes).to(self.device)


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """The name of an optimizer whose rule is known, or `observed`. Raises `UnsupportedError` for those refused."""
    name = type(optimizer).__name__
    if name in REFUSED:
        raise UnsupportedError(
            f"{name} cannot be recorded: it takes the loss several times a step, or sparse gradients; train with another "
            "optimizer, or audit the trained model without a path"
        )
    known = name in MOMENTS and type(optimizer).__module__.split(".")[0] == "torch"
    return name if known and not any(g.get("differentiable") for g in optimizer.param_groups) else OBSERVED


def step_rule(recipe: Recipe, moments: Moments) -> StepRule:
    """The coefficients of a step. moments: what the optimizer holds *after* it."""
    clip = recipe.where_held(recipe.sign * recipe.factors, rest=1.0)
    return replace(_RULES[recipe.optimizer](recipe, moments), clip=clip)


def _sgd(r: Recipe, _: Moments) -> StepRule:
    momentum, nesterov = r.of("momentum"), r.flag("nesterov")
    begun = (r.counts > 0) & (momentum != 0)
    return StepRule(
        clip=1.0,
        gain=r.where_held(torch.where(begun, 1 - r.of("dampening"), 1.0), rest=0.0),
        beta=r.where_held(momentum, rest=1.0),
        scale=r.over(r.rate, rest=0.0),
        direct=r.where_held(nesterov.double(), rest=0.0),
        held=r.where_held(torch.where(nesterov, momentum, 1.0), rest=1.0),
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

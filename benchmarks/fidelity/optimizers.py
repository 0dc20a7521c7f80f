"""The optimizers of the cases: torch's, in all their variants, and one that a user wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

Make = Callable[[nn.Module], Optimizer]


def of(kind: Callable[..., Optimizer], **settings: Any) -> Make:
    """One parameter group: every parameter, frozen ones included."""
    return lambda model: kind(model.parameters(), **settings)


def in_groups(kind: Callable[..., Optimizer], *settings: dict[str, Any], **common: Any) -> Make:
    """The parameters dealt out in turn to as many groups as there are settings."""

    def make(model: nn.Module) -> Optimizer:
        parameters = list(model.parameters())
        groups = [{"params": parameters[k :: len(settings)], **own} for k, own in enumerate(settings)]
        return kind(groups, **common)

    return make


def by_kind(kind: Callable[..., Optimizer], **settings: Any) -> Make:
    """No decay on biases and normalizations, as most recipes have it."""

    def make(model: nn.Module) -> Optimizer:
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() <= 1]
        return kind([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], **settings)

    return make


def without_first(kind: Callable[..., Optimizer], **settings: Any) -> Make:
    """The first tensor asks for no gradient, and nobody trains the last one."""

    def make(model: nn.Module) -> Optimizer:
        parameters = list(model.parameters())
        parameters[0].requires_grad_(False)
        return kind(parameters[:-1], **settings)

    return make


class Lion(Optimizer):
    """Chen et al., "Symbolic Discovery of Optimization Algorithms" (2023), arXiv 2302.06675: steps by sign."""

    def __init__(self, parameters: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.sub_(group["lr"] * torch.lerp(p.grad, mean, beta1).sign())
                mean.lerp_(p.grad, 1 - beta2)

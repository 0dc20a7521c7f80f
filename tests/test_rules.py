"""The rule of every optimizer: as torch takes the step, linear in what it is given, and transposed by the walk back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import float64 as float64
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from brittle.errors import UnsupportedError
from brittle.path.rules import (
    SETTINGS,
    Recipe,
    StepRule,
    advance,
    check_optimizer,
    check_settings,
    pull_back,
    step_rule,
)

SIZES, STEPS = (3, 4, 2), 6
OWNER = torch.tensor([0] * 3 + [1] * 4 + [-1] * 2)

OPTIMIZERS: dict[str, tuple[type[Optimizer], list[dict[str, Any]]]] = {
    "plain": (SGD, [{"lr": 0.1}, {"lr": 0.3}]),
    "momentum": (SGD, [{"lr": 0.1, "momentum": 0.9}, {"lr": 0.3, "momentum": 0.5}]),
    "dampening": (SGD, [{"lr": 0.1, "momentum": 0.9, "dampening": 0.3}, {"lr": 0.1}]),
    "nesterov": (SGD, [{"lr": 0.1, "momentum": 0.9, "nesterov": True}, {"lr": 0.2, "momentum": 0.7}]),
    "l2": (SGD, [{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}, {"lr": 0.1, "weight_decay": 0.1}]),
    "adam": (Adam, [{"lr": 0.1}, {"lr": 0.2, "betas": (0.5, 0.9)}]),
    "adam l2": (Adam, [{"lr": 0.1, "weight_decay": 0.3}, {"lr": 0.2, "eps": 0.1}]),
    "adam decoupled": (Adam, [{"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True}, {"lr": 0.2}]),
    "adamw": (AdamW, [{"lr": 0.1, "weight_decay": 0.3}, {"lr": 0.2, "weight_decay": 0.0, "betas": (0.0, 0.5)}]),
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def taken(kind: str, clip: float = 1.0) -> tuple[list[Tensor], list[Tensor], list[StepRule]]:
    """Torch's own weights under random gradients, those gradients before clipping, and the rules of the steps."""
    make, groups = OPTIMIZERS[kind]
    parts = [nn.Parameter(p.clone()) for p in random(sum(SIZES), seed=1).split(SIZES)]
    optimizer = make([{"params": [p], **g} for p, g in zip(parts[:2], groups, strict=True)])
    gradients = [random(sum(SIZES), seed=10 + s) for s in range(STEPS)]
    weights, rules, moment = [torch.cat(list(parts)).detach()], [], torch.zeros(sum(SIZES))
    for s, gradient in enumerate(gradients):
        for part, g in zip(parts, gradient.split(SIZES), strict=True):
            part.grad = clip * g
        settings = [{k: g[k] for k in SETTINGS[make.__name__] if k in g} for g in optimizer.param_groups]
        lr = tuple(g["lr"] for g in optimizer.param_groups)
        recipe = Recipe(make.__name__, OWNER, s, lr, tuple(settings), clip, torch.float64)
        optimizer.step()
        if make is not SGD:
            held = torch.cat([optimizer.state[p]["exp_avg_sq"] for p in parts[:2]])
            moment = torch.cat([held, torch.zeros(SIZES[2])])
        rules.append(step_rule(recipe, moment if make is not SGD else None))
        weights.append(torch.cat(list(parts)).detach())
    return weights, gradients, rules


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("clip", [1.0, 0.3])
def test_the_rule_moves_weights_as_torch_does(kind: str, clip: float) -> None:
    weights, gradients, rules = taken(kind, clip)
    buffer = torch.zeros(sum(SIZES))
    for s, (gradient, rule) in enumerate(zip(gradients, rules, strict=True)):
        buffer, moved = advance(rule, buffer, gradient, weights[s])
        assert torch.allclose(weights[s] + moved, weights[s + 1], atol=1e-12)
    assert torch.equal(weights[-1][-2:], weights[0][-2:]), "what no optimizer owns does not move"


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_shares_of_examples_and_decay_add_up_to_the_step(kind: str) -> None:
    weights, gradients, rules = taken(kind)
    shares = torch.tensor([0.7, -0.5, 0.8])[:, None]  # of three examples, adding up to 1
    buffers, decay = torch.zeros(3, sum(SIZES)), torch.zeros(sum(SIZES))
    for s, (gradient, rule) in enumerate(zip(gradients, rules, strict=True)):
        buffers, moved = advance(rule, buffers, shares * gradient, None)
        decay, decayed = advance(rule, decay, torch.zeros_like(gradient), weights[s])
        assert torch.allclose(moved.sum(0) + decayed, weights[s + 1] - weights[s], atol=1e-12)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_walk_back_is_the_transpose_of_the_walk_forward(kind: str) -> None:
    """sum_s <J_s, D_s> = - sum_s <credit_s, c g_s + l2 w_s> - sum_s <J_s, decoupled w_s>, for any J."""
    weights, gradients, rules = taken(kind, clip=0.3)
    jacobians = [random(2, sum(SIZES), seed=50 + s) for s in range(STEPS)]
    forward = sum(j @ (weights[s + 1] - weights[s]) for s, j in enumerate(jacobians))
    later, back = torch.zeros(2, sum(SIZES)), torch.zeros(2)
    for s in reversed(range(STEPS)):
        credit, later = pull_back(rules[s], later, jacobians[s])
        back -= credit @ (rules[s].clip * gradients[s] + rules[s].l2 * weights[s])
        back -= jacobians[s] @ (rules[s].decoupled * weights[s])
    assert torch.allclose(back, forward, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda p: torch.optim.RMSprop(p), "found RMSprop"),
        (lambda p: torch.optim.Adagrad(p), "found Adagrad"),
        (lambda p: torch.optim.NAdam(p), "found NAdam"),
        (lambda p: torch.optim.LBFGS(p), "found LBFGS"),
        (lambda p: Adam(p, amsgrad=True), "Adam with amsgrad=True"),
        (lambda p: AdamW(p, amsgrad=True), "AdamW with amsgrad=True"),
        (lambda p: SGD(p, lr=0.1, maximize=True), "SGD with maximize=True"),
        (lambda p: Adam(p, maximize=True), "Adam with maximize=True"),
        (lambda p: type("SGD", (SGD,), {"__module__": "mine"})(p, lr=0.1), "one of torch's SGD, Adam, AdamW"),
    ],
)
def test_other_optimizers_are_refused_by_name(make: Callable[[Any], Optimizer], found: str) -> None:
    with pytest.raises(UnsupportedError, match=found):
        check_optimizer(make([nn.Parameter(torch.ones(2))]))


def test_an_optimizer_that_has_begun_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = SGD([weight], lr=0.1, momentum=0.9)
    assert check_optimizer(optimizer) == "SGD"
    weight.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(UnsupportedError, match="first step, this SGD holds buffers of earlier ones"):
        check_optimizer(optimizer)


def test_momentum_may_be_scheduled_but_not_switched() -> None:
    check_settings([{"momentum": 0.9}], [{"momentum": 0.5}])
    check_settings([{"betas": (0.9, 0.99)}], [{"betas": (0.0, 0.99)}])
    for before, after in ((0.0, 0.9), (0.9, 0.0)):
        with pytest.raises(UnsupportedError, match=f"from {before:g} to {after:g} in parameter group 1"):
            check_settings([{"momentum": 0.9}, {"momentum": before}], [{"momentum": 0.5}, {"momentum": after}])

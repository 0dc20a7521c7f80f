"""The rule of every optimizer: as torch takes the step, linear in what it is given, and transposed by the walk back."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from cases import float64 as float64
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from brittle.errors import UnsupportedError
from brittle.path.changes import Changes
from brittle.path.flat import layout
from brittle.path.optimizers import MOMENTS, kind_of, step_rule
from brittle.path.recipe import OBSERVED, Recipe
from brittle.path.rules import StepRule, advance, pull_back
from brittle.path.spending import Spending

SIZES, STEPS = (3, 4, 2, 5, 2), 9
RESTING = {0: {1}, 2: {0}, 3: {1, 2}, 4: {2}, 6: {3}, 7: {0, 1, 2}}
"""Which tensors have no gradient in which steps; the last tensor belongs to no optimizer."""

Groups = list[dict[str, Any]]

KINDS: dict[str, tuple[type[Optimizer], Groups]] = {
    "plain": (SGD, [{"lr": 0.1}, {"lr": 0.3}]),
    "momentum": (SGD, [{"lr": 0.1, "momentum": 0.9}, {"lr": 0.3, "momentum": 0.5}]),
    "dampening": (SGD, [{"lr": 0.1, "momentum": 0.9, "dampening": 0.3}, {"lr": 0.1}]),
    "nesterov": (SGD, [{"lr": 0.1, "momentum": 0.9, "nesterov": True}, {"lr": 0.2, "momentum": 0.7}]),
    "l2": (SGD, [{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}, {"lr": 0.1, "weight_decay": 0.1}]),
    "adam": (Adam, [{"lr": 0.1}, {"lr": 0.2, "betas": (0.5, 0.9)}]),
    "adam l2": (Adam, [{"lr": 0.1, "weight_decay": 0.3}, {"lr": 0.2, "eps": 0.1}]),
    "adam decoupled": (Adam, [{"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True}, {"lr": 0.2}]),
    "adamw": (AdamW, [{"lr": 0.1, "weight_decay": 0.3}, {"lr": 0.2, "weight_decay": 0.0, "betas": (0.0, 0.5)}]),
    "amsgrad": (Adam, [{"lr": 0.1, "amsgrad": True, "betas": (0.9, 0.3)}, {"lr": 0.2}]),
    "adamw amsgrad": (AdamW, [{"lr": 0.1, "betas": (0.9, 0.3), "amsgrad": True, "weight_decay": 0.3}, {"lr": 0.2}]),
    "nadam": (NAdam, [{"lr": 0.1}, {"lr": 0.2, "betas": (0.5, 0.9), "momentum_decay": 0.3}]),
    "nadam l2": (NAdam, [{"lr": 0.1, "weight_decay": 0.3}, {"lr": 0.2, "eps": 0.1, "momentum_decay": 0.0}]),
    "nadam decoupled": (NAdam, [{"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True}, {"lr": 0.2}]),
    "radam": (RAdam, [{"lr": 0.1}, {"lr": 0.2, "betas": (0.5, 0.6)}]),
    "radam l2": (RAdam, [{"lr": 0.1, "weight_decay": 0.3, "betas": (0.9, 0.7)}, {"lr": 0.2, "eps": 0.1}]),
    "radam decoupled": (RAdam, [{"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True}, {"lr": 0.2}]),
    "adamax": (Adamax, [{"lr": 0.1}, {"lr": 0.2, "betas": (0.5, 0.6), "weight_decay": 0.2}]),
    "rmsprop": (RMSprop, [{"lr": 0.1}, {"lr": 0.02, "alpha": 0.5, "weight_decay": 0.2}]),
    "rmsprop momentum": (RMSprop, [{"lr": 0.1, "momentum": 0.9}, {"lr": 0.02, "momentum": 0.5, "weight_decay": 0.2}]),
    "rmsprop centered": (RMSprop, [{"lr": 0.1, "centered": True, "momentum": 0.5}, {"lr": 0.02, "eps": 0.1}]),
    "adagrad": (Adagrad, [{"lr": 0.1}, {"lr": 0.2, "lr_decay": 0.5}]),
    "adagrad l2": (Adagrad, [{"lr": 0.1, "initial_accumulator_value": 0.3}, {"lr": 0.2, "weight_decay": 0.3}]),
}
EVERY = [SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad]
TWO = [{"lr": 0.1, "weight_decay": 0.1}, {"lr": 0.2}]
KINDS |= {f"maximize {k.__name__}": (k, [{**TWO[0], "maximize": True}, TWO[1]]) for k in EVERY}
KINDS |= {f"foreach {k.__name__}": (k, [{**g, "foreach": True} for g in TWO]) for k in EVERY}
KINDS |= {f"fused {k.__name__}": (k, [{**g, "fused": True} for g in TWO]) for k in (SGD, Adam, AdamW, Adagrad)}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Change = Callable[[int, Optimizer], None]


def taken(
    make: type[Optimizer], groups: Groups, clip: float = 1.0, change: Change = lambda step, optimizer: None
) -> tuple[list[Tensor], list[Tensor], list[StepRule]]:
    """Torch's own weights under random gradients, those gradients before clipping, and the rules of the steps."""
    parts = nn.ParameterList([p.clone() for p in random(sum(SIZES), seed=1).split(SIZES)])
    members = [[parts[0]], [parts[1], parts[2], parts[3]]]
    optimizer = make([{"params": ps, **g} for ps, g in zip(members, groups, strict=True)])
    spending = Spending(optimizer, layout(parts), dict(parts.named_parameters()))
    weights, gradients, rules = [torch.cat(list(parts)).detach()], [], []
    for s in range(STEPS):
        change(s, optimizer)
        split = list(random(sum(SIZES), seed=10 + s).split(SIZES))
        for k, part in enumerate(parts):
            rests = k in RESTING.get(s, ()) or k == len(SIZES) - 1
            split[k] = torch.zeros_like(split[k]) if rests else split[k]
            part.grad = None if rests else clip * split[k]
        changes = Changes({str(k): clip for k, part in enumerate(parts) if part.grad is not None}, {})
        counts, factors, _ = spending.begin(changes)
        lr, settings, owner = spending.lr(), spending.settings(), torch.tensor(spending.owner())
        optimizer.step()
        recipe = Recipe(
            spending.kind, torch.tensor(SIZES), owner, counts, factors, spending.end(), lr, settings, torch.float64
        )
        rules.append(step_rule(recipe, moments(optimizer, parts)))
        gradients.append(torch.cat(split))
        weights.append(torch.cat(list(parts)).detach())
    return weights, gradients, rules


def moments(optimizer: Optimizer, parts: nn.ParameterList) -> dict[str, Tensor]:
    """What the rule reads of the optimizer's state, 0 where it holds nothing."""
    held = [optimizer.state.get(p, {}) for p in parts]
    names = [name for name in MOMENTS[type(optimizer).__name__] if any(name in h for h in held)]
    return {n: torch.cat([h.get(n, torch.zeros_like(p)) for h, p in zip(held, parts, strict=True)]) for n in names}


@cache
def known(kind: str, clip: float = 1.0) -> tuple[list[Tensor], list[Tensor], list[StepRule]]:
    return taken(*KINDS[kind], clip)


def assert_moves(weights: list[Tensor], gradients: list[Tensor], rules: list[StepRule]) -> None:
    buffer = torch.zeros(sum(SIZES))
    for s, (gradient, rule) in enumerate(zip(gradients, rules, strict=True)):
        buffer, moved = advance(rule, buffer, gradient, weights[s])
        assert torch.allclose(weights[s] + moved, weights[s + 1], atol=1e-12), s


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [1.0, 0.3])
def test_the_rule_moves_weights_as_torch_does(kind: str, clip: float) -> None:
    weights, gradients, rules = known(kind, clip)
    assert_moves(weights, gradients, rules)
    assert torch.equal(weights[-1][-2:], weights[0][-2:]), "what no optimizer owns does not move"
    assert (weights[-1][:-2] - weights[0][:-2]).abs().min() > 1e-4, "all the rest does"


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_without_a_gradient_rests(kind: str) -> None:
    """It is not moved, and neither are its buffer nor its decay, by the rule as little as by torch."""
    weights, _, rules = known(kind)
    first = 0
    for k, size in enumerate(SIZES[:-1]):
        own = slice(first, first := first + size)
        for s in (s for s, resting in RESTING.items() if k in resting):
            assert torch.equal(weights[s + 1][own], weights[s][own])
            buffer, moved = advance(rules[s], torch.ones(sum(SIZES)), torch.zeros(sum(SIZES)), weights[s])
            assert (moved[own] == 0).all()
            if not (isinstance(rules[s].beta, float) and rules[s].beta == 0):
                assert (buffer[own] == 1).all(), "an optimizer without a buffer may forget it"


@pytest.mark.parametrize("kind", KINDS)
def test_the_shares_of_examples_and_decay_add_up_to_the_step(kind: str) -> None:
    weights, gradients, rules = known(kind)
    shares = torch.tensor([0.7, -0.5, 0.8])[:, None]  # of three examples, adding up to 1
    buffers, decay = torch.zeros(3, sum(SIZES)), torch.zeros(sum(SIZES))
    for s, (gradient, rule) in enumerate(zip(gradients, rules, strict=True)):
        buffers, moved = advance(rule, buffers, shares * gradient, None)
        decay, decayed = advance(rule, decay, torch.zeros_like(gradient), weights[s])
        assert torch.allclose(moved.sum(0) + decayed, weights[s + 1] - weights[s], atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_walk_back_is_the_transpose_of_the_walk_forward(kind: str) -> None:
    """sum_s <J_s, D_s> = - sum_s <credit_s, c g_s + l2 w_s> - sum_s <J_s, decoupled w_s>, for any J."""
    weights, gradients, rules = known(kind, 0.3)
    jacobians = [random(2, sum(SIZES), seed=50 + s) for s in range(STEPS)]
    forward = sum(j @ (weights[s + 1] - weights[s]) for s, j in enumerate(jacobians))
    later, back = torch.zeros(2, sum(SIZES)), torch.zeros(2)
    for s in reversed(range(STEPS)):
        credit, later = pull_back(rules[s], later, jacobians[s])
        back -= credit @ (rules[s].clip * gradients[s] + rules[s].l2 * weights[s])
        back -= jacobians[s] @ (rules[s].decoupled * weights[s])
    assert torch.allclose(back, forward, atol=1e-12)


# ------------------------------------------------------------------------------------------- settings that change


def switched(name: str, at: dict[int, float]) -> Change:
    """Gives a setting of the first group other values before some steps."""

    def change(step: int, optimizer: Optimizer) -> None:
        if step in at:
            optimizer.param_groups[0][name] = at[step]

    return change


@pytest.mark.parametrize("dampening", [0.0, 0.4])
@pytest.mark.parametrize("at", [{3: 0.9}, {0: 0.9, 3: 0.5, 5: 0.0}, {0: 0.9, 4: 0.0, 6: 0.7}, {4: 0.9, 6: 0.0, 8: 0.5}])
def test_momentum_may_be_scheduled_and_switched(at: dict[int, float], dampening: float) -> None:
    """Torch's buffer begins with the first step that has momentum, and rests while there is none."""
    group = {"lr": 0.1, "dampening": dampening}
    assert_moves(*taken(SGD, [group, {"lr": 0.2, "momentum": 0.5}], change=switched("momentum", at)))


@pytest.mark.parametrize("kind", ["l2", "adamw", "nadam l2", "rmsprop momentum", "adagrad l2", "radam l2"])
def test_learning_rate_and_decay_may_change_from_step_to_step(kind: str) -> None:
    def change(step: int, optimizer: Optimizer) -> None:
        for k, group in enumerate(optimizer.param_groups):
            group["lr"], group["weight_decay"] = 0.1 + 0.05 * step * k, 0.02 * step

    assert_moves(*taken(*KINDS[kind], change=change))


@pytest.mark.parametrize("make", [Adam, AdamW, NAdam, RAdam, Adamax])
def test_betas_may_change_from_step_to_step(make: type[Optimizer]) -> None:
    def change(step: int, optimizer: Optimizer) -> None:
        optimizer.param_groups[0]["betas"] = (0.5 + 0.05 * step, 0.9 + 0.01 * step)

    assert_moves(*taken(make, TWO, change=change))


@pytest.mark.parametrize("make", [Adam, AdamW])
def test_settings_may_be_tensors(make: type[Optimizer]) -> None:
    betas = (torch.tensor(0.8), torch.tensor(0.95))
    group = {"lr": torch.tensor(0.1), "betas": betas, "foreach": False}
    assert_moves(*taken(make, [group, {"lr": 0.2, "foreach": False}]))


# -------------------------------------------------------------------------------------------------- which are known


class Descent(SGD):
    """Torch's rule under another name may be another rule."""


OTHERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "Adadelta": torch.optim.Adadelta,
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
    "Adafactor": torch.optim.Adafactor,
    "Descent": lambda p: Descent(p, lr=0.1),
    "somebody's SGD": lambda p: type("SGD", (SGD,), {"__module__": "theirs"})(p, lr=0.1),
    "differentiable": lambda p: SGD(p, lr=0.1, differentiable=True),
}


@pytest.mark.parametrize("make", EVERY)
def test_the_rules_of_torchs_optimizers_are_known(make: type[Optimizer]) -> None:
    assert kind_of(make([nn.Parameter(torch.ones(2))], lr=0.1)) == make.__name__ in MOMENTS


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_optimizer_is_observed(name: str) -> None:
    assert kind_of(OTHERS[name]([nn.Parameter(torch.ones(2))])) == OBSERVED


@pytest.mark.parametrize("make", [torch.optim.LBFGS, torch.optim.SparseAdam])
def test_optimizers_that_no_path_can_be_made_from_are_refused_by_name(make: type[Optimizer]) -> None:
    with pytest.raises(UnsupportedError, match=f"{make.__name__} cannot be recorded: .*; train with another optimizer"):
        kind_of(make([nn.Parameter(torch.ones(2))]))

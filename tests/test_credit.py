"""Credit is right, not only complete: what an example is credited with in a step is what the output would lack.

In a model whose logits are linear in the weights, the output's gradient is the same everywhere. Take one example's
gradient out of one step, let torch's own optimizer spend all that is left, and hold the gradients of the other steps,
weight decay and the optimizer's observed scales at what they were in the training:

    f(x; w_S) - f(x; w_S without it)  =  contribution of the example in that step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from cases import RECIPES, VARIANTS, Case, Training, by_name, queries, train
from cases import float64 as float64
from reference import State
from torch import Tensor, nn
from torch.optim import Optimizer

from brittle.kernel.sweep import Quadrature, sweep
from brittle.records import Ledger

COUNT, STEPS = 60, 12

FEATURES = [
    "clip by value",
    "clip by value, adam",
    "clip by norm, then by value",
    "clip some tensors",
    "clip each tensor",
    "accumulation",
    "accumulation, clipped",
    "class weights",
    "example weights, accumulated",
    "mixup, accumulated",
    "attacked",
    "scaler, clipped adam",
    "thawed",
    "frozen by turns",
    "a group more",
    "momentum by turns",
    "ema",
    "ema by hand",
    "swa",
    "closure, clipped",
    "resumed ema",
]
TURNED = [name for name in VARIANTS if "maximize" in name]
DECAYING = [name for name in RECIPES if any(word in name for word in ("l2", "decoupled", "adamw", "groups"))]


class Additive(nn.Module):
    """Four tensors, in which the logits are linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x.flip(1) ** 2)


class Skipping(Additive):
    """The second half is left out of some training steps, and has no gradient there."""

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if self.training and torch.rand(()) < 0.5 else super().forward(x)


@pytest.mark.parametrize("recipe", [*RECIPES, *TURNED, *FEATURES])
def test_credit_is_what_the_output_would_lack(recipe: str, tmp_path: Path) -> None:
    assert_credited(each_once(Additive, recipe, tmp_path))


@pytest.mark.parametrize("recipe", ["momentum l2", "adamw", "nadam l2", "rmsprop momentum", "adagrad l2"])
def test_credit_is_right_where_tensors_rest_in_some_steps(recipe: str, tmp_path: Path) -> None:
    training = each_once(Skipping, recipe, tmp_path)
    assert {len(step.settings) for step in training.seen.steps} == {2, 4}
    assert_credited(training)


@pytest.mark.parametrize("recipe", DECAYING)
def test_the_decay_row_is_what_the_output_would_lack(recipe: str, tmp_path: Path) -> None:
    training = each_once(Additive, recipe, tmp_path)
    ledger, without = ledger_of(training), Spent(training).output(decays=False)
    assert torch.allclose(ledger.decay, ledger.output - without, atol=1e-9)
    assert ledger.decay.abs().max() > (
        1e-4 if any(s["weight_decay"] for s in training.seen.steps[0].settings.values()) else -1
    )


def each_once(model: type[nn.Module], recipe: str, root: Path) -> Training:
    """A training that has no example in more than one of its steps."""
    how = replace(by_name(recipe), epochs=True)
    return train(Case("linear in its weights", model), how, root, steps=STEPS // how.passes, count=COUNT)


def ledger_of(training: Training) -> Ledger:
    quadrature = Quadrature(segment=1, nodes=1, most=1)
    return sweep(training.path, training.subject, *queries(training.subject), quadrature).ledger


def assert_credited(training: Training) -> None:
    """The examples of an early, a middle and the last step, and nobody else."""
    ledger, spent = ledger_of(training), Spent(training)
    assert torch.allclose(spent.output(), ledger.output, atol=1e-10), "with nothing taken out"
    steps = training.seen.steps
    for at in (0, len(steps) // 3, len(steps) - 1):
        for example in steps[at].ids.unique().tolist():
            lacking = ledger.output - spent.output(gone=(at, example))
            assert torch.allclose(ledger.contributions[:, example], lacking, rtol=1e-9, atol=1e-9)
            assert lacking.abs().max() > 1e-5 or at > 0, "what counts in the end may have gone before"
    drawn = torch.cat([step.ids for step in steps]).unique()
    assert ledger.contributions.count_nonzero() <= len(drawn) * len(ledger.output)


class Spent:
    """The gradients of a training, spent once more by torch's own optimizer, some of them being left out."""

    def __init__(self, training: Training) -> None:
        self.seen, self.inputs, self.pairs = training.seen, *queries(training.subject)
        self.given = [  # by step and example, clipped
            reference.by_example(step, reference.row_gradients(training.seen, step), COUNT) for step in self.seen.steps
        ]

    def output(self, gone: tuple[int, int] | None = None, decays: bool = True) -> Tensor:
        """The outputs (M,) without one (step, example), or without weight decay."""
        path = [self.seen.steps[0].before]
        optimizer = self._optimizer()
        for s, step in enumerate(self.seen.steps):
            given = [g for i, g in enumerate(self.given[s]) if (s, i) != gone]
            moved = self._step(optimizer, s, {n: sum(g[n] for g in given) for n in step.settings}, decays)
            path.append({n: w + moved[n] if n in moved else w for n, w in path[-1].items()})
        shares = [*[0.0] * (len(path) - 1), 1.0] if self.seen.average is None else self.seen.average
        final = {n: sum(a * w[n] for a, w in zip(shares, path, strict=True)) for n in path[0]}
        return self.pairs.margin(reference.logits_in(torch.func.functional_call(self.seen.model, final, self.inputs)))

    def _optimizer(self) -> Optimizer:
        """Torch's, over weights that are put to those of the training before each step."""
        self.weights = {n: w.clone().requires_grad_(True) for n, w in self.seen.steps[0].before.items()}
        settings = self.seen.steps[-1].settings
        groups = [{"params": [w], **settings.get(n, {})} for n, w in self.weights.items()]
        return getattr(torch.optim, self.seen.optimizer)(groups)

    def _step(self, optimizer: Optimizer, s: int, gradient: State, decays: bool) -> State:
        """What one step does to the weights of the training."""
        step, scales = self.seen.steps[s], {}
        for group, (name, weight) in zip(optimizer.param_groups, self.weights.items(), strict=True):
            weight.data.copy_(step.before[name])
            weight.grad = None
            if name in gradient:
                group |= step.settings[name] | ({} if decays else {"weight_decay": 0.0})
                group |= {"maximize": False, "fused": None, "foreach": None}  # `by_example` has turned the sign
                weight.grad = gradient[name]
                scales[name] = hold(optimizer, group, weight, step.observed[name])
        optimizer.step()
        return {n: (self.weights[n].detach() - step.before[n]) * scale for n, scale in scales.items()}


def hold(optimizer: Optimizer, group: Mapping[str, Any], weight: Tensor, observed: State) -> Tensor | float:
    """Prepare what an optimizer holds so that the coming step ends with the squares that the training observed.

    Adamax alone cannot be prepared, since its scale only grows: by what to correct its step is returned.
    """
    held, g = optimizer.state[weight], weight.grad
    assert g is not None
    if not held and type(optimizer).__name__ != "SGD":
        held |= {k: torch.full_like(v, float(k == "mu_product")) for k, v in observed.items()}
    if not (type(optimizer).__name__ == "AdamW" or group.get("decoupled_weight_decay")):
        g = g + group["weight_decay"] * weight.detach()
    if "exp_avg_sq" in held:
        beta2, after = group["betas"][1], 0.0 if group.get("amsgrad") else observed["exp_avg_sq"]
        held["exp_avg_sq"] = (after - (1 - beta2) * g**2) / beta2
    if "max_exp_avg_sq" in held:
        held["max_exp_avg_sq"] = observed["max_exp_avg_sq"].clone()
    if "square_avg" in held:
        held["square_avg"] = (observed["square_avg"] - (1 - group["alpha"]) * g**2) / group["alpha"]
    if "grad_avg" in held:
        held["grad_avg"] = (observed["grad_avg"] - (1 - group["alpha"]) * g) / group["alpha"]
    if "sum" in held:
        held["sum"] = observed["sum"] - g**2
    if "exp_inf" in held:
        held["exp_inf"] = torch.zeros_like(g)
        return (g.abs() + group["eps"]) / observed["exp_inf"]
    return 1.0

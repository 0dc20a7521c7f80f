"""Peers as they come: foolbox's DDN, DeepFool, Brendel-Bethge and Linf-FMN, and pyautoattack, their passes counted.

A counted model adds up the rows of every forward pass; a backward pass comes with its forward pass, as in our own
counts, but a further backward pass through the same forward (DeepFool takes one a class) is an evaluation of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from brittle.attacks.foolbox_suite import foolbox
from brittle.records import Norm


@dataclass(frozen=True)
class Found:
    """What an attack came to on M images."""

    name: str
    distance: Tensor  # shape: (M,) float64, infinite where it failed
    evaluations: float  # an image


class Counted(nn.Module):
    """A model that counts the rows that it is asked about, forward, and backward beyond one for each forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.evaluations = model, 0
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        self.evaluations += len(inputs)
        logits = self.model(inputs)
        if logits.requires_grad:
            seen = [0]

            def further(gradient: Tensor) -> None:
                seen[0] += 1
                self.evaluations += len(gradient) if seen[0] > 1 else 0

            logits.register_hook(further)
        return logits


def peers(model: nn.Module, inputs: Tensor, labels: Tensor, norm: Norm, long: bool) -> list[Found]:
    """foolbox's attacks at 1,000 steps, or, where it is not to be long, at 100 and without Brendel-Bethge."""
    attacks, length = foolbox().attacks, 10 if long else 1
    table: dict[str, Callable[[], Any]] = {
        "l2": {
            "DDN": lambda: attacks.DDNAttack(steps=100 * length),
            "DeepFool": lambda: attacks.L2DeepFoolAttack(steps=50),
            "BB": lambda: attacks.L2BrendelBethgeAttack(steps=100 * length),
        },
        "linf": {
            "DeepFool": lambda: attacks.LinfDeepFoolAttack(steps=50),
            "BB": lambda: attacks.LinfinityBrendelBethgeAttack(steps=100 * length),
            "FMN": lambda: attacks.LInfFMNAttack(steps=100 * length),
        },
    }[norm]
    known = [name for name in table if long or name != "BB"]  # which numba compiles for a minute
    return [attacked(name, table[name](), model, inputs, labels, norm) for name in known]


def ddn(model: nn.Module, inputs: Tensor, labels: Tensor, evaluations: int) -> Found:
    """foolbox's DDN for as many evaluations."""
    return attacked("foolbox DDN", foolbox().attacks.DDNAttack(steps=evaluations - 1), model, inputs, labels, "l2")


def fmn(model: nn.Module, inputs: Tensor, labels: Tensor, evaluations: int) -> Found:
    """foolbox's Linf FMN for as many evaluations."""
    attack = foolbox().attacks.LInfFMNAttack(steps=evaluations - 1)
    return attacked("foolbox FMN", attack, model, inputs, labels, "linf")


def attacked(name: str, attack: Any, model: nn.Module, inputs: Tensor, labels: Tensor, norm: Norm) -> Found:
    """Run one attack of foolbox's, its result judged on the tensors that it returned. A crash is a failure."""
    counted = Counted(model)
    torch.manual_seed(0)
    bounded = foolbox().PyTorchModel(counted, bounds=(0, 1), device="cpu")
    try:
        points = attack.run(bounded, inputs, foolbox().criteria.Misclassification(labels)).detach()
    except Exception as error:
        print(f"{name} ({norm}) raised {type(error).__name__}: {error}", file=sys.stderr)
        return Found(
            name, torch.full((len(inputs),), torch.inf, dtype=torch.float64), counted.evaluations / len(inputs)
        )
    with torch.no_grad():
        wrong = model(points).argmax(1) != labels
    offset = (points.double() - inputs.double()).flatten(1)
    far = offset.norm(dim=1) if norm == "l2" else offset.abs().amax(1)
    return Found(name, torch.where(wrong, far, torch.inf), counted.evaluations / len(inputs))


def auto_attack(
    model: nn.Module, inputs: Tensor, labels: Tensor, epsilon: float, quick: bool
) -> tuple[Tensor, float] | None:
    """Which images hold against pyautoattack's standard version, and its evaluations an image; None without it."""
    try:
        from pyautoattack import AutoAttack
    except ImportError:
        return None
    counted = Counted(model)
    chosen = {"attacks": ["apgd-ce"], "version": "custom"} if quick else {"version": "standard"}
    judge = AutoAttack(counted, norm="Linf", eps=epsilon, device="cpu", seed=0, **chosen)
    points = judge.run_standard_evaluation(inputs, labels)
    points = points[0] if isinstance(points, tuple) else points
    with torch.no_grad():
        return model(points).argmax(1) == labels, counted.evaluations / len(inputs)

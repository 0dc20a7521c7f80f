"""foolbox's DDN and PGD, with every question they ask the model counted by us.

foolbox's constants are made for inputs in [0, 1] (DDN starts at radius 1 with steps of length 1), so its attacks see
inputs scaled to that range. Its success is judged by us, on logits of what it returned.

Sources: Rauber, Zimmermann, Bethge, Brendel 2020, "Foolbox Native", JOSS 5(53) (doi 10.21105/joss.02607); DDN: Rony
et al. 2019 (arXiv 1811.09600); PGD: Madry et al. 2018 (arXiv 1706.06083).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from brittle.attacks.problem import Logits, Problem
from brittle.attacks.search import Search
from brittle.records import AttackRows


def ddn(problem: Problem, *, generator: torch.Generator, steps: int = 100) -> AttackRows:
    """Decoupled direction and norm, a minimal-norm attack in L2. Cost: `steps` + 1 evaluations an input."""
    search = Search(problem)
    _ask(search, _foolbox().attacks.DDNAttack(steps=steps), generator)
    return search.rows("DDN", "minimal")


def pgd(problem: Problem, epsilon: float, *, generator: torch.Generator, steps: int = 40) -> AttackRows:
    """Projected gradient ascent on the cross entropy within `epsilon`, from a random start.

    A step is 2.5 `epsilon` / `steps` long. Cost: `steps` + 1 evaluations an input.
    """
    search, (low, high) = Search(problem), problem.bounds
    attacks = _foolbox().attacks
    attack = (attacks.L2PGD if problem.norm == "l2" else attacks.LinfPGD)(steps=steps, rel_stepsize=2.5 / steps)
    _ask(search, attack, generator, epsilon=epsilon / (high - low))
    return search.rows("PGD", "fixed", epsilon)


def _ask(search: Search, attack: Any, generator: torch.Generator, **options: float) -> None:
    """Run a foolbox attack, scaled to [0, 1], and show what it returns to the search."""
    problem = search.problem
    low, width = problem.bounds[0], problem.bounds[1] - problem.bounds[0]
    inputs = ((problem.inputs - low) / width).clamp(0, 1)
    model = _foolbox().PyTorchModel(_Scaled(search).eval(), bounds=(0, 1), device=inputs.device)
    with torch.random.fork_rng([inputs.device] if inputs.is_cuda else []):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        points = attack.run(model, inputs, _criterion(problem), **options)
    points = (low + points.detach() * width).clamp(*problem.bounds)
    search.look(points)


def _criterion(problem: Problem) -> Any:
    criteria = _foolbox().criteria
    if problem.targets is None:
        return criteria.Misclassification(problem.labels)
    return criteria.TargetedMisclassification(problem.targets)


def _foolbox() -> Any:
    """foolbox, imported when it is first used: it takes a second."""
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # it imports git, which would ask for git's program
    import foolbox

    return foolbox


class _Scaled(nn.Module):
    """The logits of inputs scaled to [0, 1], counted."""

    def __init__(self, search: Search) -> None:
        super().__init__()
        self._search = search

    def forward(self, inputs: Tensor) -> Tensor:
        low, high = self._search.problem.bounds
        self._search.charge(1)
        return _InputGradient.apply(low + inputs * (high - low), self._search.problem.logits)


class _InputGradient(torch.autograd.Function):
    """Logits whose backward pass ends at the inputs: foolbox calls `backward`, which would fill the weights' grad."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, logits: Logits) -> Tensor:
        with torch.enable_grad():
            ctx.inputs = inputs.detach().requires_grad_()
            ctx.logits = logits(ctx.inputs)
        return ctx.logits.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.autograd.grad(ctx.logits, ctx.inputs, gradient)[0], None

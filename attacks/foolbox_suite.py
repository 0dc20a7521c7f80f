"""foolbox's PGD, with every question that it asks the model counted by us.

foolbox's constants are made for inputs in [0, 1], so it sees inputs scaled to that range. Its success is judged
by us, on logits of what it returned.

Sources: Rauber, Zimmermann, Bethge, Brendel 2020, "Foolbox Native", JOSS 5(53) (doi 10.21105/joss.02607);
PGD: Madry et al. 2018 (arXiv 1706.06083).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from brittle.attacks.problem import Problem
from brittle.attacks.search import Search
from brittle.bounds import ends, within
from brittle.records import AttackRows


def pgd(problem: Problem, epsilon: float, *, generator: torch.Generator, steps: int = 40) -> AttackRows:
    """Projected gradient ascent on the cross entropy within `epsilon`, from a random start.

    A step is 2.5 `epsilon` / `steps` long. Cost: `steps` + 1 evaluations an input.
    """
    search, (_, wide) = Search(problem, epsilon=epsilon), _scale(problem)
    attacks = foolbox().attacks
    attack = (attacks.L2PGD if problem.norm == "l2" else attacks.LinfPGD)(steps=steps, rel_stepsize=2.5 / steps)
    with search:
        _ask(search, attack, generator, epsilon=epsilon / wide)
    return search.rows("PGD", "fixed", epsilon)


def _ask(
    search: Search,
    attack: Any,
    generator: torch.Generator,
    **options: float,
) -> None:
    """Run a foolbox attack, scaled to [0, 1], and show what it returns to the search."""
    problem = search.problem
    low, wide = _scale(problem)
    inputs = ((problem.inputs - low) / wide).clamp(0, 1)
    model = foolbox().PyTorchModel(_Scaled(search).eval(), bounds=(0, 1), device=inputs.device)
    with torch.random.fork_rng([inputs.device] if inputs.is_cuda else []):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        points = attack.run(model, inputs, _criterion(problem), **options)
    search.look(within(low + points.detach() * wide, problem.bounds))


def _scale(problem: Problem) -> tuple[float, float]:
    """The smallest value of all inputs, and their widest range: the same for all channels, so that norms stay."""
    low, high = ends(problem.bounds)
    return low, high - low


def _criterion(problem: Problem) -> Any:
    criteria = foolbox().criteria
    if problem.targets is None:
        return criteria.Misclassification(problem.labels)
    return criteria.TargetedMisclassification(problem.targets)


def foolbox() -> Any:
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
        low, wide = _scale(self._search.problem)
        raw = inputs if (low, wide) == (0, 1) else low + inputs * wide
        return _InputGradient.apply(raw, self._search)


class _InputGradient(torch.autograd.Function):
    """Logits whose backward pass ends at the inputs: foolbox calls `backward`, which would fill the weights' grad.

    The question goes through the search, so that it is counted, capped, and its successes are kept.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, search: Search) -> Tensor:
        with torch.enable_grad():
            ctx.asked = search.graph(within(inputs.detach(), search.problem.bounds))
        return ctx.asked.logits.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.asked.pull_back(ctx.asked.logits, gradient), None

"""Descents that come by way of the vicinity: networks whose weights are the model's own, disturbed at random.

Descents through one network end in places that its own kinks and flat parts make, and adversarial training makes many.
Networks of nearly the same weights share its boundary, on the whole, but not those. So each round of this attack first
searches for the radius (`reach`) through

    w + sigma rms(w_t) xi,        xi ~ N(0, 1) anew in every pass, rms over the tensor t that a weight belongs to,

and then descends through the model itself from where that has led. Before them a descent from the input goes for the
rival that is nearest to first order, which is the one where networks are smooth; a last descent goes on from the best.

States of the late path do as the first part as well, and randomly disturbed weights do better (benchmarks/attacks.md).
Weights around those that a network was trained to are known from attacks on *other* networks: Gubri, Cordy, Papadakis,
Le Traon, Sen 2022, "LGV: boosting adversarial example transferability from large geometric vicinity" (arXiv
2207.13129); Li, Guo, Zuo, Chen 2023, "Making substitute models more Bayesian can enhance transferability of
adversarial examples" (arXiv 2302.05086).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor, nn

from brittle.attacks.descent import Descent, descend
from brittle.attacks.problem import Logits, Problem
from brittle.attacks.reach import reach
from brittle.attacks.route import Guide, take_bearing
from brittle.attacks.search import Search
from brittle.records import AttackRows

SCALES = (0.3, 0.1, 0.05)
"""sigma of one round after the other, and over again: which serves best differs by network and norm."""

ROUND = 100
"""Steps of a round, about."""

LENGTH = (2.0, 0.5)
"""First and last step through the vicinity, in units of the radius."""

RIVALS = 5
"""Classes among which the first descent looks for the nearest."""

WIDE = Descent()
"""The first descent."""

FINE = Descent(step=(0.5, 0.01), radius=(0.05, 0.002))
"""The descent from there: it stays near, since wide steps lose the place again."""

LAST = Descent(step=(0.2, 0.01), radius=(0.01, 0.0005), temperature=(0.05, 0.001))
"""The last descent: finer still."""

LINE_SEARCH = 6
"""Halvings at the end."""


class Vicinity:
    """Networks around a model.

    They share one copy of its weights, and each is there while it is asked: gradients are to be taken before the next.

    Args:
        model: whose weights are disturbed, in the copy alone.
        logits: (model, inputs (B, *input)) -> (B, C), as `Subject.class_logits`.
    """

    def __init__(self, model: nn.Module, logits: Callable[[nn.Module, Tensor], Tensor]) -> None:
        self._model, self._logits = model, logits

    @cached_property
    def _copy(self) -> nn.Module:
        return copy.deepcopy(self._model).requires_grad_(False)

    def network(self, sigma: float, seed: int) -> Logits:
        """The model with weights that are sigma away, in units of each tensor's root mean square."""

        def logits(inputs: Tensor) -> Tensor:
            self._disturb(sigma, torch.Generator().manual_seed(seed))
            return self._logits(self._copy, inputs)

        return logits

    @torch.no_grad()
    def _disturb(self, sigma: float, generator: torch.Generator) -> None:
        for own, other in zip(self._model.parameters(), self._copy.parameters(), strict=True):
            noise = torch.randn(own.shape, generator=generator).to(own)
            other.copy_(torch.addcmul(own, own.square().mean().sqrt() * sigma, noise))


def by_vicinity(problem: Problem, vicinity: Vicinity, *, generator: torch.Generator, steps: int = 400) -> AttackRows:
    """A minimal-norm attack in L2 or Linf that comes by way of disturbed weights.

    Args:
        steps: evaluations, passes through the vicinity among them. They make for one round at each scale at least, and
            are shared equally by the two parts of each round, the first descent and the last.

    Cost: at most `steps` evaluations an input (more where a part would be left without one).
    """
    search, scales = Search(problem), SCALES * max(1, steps // (ROUND * len(SCALES)))
    part = max(1, (steps - 1 - RIVALS - len(scales) - LINE_SEARCH) // (2 * len(scales) + 2))
    with search:
        clean = search.look(problem.inputs)
        scale = problem.margin(clean).abs()
        rival = take_bearing(search, Guide.margin(problem), clean, RIVALS, generator).rivals[:, 0]
        descend(problem.aimed(rival), search, problem.inputs, scale, WIDE, part, generator)
        for sigma in scales:
            seeds = torch.randint(2**62, (part,), generator=generator).tolist()
            search.charge(part + 1, backwards=part)
            networks = [vicinity.network(sigma, seed) for seed in seeds]
            led = reach(problem, part, through=networks, length=LENGTH, generator=generator)
            radius = torch.minimum(led.radius, search.best)
            descend(problem, search, led.points, scale, FINE, part, generator, radius)
        descend(problem, search, search.inputs.clone(), scale, LAST, part, generator)
        search.pull_in(LINE_SEARCH)
    return search.rows("vicinity", "minimal")

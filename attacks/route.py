"""The route into a hole: which rival class to go for, and in which direction, read from the mass of the groups.

The output of a pair (predicted class, rival r) stands on mass: margin_r ~ start + sum_g mass_g. Groups with positive
mass hold the prediction up, groups with negative mass pull to the rival; along the gradient of both together the
balance tips, to first order, at

    distance_r = margin_r / rate_r,        rate_r = || grad_x sum_g mass_g ||_dual,

and the rival with the smallest margin_r / rate_r^a comes first. With a = 1, the distance, the first rival is right on
linear models and most often so on a plain MNIST CNN; on an adversarially trained one, whose clean gradients say little
of what lies far away, a = 0 is: the margin alone. Half way between is near the better of the two on both
(benchmarks/attacks.md).

A mass map differs from the margin's own gradient in that it comes from weights along the whole training, which looks
beyond the kinks and flat parts that the final weights have around an input. Without a map the margin itself serves as
the one group, as in DeepFool (Moosavi-Dezfooli, Fawzi, Frossard 2016, arXiv 1511.04599).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.attacks.geometry import dual_size, room, spread, steepest
from brittle.attacks.problem import Problem
from brittle.attacks.search import Search
from brittle.bounds import within
from brittle.errors import DataError
from brittle.records import Pairs
from brittle.shift import MassMap

MAP_BLOCK = 64
"""Inputs whose mass is differentiated at once: a map holds a Jacobian for each."""


@dataclass(frozen=True)
class Guide:
    """A mass map, the class of each of its groups, and what one input costs: a call and its backward pass."""

    mass: MassMap
    classes: Tensor  # shape: (G,) int64
    evaluations: int

    @classmethod
    def margin(cls, problem: Problem) -> Guide:
        """The margin as the only group: what is left of a mass map where no path is known."""

        def mass(inputs: Tensor, pairs: Pairs) -> Tensor:
            return pairs.margin(problem.logits(inputs))[:, None]

        return cls(mass, torch.tensor([-1]), evaluations=1)


@dataclass(frozen=True)
class Bearing:
    """K rivals of each input, the likeliest first, with the way that each lies."""

    rivals: Tensor  # shape: (B, K) int64
    tip: Tensor  # shape: (B, K) distance at which the balance is predicted to tip
    direction: Tensor  # shape: (B, K, *input), of size 1

    def start(self, problem: Problem, rank: Tensor, share: float) -> Tensor:
        """The point that lies `share` of the predicted distance towards the rival at `rank` (B,): (B, *input)."""
        every = torch.arange(len(rank), device=rank.device)
        way = self.direction[every, rank]
        return within(problem.inputs + spread(share * self.tip[every, rank], way) * way, problem.bounds)


@dataclass(frozen=True)
class Route:
    """The way that an attack took: pairs (clean class, new class), and the mass before and after.

    Leaving and arriving are read as in the shift map: among the groups that held the prediction up the one that
    falls most, among those of the rival's class the one that turns most against it; -1 where the attack failed or
    there is none.
    """

    rival: Tensor  # shape: (B,) int64, the class where it ended; -1 where it failed
    leaving: Tensor  # shape: (B,) int64, group
    arriving: Tensor  # shape: (B,) int64, group
    before: Tensor  # shape: (B, G) logits
    after: Tensor  # shape: (B, G) logits


def take_bearing(
    search: Search,
    guide: Guide,
    clean: Tensor,
    candidates: int,
    generator: torch.Generator,
    power: float = 1.0,
) -> Bearing:
    """Rank each input's most likely rivals, by default by the distance at which the mass balance tips.

    Args:
        clean: (B, C) logits at the clean inputs.
        candidates: K, how many of the largest logits to consider (all there are, if fewer).
        generator: of the directions where a gradient vanishes.
        power: a, how much the slope of the mass counts beside the margin.

    Cost: K `guide.evaluations` an input.
    """
    problem = search.problem
    rivals = rank_by_logit(problem, clean)[:, :candidates]
    margins, rates, ways = [], [], []
    for rival in rivals.unbind(1):
        pairs = Pairs(problem.labels, rival)
        gradient = _mass_gradient(search, guide, pairs)
        margins.append(pairs.margin(clean))
        rates.append(dual_size(gradient, problem.norm))
        ways.append(-steepest(gradient, problem.norm, generator))
    margin, rate = torch.stack(margins, 1), torch.stack(rates, 1)  # shape: (B, K)
    rate = rate.clamp_min(torch.finfo(rate.dtype).tiny)
    order = (margin / rate**power).nan_to_num(torch.inf).argsort(dim=1, stable=True)
    farthest = room(problem.inputs, problem.bounds, problem.norm)[:, None]
    tip = (margin / rate).nan_to_num(torch.inf).minimum(farthest).gather(1, order)
    every = torch.arange(len(order), device=order.device)[:, None]
    return Bearing(rivals.gather(1, order), tip, torch.stack(ways, 1)[every, order])


def random_bearing(problem: Problem, clean: Tensor, candidates: int, generator: torch.Generator) -> Bearing:
    """Rivals in random order, in random directions, tipped at once: the attack starts where the input is."""
    ranked = rank_by_logit(problem, clean)
    order = torch.rand(ranked.shape, generator=generator).argsort(1).to(ranked.device)[:, :candidates]
    noise = torch.randn(len(order), order.shape[1], *problem.inputs.shape[1:], generator=generator)
    return Bearing(ranked.gather(1, order), clean.new_zeros(order.shape), noise.to(problem.inputs))


def rank_by_logit(problem: Problem, clean: Tensor) -> Tensor:
    """The other classes by their logit, largest first, (B, C - 1); only the target where there is one."""
    if problem.targets is not None:
        return problem.targets[:, None]
    return clean.scatter(1, problem.labels[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :-1]


def trace(search: Search, guide: Guide) -> Route:
    """What left and what arrived between each input and its success. Cost: 2 `guide.evaluations` an input."""
    clean, labels, classes = search.problem.inputs, search.problem.labels, search.classes
    pairs = Pairs(labels, classes)
    before, after = (_mass(search, guide, points, pairs) for points in (clean, search.inputs))
    fall, holding, succeeded = before - after, before > 0, classes != labels
    rivals = guide.classes.to(classes.device) == classes[:, None]  # shape: (B, G)

    def largest(among: Tensor) -> Tensor:
        return torch.where(among.any(1) & succeeded, torch.where(among, fall, -torch.inf).argmax(1), -1)

    return Route(torch.where(succeeded, classes, -1), largest(holding), largest(rivals), before, after)


def _mass_gradient(search: Search, guide: Guide, pairs: Pairs) -> Tensor:
    """Gradient of the mass of all groups together, (B, *input)."""
    search.charge(guide.evaluations, backwards=(guide.evaluations + 1) // 2)
    parts = []
    for rows in _blocks(len(pairs)):
        inputs = search.problem.inputs[rows].detach().requires_grad_()
        mass = _checked(guide.mass(inputs, pairs[rows]), guide)
        parts.append(torch.autograd.grad(mass.sum(), inputs)[0])
    return torch.cat(parts)


@torch.no_grad()
def _mass(search: Search, guide: Guide, inputs: Tensor, pairs: Pairs) -> Tensor:
    search.charge(guide.evaluations)
    return torch.cat([_checked(guide.mass(inputs[rows], pairs[rows]), guide) for rows in _blocks(len(inputs))])


def _blocks(count: int) -> list[slice]:
    return [slice(k, min(k + MAP_BLOCK, count)) for k in range(0, count, MAP_BLOCK)]


def _checked(mass: Tensor, guide: Guide) -> Tensor:
    if mass.shape[1] != len(guide.classes):
        raise DataError(
            f"the mass map must tell {len(guide.classes)} groups apart, found {mass.shape[1]} columns; "
            "pass the groups it was made with"
        )
    return mass

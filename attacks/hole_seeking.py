"""The hole-seeking attack: it reads from the mass map where a prediction gives way, goes there, and gets through.

In L2 or Linf, untargeted or towards a target; within a fixed distance (`seek_holes_within`), or minimal-norm in three
stages:

1. Route (`route`): at the clean input the map ranks the rivals, and says how far away and in which direction the
   balance of mass tips to each.
2. Tracks (`descent`): the first starts beyond that point of the best-ranked rival and is free to end in any wrong
   class; each further one aims at the best-ranked rival at which none has aimed or ended yet, from the radius already
   reached; once there is none, at the best-ranked ones again, from random points.
3. Line search between the input and the nearest success of all tracks.

The map gives the order of the rivals and the first track's start, beyond the boundary that it predicts. On a plain
MNIST CNN the order is what it brings: about as much as the margin's own gradient does, which costs one evaluation a
rival where the map costs its nodes, and which ranks them without a map. On an adversarially trained one the start is:
in L2 descents from clean inputs end in poor places, those from where the map of the whole path points do not
(benchmarks/attacks.md has the figures). A map of one segment, the whole path, serves better than a finer one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from brittle.attacks.apgd import Climb, climb
from brittle.attacks.descent import Descent, descend
from brittle.attacks.geometry import spread, steepest
from brittle.attacks.problem import Problem
from brittle.attacks.route import Bearing, Guide, Route, random_bearing, take_bearing, trace
from brittle.attacks.search import Search
from brittle.bounds import within
from brittle.records import AttackRows

NAME = "hole-seeking"

FREE = Descent()
"""The first track: wide steps, to choose among many places."""

AIMED = Descent(step=(0.5, 0.01))
"""The further ones: shorter steps, to come near in the place they aim at."""

START = 1.5
"""Where a track starts, in units of the predicted distance towards its rival."""

SLOPE = 0.5
"""How much the slope of the mass counts beside the margin in the order of the rivals."""

AGAIN = 0.5
"""How far away a track starts that goes for a rival once more, in units of the radius already reached."""

LEAST = 1e-3
"""Least clean margin that sets a temperature, as a share of the range of the logits."""

LINE_SEARCH = 6
"""Halvings at the end."""


def seek_holes(
    problem: Problem,
    guide: Guide | Literal["gradient", "random"] = "gradient",
    *,
    generator: torch.Generator,
    steps: int = 100,
    tracks: int = 3,
    candidates: int = 5,
    traced: bool = True,
) -> tuple[AttackRows, Route | None]:
    """Find the nearest misclassified input to each input, led by the mass map.

    Args:
        guide: the mass map; or what ranks the rivals without one: the margin's gradient, or chance.
        steps: evaluations that an input spends on the model; what the guide costs is counted besides.
        tracks: descents that share the steps, the first taking half.
        candidates: K, how many rivals the guide is asked about.
        traced: also read the mass at the end, for the route.

    Returns:
        The rows, and the route of each input where a mass map tells it (None otherwise).

    Cost: `steps` + K `guide.evaluations` an input, and 2 `guide.evaluations` for the route.
    """
    search = Search(problem)
    with search:
        clean = search.look(problem.inputs)
        scale = problem.margin(clean).abs().maximum(LEAST * (clean.amax(1) - clean.amin(1)))
        bearing = _bearing(search, guide, clean, candidates, generator)
        times = torch.zeros_like(bearing.rivals)  # shape: (B, K) tracks that aimed at a rival or ended there
        for k, share in enumerate(_shares(steps - 1 - LINE_SEARCH, tracks)):
            rank = times.argmin(1)  # the best-ranked of those tried least: argmin gives the first of equals
            rival = bearing.rivals.gather(1, rank[:, None])[:, 0]
            start = bearing.start(problem, rank, START)
            again = spread(times.amin(1) > 0, start)
            start = torch.where(again, _anywhere(problem, AGAIN * search.best, generator), start)
            descend(
                problem.aimed(rival) if k else problem, search, start, scale, AIMED if k else FREE, share, generator
            )
            times += bearing.rivals == (rival if k else search.classes)[:, None]
        search.pull_in(LINE_SEARCH)
    route = trace(search, guide) if traced and isinstance(guide, Guide) else None
    return search.rows(NAME, "minimal"), route


def seek_holes_within(
    problem: Problem,
    epsilon: float,
    guide: Guide | Literal["gradient", "random"] = "gradient",
    *,
    generator: torch.Generator,
    steps: int = 100,
    tracks: int = 3,
    candidates: int = 5,
    early: bool = False,
    traced: bool = True,
) -> tuple[AttackRows, Route | None]:
    """Find a success within `epsilon`, led by the mass map: Auto-PGD towards the best-ranked rivals, one by one.

    Each climb raises the DLR towards its rival, from where the map says that the balance has tipped. Of the
    successes the one with the largest margin is returned; with `early` an input is left at its first.

    Args:
        guide, candidates, traced: as in `seek_holes`.
        steps: evaluations that an input spends on the model.
        tracks: rivals that share the steps.

    Cost: `steps` + K `guide.evaluations` an input, and 2 `guide.evaluations` for the route.
    """
    search = Search(problem, keep="surest", epsilon=epsilon)
    radius = problem.inputs.new_full((len(problem),), epsilon)
    with search:
        bearing = _bearing(search, guide, search.look(problem.inputs), candidates, generator)
        for k, share in enumerate(_shares(steps - 1, min(tracks, bearing.rivals.shape[1]))):
            rows = (search.best.isinf() | torch.tensor(not early)).nonzero()[:, 0]
            start = bearing.start(problem, torch.full_like(problem.labels, k), START)
            aimed = problem.aimed(bearing.rivals[:, k])
            climb(aimed, search, Climb("dlr", share, early), start, radius, rows, generator)
    route = trace(search, guide) if traced and isinstance(guide, Guide) else None
    return search.rows(NAME, "fixed", epsilon), route


def _bearing(
    search: Search,
    guide: Guide | Literal["gradient", "random"],
    clean: Tensor,
    candidates: int,
    generator: torch.Generator,
) -> Bearing:
    if guide == "random":
        return random_bearing(search.problem, clean, candidates, generator)
    leader = guide if isinstance(guide, Guide) else Guide.margin(search.problem)
    return take_bearing(search, leader, clean, candidates, generator, SLOPE)


def _shares(steps: int, tracks: int) -> list[int]:
    """Steps of each track: half of them for the first, the rest in equal parts."""
    if tracks == 1:
        return [max(steps, 1)]
    each = steps // (2 * (tracks - 1))
    return [max(steps - each * (tracks - 1), 1), *[each] * (tracks - 1)]


def _anywhere(problem: Problem, radius: Tensor, generator: torch.Generator) -> Tensor:
    """A random point about `radius` (B,) away; the input itself where that is infinite."""
    noise = torch.randn(problem.inputs.shape, generator=generator).to(problem.inputs)
    reach = torch.where(radius.isfinite(), radius, 0.0)
    return within(problem.inputs + spread(reach, noise) * steepest(noise, problem.norm), problem.bounds)

"""Holes that no probe opens: regions in which the clean input itself is predicted to fail.

Queries that are predicted to be of one class are told apart by what holds them up. Their mass by group of training
examples, centred and whitened, is their *place*; Ward's method makes a tree of the places of each predicted class. With
E of the N labelled queries failing, a branch of n of them with e failures has the log likelihood ratio

    l(e, n) + l(E - e, N - n) - l(E, N),        l(a, b) = a log(a / b) + (b - a) log(1 - a / b)

of a failure rate of its own against the common one (a scan statistic: Kulldorff, Fang, Walsh 2003, "A tree-based scan
statistic for database disease surveillance", Biometrics 59). Branches with more failures than usual are taken from the
largest ratio down, none of them inside another: these are the holes, ranked by predicted failure rate times support.

The rule that says of a new input whether it lies in a hole asks the labelled queries nearest to its place, of its
predicted class; so does its predicted failure rate. Labels of new inputs are never asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage
from scipy.special import xlogy
from torch import Tensor

from brittle.errors import DataError, NotFiniteError

MOST = 15
LEAST_SUPPORT = 5
LEAST_FAILURES = 3
LEAST_RATIO = 3.0
"""Log likelihood ratio below which a branch is no hole."""
DIMENSIONS = 16
"""Directions of mass, the widest, that are told apart."""
NEAREST, VOTERS = 15, 5
"""Labelled queries from which a failure rate is read, and those of them that say which hole an input lies in."""


@dataclass(frozen=True)
class Ground:
    """M labelled queries by what holds them up, and how others find their place among them."""

    centre: Tensor  # shape: (G,)
    axes: Tensor  # shape: (G, D)
    place: Tensor  # shape: (M, D)
    predicted: Tensor  # shape: (M,) class
    failed: Tensor  # shape: (M,) bool

    @property
    def base_rate(self) -> float:
        return self.failed.double().mean().item()


@dataclass(frozen=True)
class NaturalHole:
    """A region in which clean inputs are predicted to fail, before its test."""

    predicted: int  # the class that the network takes its members for
    members: Tensor  # shape: (support,) positions among the labelled queries
    rate: Tensor  # shape: (support,) predicted probability of failure
    exemplar: int  # the member in its middle

    @property
    def support(self) -> int:
        return len(self.members)

    @property
    def predicted_rate(self) -> float:
        return self.rate.mean().item()


@dataclass(frozen=True)
class NaturalMap:
    """Natural holes, and what their rule says of R inputs without a label."""

    holes: list[NaturalHole]
    number: Tensor  # shape: (R,) the hole that an input lies in, -1 for none
    rate: Tensor  # shape: (R,) predicted probability of failure


def ground(mass: Tensor, predicted: Tensor, failed: Tensor) -> Ground:
    """The ground on which natural holes are sought.

    Args:
        mass: of labelled queries, by group or by group and segment of the path, (M, G).
        predicted: their predicted classes, (M,).  failed: whether these are wrong, (M,) bool.

    Raises:
        DataError: without queries.  NotFiniteError: for mass that is not finite.
    """
    if not len(mass):
        raise DataError("natural holes need labelled queries, found none; hold some test inputs back for them")
    if not mass.isfinite().all():
        raise NotFiniteError("mass must be finite, found infinity or NaN; look at the ledger of these queries")
    centre = mass.double().mean(0)
    _, spread, axes = torch.linalg.svd(mass.double() - centre, full_matrices=False)
    wide = (spread > max(1e-6 * spread[0].item(), torch.finfo(spread.dtype).tiny))[:DIMENSIONS].nonzero()[:, 0]
    axes = axes[wide].T / spread[wide] * len(mass) ** 0.5
    return Ground(centre, axes, (mass.double() - centre) @ axes, predicted, failed)


def natural_holes(on: Ground, most: int = MOST) -> list[NaturalHole]:
    """At most `most` holes, ranked by predicted failure rate times support. Cost: a tree for each predicted class."""
    branches = [b for c in on.predicted.unique() for b in _branches(on, (on.predicted == c).nonzero()[:, 0])]
    rate, taken = _rates(on, *_nearest(on, on.place, on.predicted, apart=True)), torch.zeros_like(on.failed)
    found = []
    for _, members in sorted(branches, key=lambda branch: -branch[0]):
        if not taken[members].any():
            taken[members] = True
            middle = (on.place[members] - on.place[members].mean(0)).norm(dim=1).argmin()
            found.append(NaturalHole(int(on.predicted[members[0]]), members, rate[members], int(members[middle])))
    return sorted(found, key=lambda hole: hole.predicted_rate * hole.support, reverse=True)[:most]


def where(holes: list[NaturalHole], on: Ground, mass: Tensor, predicted: Tensor) -> NaturalMap:
    """The rule: which hole inputs lie in, and their predicted failure rates. Reads no labels of theirs.

    mass: of the inputs, (R, G).  predicted: their predicted classes, (R,).
    """
    number = torch.full((len(on.failed),), -1)
    for k, hole in enumerate(holes):
        number[hole.members] = k
    distance, near = _nearest(on, (mass.double() - on.centre) @ on.axes, predicted)
    votes = torch.where(distance.isfinite(), number[near], -1)[:, :VOTERS]
    return NaturalMap(holes, votes.mode(1).values, _rates(on, distance, near))


def held_up_by(hole: NaturalHole, on: Ground, mass: Tensor) -> int:
    """The group whose mass exceeds most what it is at other queries of the same predicted class.

    In standard deviations over these; where there are none, the group of most mass. mass: of the labelled queries, by
    group, (M, G).
    """
    own = mass[hole.members].double().mean(0)
    others = on.predicted == hole.predicted
    others[hole.members] = False
    if others.sum() < 2:
        return int(own.argmax())
    spread, mean = torch.std_mean(mass[others].double(), dim=0)
    return int(((own - mean) / spread.clamp_min(torch.finfo(spread.dtype).tiny)).nan_to_num(0.0).argmax())


def _branches(on: Ground, rows: Tensor) -> list[tuple[float, Tensor]]:
    """Branches of one predicted class's tree that fail more than usual: (log likelihood ratio, rows)."""
    if len(rows) < LEAST_SUPPORT or not on.place.shape[1]:
        return []
    joins = linkage(on.place[rows].numpy(), "ward")[:, :2].astype(int)
    leaves = [[i] for i in range(len(rows))]
    for left, right in joins:
        leaves.append(leaves[left] + leaves[right])
    size = np.array([len(inside) for inside in leaves])
    failed = on.failed[rows].numpy()
    failures = np.array([failed[inside].sum() for inside in leaves])
    ratio = _ratio(failures, size, int(on.failed.sum()), len(on.failed))
    good = (size >= LEAST_SUPPORT) & (failures >= LEAST_FAILURES) & (failures > size * on.base_rate)
    return [(ratio[k], rows[leaves[k]]) for k in np.flatnonzero(good & (ratio >= LEAST_RATIO))]


def _ratio(e: NDArray[np.int64], n: NDArray[np.int64], all_e: int, all_n: int) -> NDArray[np.float64]:
    """Log likelihood ratio of two failure rates, inside and outside, against one."""

    def best(a: NDArray[np.int64] | int, b: NDArray[np.int64] | int) -> NDArray[np.float64]:
        b = np.maximum(b, 1)
        return np.asarray(xlogy(a, a / b) + xlogy(b - a, 1 - a / b))

    return best(e, n) + best(all_e - e, all_n - n) - best(all_e, all_n)


def _nearest(on: Ground, place: Tensor, predicted: Tensor, apart: bool = False) -> tuple[Tensor, Tensor]:
    """Distances (R, K) to the nearest labelled queries of the same predicted class, infinite where there are no more.

    apart: the places are those of the labelled queries, which do not count themselves.
    """
    distance = torch.cdist(place, on.place).masked_fill(predicted[:, None] != on.predicted, torch.inf)
    if apart:
        distance.fill_diagonal_(torch.inf)
    nearest, near = distance.topk(min(NEAREST, len(on.failed)), largest=False)
    return nearest, near


def _rates(on: Ground, distance: Tensor, near: Tensor) -> Tensor:
    """Failure rates among neighbours (R, K), the nearer the weightier, and one more that fails as often as all do."""
    width = distance[:, distance.shape[1] // 2, None].clamp(torch.finfo(distance.dtype).tiny, 1e300)
    weight = torch.exp(-0.5 * (distance / width) ** 2)
    return (weight * on.failed[near].double()).sum(1).add(on.base_rate) / weight.sum(1).add(1)

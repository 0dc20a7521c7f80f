"""Natural holes on mass with known faults: what is planted is found, and nothing where there is nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from brittle.errors import DataError, NotFiniteError
from brittle.natural_holes import (
    LEAST_FAILURES,
    LEAST_SUPPORT,
    MOST,
    NEAREST,
    Ground,
    ground,
    held_up_by,
    natural_holes,
    where,
)

GROUPS, BLOB, FAULTY = 6, 60, 2


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(seed: int = 0, fails: float = 0.8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mass of six blobs of queries, three a predicted class; those of blob `FAULTY` fail often, the others seldom."""
    draws = seeded(seed)
    blob = torch.arange(6).repeat_interleave(BLOB)
    mass = 4 * torch.eye(GROUPS, dtype=torch.float64)[blob]
    mass += torch.randn(len(blob), GROUPS, generator=draws, dtype=torch.float64)
    failed = torch.rand(len(blob), generator=draws) < torch.where(blob == FAULTY, fails, 0.04)
    return mass, blob // 3, failed, blob


def found(seed: int = 0) -> tuple[Ground, Tensor]:
    mass, predicted, failed, blob = blobs(seed)
    return ground(mass, predicted, failed), blob


@pytest.mark.parametrize("seed", range(3))
def test_the_faulty_blob_is_the_first_hole(seed: int) -> None:
    on, blob = found(seed)
    first = natural_holes(on)[0]
    assert first.predicted == FAULTY // 3
    assert (blob[first.members] == FAULTY).double().mean() > 0.9
    assert first.support > 0.8 * BLOB
    assert abs(first.predicted_rate - 0.8) < 0.15
    assert blob[first.exemplar] == FAULTY


@pytest.mark.parametrize("seed", range(3))
def test_the_rule_finds_new_members_without_their_labels(seed: int) -> None:
    on, _ = found(seed)
    holes = natural_holes(on)
    mass, predicted, _, blob = blobs(seed + 100)
    found_there = where(holes, on, mass, predicted)
    number, rate = found_there.number, found_there.rate
    inside = number == 0
    assert (blob[inside] == FAULTY).double().mean() > 0.9
    assert inside[blob == FAULTY].double().mean() > 0.8
    assert rate[blob == FAULTY].mean() > 0.6
    assert rate[blob != FAULTY].mean() < 0.12


def test_failures_dealt_at_random_make_small_holes_if_any() -> None:
    mass, predicted, failed, _ = blobs()
    supports = []
    for seed in range(10):
        dealt = failed[torch.randperm(len(failed), generator=seeded(seed))]
        supports += [hole.support for hole in natural_holes(ground(mass, predicted, dealt))]
    assert len(supports) < 30
    assert max(supports, default=0) < BLOB / 2


@pytest.mark.parametrize("seed", range(3))
def test_holes_are_apart_ranked_and_of_one_class(seed: int) -> None:
    on, _ = found(seed)
    holes = natural_holes(on)
    members = torch.cat([hole.members for hole in holes])
    assert len(members) == len(members.unique())
    sizes = [hole.predicted_rate * hole.support for hole in holes]
    assert sizes == sorted(sizes, reverse=True)
    for hole in holes:
        assert hole.support >= LEAST_SUPPORT
        assert on.failed[hole.members].sum() >= LEAST_FAILURES
        assert on.failed[hole.members].double().mean() > on.base_rate
        assert (on.predicted[hole.members] == hole.predicted).all()
        assert hole.exemplar in hole.members
    assert len(natural_holes(on, most=1)) == 1 <= len(holes) <= MOST


def test_holes_do_not_depend_on_the_order_of_queries_or_on_the_units_of_mass() -> None:
    mass, predicted, failed, _ = blobs()
    expected = {frozenset(h.members.tolist()) for h in natural_holes(ground(mass, predicted, failed))}
    order = torch.randperm(len(mass), generator=seeded(1))
    turned = ground(mass[order], predicted[order], failed[order])
    assert {frozenset(order[h.members].tolist()) for h in natural_holes(turned)} == expected
    mixed = mass @ torch.randn(GROUPS, GROUPS, generator=seeded(2), dtype=torch.float64) * 1000 + 7
    assert {frozenset(h.members.tolist()) for h in natural_holes(ground(mixed, predicted, failed))} == expected


def test_a_group_that_says_nothing_changes_nothing() -> None:
    mass, predicted, failed, _ = blobs()
    wider = torch.cat([mass, torch.full((len(mass), 1), 3.0)], dim=1)
    both = [natural_holes(ground(m, predicted, failed)) for m in (mass, wider)]
    assert [h.members.tolist() for h in both[0]] == [h.members.tolist() for h in both[1]]


def test_rates_are_those_of_neighbours_of_the_same_predicted_class() -> None:
    """One loop a query; a query that was labelled does not count itself."""
    on, _ = found()
    holes = natural_holes(on)
    for hole in holes[:2]:
        for m, rate in zip(hole.members.tolist()[:5], hole.rate.tolist(), strict=False):
            peers = [k for k in range(len(on.failed)) if k != m and on.predicted[k] == on.predicted[m]]
            near = sorted((math.dist(on.place[k], on.place[m]), k) for k in peers)[:NEAREST]
            width = near[NEAREST // 2][0]
            weights = [math.exp(-0.5 * (d / width) ** 2) for d, _ in near]
            failures = sum(w for w, (_, k) in zip(weights, near, strict=True) if on.failed[k])
            assert rate == pytest.approx((failures + on.base_rate) / (sum(weights) + 1), rel=1e-9)


def test_an_input_of_a_class_that_no_query_was_given_lies_nowhere() -> None:
    on, _ = found()
    nowhere = where(natural_holes(on), on, on.place.new_zeros(2, GROUPS), torch.tensor([5, 5]))
    assert nowhere.number.tolist() == [-1, -1]
    assert nowhere.rate.tolist() == pytest.approx([on.base_rate] * 2)


def test_where_all_mass_is_alike_there_is_no_hole() -> None:
    mass, predicted, failed, _ = blobs()
    on = ground(torch.full_like(mass, 3.0), predicted, failed)
    assert natural_holes(on) == []
    assert (where([], on, mass, predicted).number == -1).all()


@pytest.mark.parametrize("outcome", [True, False])
def test_where_all_fail_or_none_does_there_is_no_hole(outcome: bool) -> None:
    mass, predicted, failed, _ = blobs()
    assert natural_holes(ground(mass, predicted, torch.full_like(failed, outcome))) == []


def test_a_hole_is_held_up_by_the_group_that_sets_it_apart() -> None:
    mass, predicted, failed, _ = blobs()
    mass = mass + torch.tensor([50.0, 0, 0, 0, 0, 0])  # much mass everywhere tells nothing
    on = ground(mass, predicted, failed)
    assert held_up_by(natural_holes(on)[0], on, mass) == FAULTY


def test_wrong_queries_are_named() -> None:
    mass, predicted, failed, _ = blobs()
    with pytest.raises(DataError, match="found none"):
        ground(mass[:0], predicted[:0], failed[:0])
    mass[3, 1] = torch.nan
    with pytest.raises(NotFiniteError, match="must be finite"):
        ground(mass, predicted, failed)

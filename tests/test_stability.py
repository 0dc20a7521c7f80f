"""Holes over trainings: whole where they come back, at chance where they do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from brittle.agreement.stability import best_overlap, hole_stability


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def regions(count: int, seed: int, m: int = 300, share: float = 0.1) -> Tensor:
    return torch.rand(count, m, generator=seeded(seed)) < share


CLASSES = torch.arange(300) % 5


def test_the_best_overlap_is_that_of_sets() -> None:
    own, other = regions(4, 0), regions(6, 1)
    sets = [[set(row.nonzero()[:, 0].tolist()) for row in rows] for rows in (own, other)]
    expected = [max(len(a & b) / len(a | b) for b in sets[1]) for a in sets[0]]
    assert best_overlap(own, other).tolist() == pytest.approx(expected)


def test_holes_that_come_back_are_whole_in_any_order() -> None:
    own = regions(5, 0)
    found = hole_stability([own, own.flip(0), own], CLASSES, seeded())
    assert found.overlap == 1
    assert found.chance is not None
    assert found.chance < 0.3


def test_half_that_come_back_count_half() -> None:
    own, other = regions(2, 0), regions(2, 0)
    other[1] = False
    found = hole_stability([own, other], CLASSES, seeded())
    best = float((own[0] & own[1]).sum()) / float((own[0] | own[1]).sum())
    assert found.overlap == pytest.approx((1 + best + 1) / 3), "three holes with members: two of one, one of the other"


def test_holes_of_other_inputs_overlap_by_chance() -> None:
    """Regions within classes, drawn anew in each training."""
    in_class = torch.arange(5)[:, None] == CLASSES
    drawn = [regions(5, seed, share=0.4) & in_class for seed in range(4)]
    found = hole_stability(drawn, CLASSES, seeded())
    assert found.overlap == pytest.approx(found.chance, abs=0.03)
    assert found.chance is not None
    assert found.chance > 0.2, "holes of one class overlap, and that says nothing"


def test_without_holes_there_is_nothing_to_find_again() -> None:
    none = torch.zeros(0, 300, dtype=torch.bool)
    assert hole_stability([none, none], CLASSES, seeded()).overlap is None
    assert hole_stability([regions(3, 0), none], CLASSES, seeded()).overlap == 0

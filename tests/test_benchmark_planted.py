"""Plants put in the fault that they say, on drawn images; and a plant is judged by its ten most suspect inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.prediction.planted import PLANTS, QUICK, by_confidence, judge, natural
from benchmarks.prediction.plants import KEPT, MAKERS, SIDE, Known, Plant, Planted
from brittle.data import Examples
from brittle.natural_holes import NaturalMap

COUNT = 800


def drawn(seed: int) -> Examples:
    """Dark images that show their class, a row of it bright."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (COUNT,), generator=draws)
    images = 0.4 * torch.rand(COUNT, 1, 28, 28, generator=draws)
    images[torch.arange(COUNT), 0, 2 * labels + 5] += 0.5
    return Examples(images, labels)


TRAIN, TEST = drawn(0), drawn(1)


def made(plant: Plant) -> Planted:
    return MAKERS[plant.kind](plant, TRAIN, TEST, torch.Generator().manual_seed(plant.seed))


def test_there_are_at_least_three_of_each_kind_and_each_is_there_once() -> None:
    kinds = [p.kind for p in PLANTS]
    assert {kind: kinds.count(kind) >= 3 for kind in MAKERS} == dict.fromkeys(MAKERS, True)
    assert len(set(PLANTS)) == len(PLANTS) >= 12
    assert {p.kind for p in QUICK} == set(MAKERS)


@pytest.mark.parametrize(("kind", "left"), [("removed", 0), ("rare", KEPT)])
def test_a_class_is_left_out_of_its_superclass(kind: str, left: int) -> None:
    found = made(Plant(kind, "MNIST", 3))  # type: ignore[arg-type]
    lacks = TEST.targets[found.members].unique()
    assert len(lacks) == 1
    assert torch.equal(found.members, TEST.targets == lacks)
    original = {image.sum().item(): int(label) for image, label in zip(TRAIN.inputs, TRAIN.targets, strict=True)}
    labels = [original[image.sum().item()] for image in found.train.inputs]
    assert labels.count(int(lacks)) == left
    assert set(found.train.targets.tolist()) == {0, 1}
    pairs = {*zip(labels, found.train.targets.tolist(), strict=True)}
    assert len(pairs) == (10 if left else 9)
    assert {*zip(TEST.targets.tolist(), found.test.targets.tolist(), strict=True)} >= pairs


def test_a_cluster_of_one_class_bears_one_other_label() -> None:
    found = made(Plant("mislabelled", "MNIST", 3))
    changed = found.train.targets != TRAIN.targets
    assert torch.equal(changed, found.relabelled)
    assert changed.any()
    own, other = TRAIN.targets[changed].unique(), found.train.targets[changed].unique()
    assert len(own) == len(other) == 1
    assert 0 < changed.sum() < (TRAIN.targets == own).sum()
    assert torch.equal(found.test.targets, TEST.targets)
    assert (TEST.targets[found.members] == own).all()
    assert 0 < found.members.sum() < (TEST.targets == own).sum()


def test_a_square_goes_with_one_class_in_training_and_with_any_at_test() -> None:
    found = made(Plant("patch", "MNIST", 3))
    bears = lambda now, before: (now.inputs != before.inputs).flatten(1).any(1)  # noqa: E731
    train, test = bears(found.train, TRAIN), bears(found.test, TEST)
    own = TRAIN.targets[train].unique()
    assert len(own) == 1
    assert torch.equal(train, TRAIN.targets == own)
    assert torch.equal(found.members, test & (TEST.targets != own))
    assert 0.08 < test.double().mean() < 0.22
    square = (found.test.inputs == 1).sum((1, 2, 3))
    assert (square[test] == SIDE**2).all()


def known(members: Tensor, failed: Tensor, logits: Tensor, place: Tensor) -> Known:
    empty = Examples(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    none = torch.zeros(0, dtype=torch.bool)
    planted = Planted(empty, empty, members, none, ("a", "b"), "")
    return Known(place, place, logits, failed, torch.zeros(0, dtype=torch.int64), planted)


def test_precision_is_that_of_the_ten_of_highest_rate_in_the_best_of_ten_regions() -> None:
    members = torch.arange(60) % 10 < 7
    k = known(members, members, torch.zeros(60, 2), torch.zeros(60, 1))
    number, rate = torch.arange(60) // 20, -torch.arange(60.0)
    rate[20:40] += 100 * members[20:40]
    best = judge(NaturalMap([], number, rate), k, torch.arange(60))
    assert (best.found, best.precision_at_ten, best.rank) == (True, 1.0, 2)
    best = judge(NaturalMap([], number + 10, rate), k, torch.arange(60))
    assert (best.found, best.precision_at_ten, best.rank) == (False, 0.0, None)
    few = judge(NaturalMap([], torch.where(torch.arange(60) < 9, 0, -1), rate), k, torch.arange(60))
    assert few.rank is None


def test_regions_are_made_without_labels_of_sealed_inputs() -> None:
    draws = torch.Generator().manual_seed(0)
    place, logits = torch.randn(400, 4, generator=draws), torch.randn(400, 3, generator=draws)
    failed = torch.arange(400) % 4 == 0
    place[failed] += 5
    k = known(failed, failed, logits, place)
    other = replace(k, failed=torch.cat([failed[:200], ~failed[200:]]))
    labelled, sealed = torch.arange(400).chunk(2)
    for make in (lambda *given: natural(k.mass, *given), by_confidence):
        ours, theirs = (make(given, labelled, sealed) for given in (k, other))
        assert torch.equal(ours.number, theirs.number)
        assert torch.equal(ours.rate, theirs.rate)
    assert judge(natural(k.mass, k, labelled, sealed), k, sealed).found

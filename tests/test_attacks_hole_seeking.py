"""The hole-seeking attack: where the map sends it, what it reports, and that it gets through."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attack_cases import (
    Counter,
    blob_problem,
    blob_subject,
    generator,
    linear_distance,
    linear_guide,
    linear_model,
    linear_problem,
    right_queries,
)

from brittle.attacks import Guide, seek_holes
from brittle.attacks.descent import Descent, descend, half_cosine
from brittle.attacks.geometry import size
from brittle.attacks.problem import Problem
from brittle.attacks.route import random_bearing, take_bearing
from brittle.attacks.search import Search
from brittle.errors import DataError
from brittle.records import Norm, Pairs
from brittle.subject import Subject

NORMS: tuple[Norm, ...] = ("l2", "linf")


@pytest.fixture(scope="module")
def subject() -> Subject:
    return blob_subject()


def blobs(subject: Subject, norm: Norm) -> Problem:
    return blob_problem(subject, right_queries(subject, 40), norm)


@pytest.mark.parametrize("guide", ["gradient", "random"])
@pytest.mark.parametrize("norm", NORMS)
def test_it_ends_in_misclassification_on_a_trained_network(subject: Subject, norm: Norm, guide: str) -> None:
    problem = blobs(subject, norm)
    rows, _ = seek_holes(problem, guide, generator=generator())
    assert rows.success.all()
    assert torch.equal(problem.logits(rows.adversarials).argmax(1), rows.new_class)
    assert (rows.new_class != problem.labels).all()
    assert rows.adversarials.min() >= 0
    assert rows.adversarials.max() <= 1


@pytest.mark.parametrize("norm", NORMS)
def test_it_returns_the_nearest_success_it_ever_saw(subject: Subject, norm: Norm) -> None:
    """Every point that the model was asked about is looked at again, apart from the attack's own book-keeping."""
    problem = blobs(subject, norm)
    asked: list[torch.Tensor] = []

    def logits(inputs: torch.Tensor) -> torch.Tensor:
        asked.append(inputs.detach().clone())
        return problem.logits(inputs)

    rows, _ = seek_holes(replace(problem, logits=logits), generator=generator())
    seen = torch.stack([points for points in asked if len(points) == len(problem)])  # shape: (K, B, *input)
    far = torch.stack([size(points - problem.inputs, norm) for points in seen])
    wrong = torch.stack([problem.fooled(problem.logits(points)) for points in seen])
    nearest = torch.where(wrong, far, torch.inf).amin(0)
    torch.testing.assert_close(rows.distance.float(), nearest, rtol=1e-5, atol=0)


def test_further_tracks_lead_into_every_other_rival() -> None:
    """With a track for each of the four rivals and a free one, every input visits every wrong class."""
    problem = linear_problem("l2", at_bounds=False)
    visited = torch.zeros(len(problem), 5, dtype=torch.bool)

    def logits(inputs: torch.Tensor) -> torch.Tensor:
        values = problem.logits(inputs)
        if len(inputs) == len(problem):
            visited[torch.arange(len(problem)), values.argmax(1)] = True
        return values

    seek_holes(replace(problem, logits=logits), generator=generator(), steps=200, tracks=5)
    assert visited.all()


def test_the_line_search_halves_the_gap_to_the_boundary() -> None:
    problem = linear_problem("l2", at_bounds=False, classes=2)
    least = linear_distance(problem)
    weight = linear_model(problem).weight
    normal = weight[1 - problem.labels] - weight[problem.labels]
    way = normal / normal.norm(dim=1, keepdim=True)
    search = Search(replace(problem, bounds=(-50.0, 50.0)))
    search.look(problem.inputs + 3 * least[:, None] * way)
    inside = ((problem.inputs + 3 * least[:, None] * way - 1).abs() < 2).all(1)  # the box plays no part
    search.pull_in(9)
    assert inside.sum() >= 5
    assert (search.best[inside] <= (1 + 3 / 2**9) * least[inside]).all()
    assert search.evaluations.tolist() == [10] * len(problem)


@pytest.mark.parametrize("norm", NORMS)
def test_a_target_is_reached_and_lies_no_nearer_than_any_class(subject: Subject, norm: Norm) -> None:
    problem = blobs(subject, norm)
    free, _ = seek_holes(problem, generator=generator())
    for shift in (1, 2):
        targets = (problem.labels + shift) % 3
        rows, _ = seek_holes(problem.aimed(targets), generator=generator())
        assert rows.success.all()
        assert torch.equal(rows.new_class, targets)
        assert (rows.distance >= 0.98 * free.distance).all()


@pytest.mark.parametrize("norm", NORMS)
def test_a_bearing_ranks_rivals_by_the_distance_of_their_plane(norm: Norm) -> None:
    """The groups' weights cancel; only all of them together are the model's."""
    problem = linear_problem(norm, at_bounds=False)
    search, guide = Search(problem), linear_guide(problem)
    clean = search.look(problem.inputs)
    bearing = take_bearing(search, guide, clean, 4, generator())
    weight = linear_model(problem).weight
    for b in range(len(problem)):
        y = int(problem.labels[b])
        normal = weight[y] - weight[bearing.rivals[b]]  # shape: (K, D)
        size = normal.norm(dim=1) if norm == "l2" else normal.abs().sum(1)
        torch.testing.assert_close(bearing.tip[b], (clean[b, y] - clean[b, bearing.rivals[b]]) / size)
    assert (bearing.tip.diff(dim=1) >= 0).all()
    assert search.evaluations.tolist() == [1 + 4 * guide.evaluations] * len(problem)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_a_bearing_weighs_the_slope_beside_the_margin(power: float) -> None:
    problem = linear_problem("l2", at_bounds=False)
    search = Search(problem)
    clean = search.look(problem.inputs)
    bearing = take_bearing(search, linear_guide(problem), clean, 4, generator(), power)
    margin = clean.gather(1, problem.labels[:, None]) - clean.gather(1, bearing.rivals)
    rate = margin / bearing.tip  # what it falls by per unit of distance
    assert ((margin / rate**power).diff(dim=1) >= 0).all()
    orders = {tuple(row) for row in margin.argsort(1).tolist()}
    assert (len(orders) == 1) == (power == 0)  # the margin alone does not rank them as the others do


def test_the_first_track_starts_beyond_the_boundary_that_the_map_predicts() -> None:
    problem = linear_problem("l2", at_bounds=False)
    asked: list[torch.Tensor] = []

    def logits(inputs: torch.Tensor) -> torch.Tensor:
        asked.append(inputs.detach().clone())
        return problem.logits(inputs)

    guide = linear_guide(problem)
    seek_holes(replace(problem, logits=logits), guide, generator=generator(), traced=False)
    search = Search(problem)
    bearing = take_bearing(search, guide, search.look(problem.inputs), 5, generator(), power=0.5)
    expected = bearing.start(problem, torch.zeros_like(problem.labels), share=1.5)
    assert torch.equal(asked[0], problem.inputs)
    torch.testing.assert_close(asked[1], expected)
    assert not torch.equal(asked[1], problem.inputs)


def test_a_bearing_points_at_its_rival() -> None:
    problem = linear_problem("l2", at_bounds=False)
    search = Search(problem)
    bearing = take_bearing(search, linear_guide(problem), search.look(problem.inputs), 4, generator())
    first = torch.zeros(len(problem), dtype=torch.int64)
    near = bearing.start(problem, first, 0.99)
    beyond = bearing.start(problem, first, 1.01)
    free = ((beyond > problem.bounds[0]) & (beyond < problem.bounds[1])).all(1)  # the plane's foot is in the box
    assert free.sum() >= 5
    assert torch.equal(problem.logits(beyond).argmax(1)[free], bearing.rivals[free, 0])
    assert torch.equal(problem.logits(near).argmax(1)[free], problem.labels[free])


def test_the_rival_with_the_smallest_logit_comes_first_if_its_plane_is_nearest() -> None:
    weight = torch.eye(9, 8, dtype=torch.float64)
    weight[8] = -6.0
    bias = torch.tensor([0.0, *[-1.0] * 7, 23.4], dtype=torch.float64)  # planes at 0.71 and, for the last, at 0.06
    inputs = torch.full((1, 8), 0.5, dtype=torch.float64)
    problem = Problem(lambda x: x @ weight.T + bias, inputs, torch.tensor([0]), "l2", (-2.0, 2.0))
    search = Search(problem)
    clean = search.look(inputs)
    assert int(clean.argmin()) == 8
    assert take_bearing(search, Guide.margin(problem), clean, 8, generator()).rivals[0, 0] == 8
    assert 8 not in take_bearing(search, Guide.margin(problem), clean, 3, generator()).rivals
    rows, _ = seek_holes(problem, generator=generator(), candidates=8)
    assert rows.new_class.tolist() == [8]
    assert rows.distance.item() == pytest.approx(1.1 / (weight[0] - weight[8]).norm().item(), rel=0.01)


def test_random_bearings_rank_every_rival_and_start_at_the_input() -> None:
    problem = linear_problem("l2", at_bounds=False)
    bearing = random_bearing(problem, problem.logits(problem.inputs), 4, generator())
    for b in range(len(problem)):
        assert sorted([int(problem.labels[b]), *bearing.rivals[b].tolist()]) == list(range(5))
    assert len({tuple(row) for row in bearing.rivals.tolist()}) > 10
    start = bearing.start(problem, torch.zeros(len(problem), dtype=torch.int64), 0.5)
    assert torch.equal(start, problem.inputs)


def test_a_route_names_the_groups_that_leave_and_arrive() -> None:
    problem = linear_problem("l2", at_bounds=False)
    guide = linear_guide(problem)
    rows, route = seek_holes(problem, guide, generator=generator(), candidates=4)
    assert route is not None
    pairs = Pairs(problem.labels, rows.new_class)
    before, after = guide.mass(problem.inputs, pairs), guide.mass(rows.adversarials, pairs)
    torch.testing.assert_close(route.before, before)
    torch.testing.assert_close(route.after, after)
    assert torch.equal(route.rival, rows.new_class)
    for b in range(len(problem)):
        fall = {g: (before[b, g] - after[b, g]).item() for g in range(len(guide.classes))}
        held = [g for g in fall if before[b, g] > 0]
        rivals = [g for g in fall if guide.classes[g] == rows.new_class[b]]
        assert route.leaving[b] == max(held, key=fall.__getitem__)
        assert route.arriving[b] == max(rivals, key=fall.__getitem__)
    lost = (before - after).sum(1)
    margin = problem.margin(problem.logits(problem.inputs))
    assert (lost > 0.9 * margin).all()  # what all groups lost is the margin that is gone


def test_the_maps_passes_are_charged() -> None:
    problem = linear_problem("l2", at_bounds=False)
    guide, counter, calls = linear_guide(problem), Counter(problem.logits), [0]

    def mass(inputs: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        calls[0] += len(inputs)
        return guide.mass(inputs, pairs)

    counted = Guide(mass, guide.classes, guide.evaluations)
    rows, _ = seek_holes(replace(problem, logits=counter), counted, generator=generator(), candidates=3)
    assert calls[0] == 5 * len(problem)  # three rivals, and the route before and after
    assert int(rows.evaluations.sum()) == counter.passes + calls[0] * guide.evaluations
    silent, route = seek_holes(problem, guide, generator=generator(), candidates=3, traced=False)
    assert route is None
    assert (rows.evaluations - silent.evaluations).tolist() == [2 * guide.evaluations] * len(problem)


def test_a_map_with_other_groups_is_refused() -> None:
    problem = linear_problem("l2", at_bounds=False)
    guide = linear_guide(problem)
    with pytest.raises(DataError, match="5 groups apart, found 6"):
        seek_holes(problem, replace(guide, classes=guide.classes[:5]), generator=generator())


def test_a_failed_search_has_no_route() -> None:
    """A model that nothing in the bounds can turn."""
    problem = linear_problem("linf", at_bounds=False)
    sure = replace(problem, logits=lambda x: problem.logits(x) + 1e3 * torch.eye(5, dtype=x.dtype)[problem.labels])
    rows, route = seek_holes(sure, linear_guide(problem), generator=generator(), steps=30)
    assert route is not None
    assert not rows.success.any()
    assert rows.distance.isinf().all()
    assert torch.equal(rows.adversarials, problem.inputs)
    assert (route.rival == -1).all()
    assert (route.leaving == -1).all()
    assert (route.arriving == -1).all()


def test_vanishing_gradients_end_in_a_success_by_chance_or_in_a_failure(subject: Subject) -> None:
    """Logits rounded to whole numbers have no slope: the search goes on at random, and stays finite."""
    problem = blobs(subject, "l2")
    flat = replace(problem, logits=lambda x: problem.logits(x).round() + 0 * x.flatten(1).sum(1, keepdim=True))
    rows, _ = seek_holes(flat, generator=generator())
    assert rows.adversarials.isfinite().all()
    assert (flat.logits(rows.adversarials).argmax(1) != problem.labels)[rows.success].all()


@pytest.mark.parametrize("norm", NORMS)
def test_a_longer_descent_comes_no_less_near(subject: Subject, norm: Norm) -> None:
    problem = blobs(subject, norm)
    scale = problem.margin(problem.logits(problem.inputs)).detach()
    nearest = []
    for steps in (10, 40, 160):
        search = Search(problem)
        descend(problem, search, problem.inputs, scale, Descent(), steps, generator())
        assert search.evaluations.tolist() == [steps] * len(problem)
        nearest.append(search.best.log().mean().item())
    assert nearest[0] > nearest[1] > nearest[2] - 1e-3


def test_half_cosine_falls_from_first_to_last() -> None:
    assert half_cosine(0.0, 2.0, 0.1) == pytest.approx(2.0)
    assert half_cosine(0.5, 2.0, 0.1) == pytest.approx(1.05)
    assert half_cosine(1.0, 2.0, 0.1) == pytest.approx(0.1)

"""The predicted distance: linear models, where it is known; what it costs; and through other networks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attack_cases import Counter, generator, linear_distance, linear_problem
from torch import Tensor, nn

from brittle.attacks.geometry import size
from brittle.attacks.problem import Logits, Problem
from brittle.attacks.reach import reach
from brittle.records import Norm

NORMS: tuple[Norm, ...] = ("l2", "linf")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("at_bounds", [False, True])
def test_ten_passes_come_near_the_distance_of_a_linear_model(norm: Norm, at_bounds: bool) -> None:
    problem = linear_problem(norm, at_bounds)
    ratio = reach(problem, 10).radius / linear_distance(problem)
    assert (ratio.median() - 1).abs() < 0.02
    assert ((ratio > 0.9) & (ratio < 1.25)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_where_two_classes_are_linear_and_bounds_do_not_matter_the_first_pass_knows(norm: Norm) -> None:
    problem = replace(linear_problem(norm, False, classes=2), bounds=(-100.0, 100.0))
    torch.testing.assert_close(reach(problem, 1).roots[0], linear_distance(problem), rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_points_stay_within_the_radius_and_the_bounds(norm: Norm) -> None:
    problem = linear_problem(norm, True)
    found = reach(problem, 7)
    assert found.far.shape == found.lead.shape == found.slope.shape == (7, len(problem))
    low, high = problem.bounds
    assert ((found.points >= low) & (found.points <= high)).all()
    assert (size(found.points - problem.inputs, norm) <= found.radius * (1 + 1e-6)).all()


def test_each_pass_is_one_question_and_one_more_is_for_the_clean_margin() -> None:
    problem = linear_problem("l2", False)
    asked = Counter(problem.logits)
    reach(replace(problem, logits=asked), 6)
    assert asked.passes == 7 * len(problem)


def test_through_other_networks_the_own_one_gives_no_gradient() -> None:
    problem = linear_problem("linf", False)
    others = [Counter(problem.logits) for _ in range(2)]
    through = reach(replace(problem, logits=_without_gradient(problem)), 10, through=others)
    assert [other.passes for other in others] == [5 * len(problem)] * 2
    torch.testing.assert_close(through.radius, reach(problem, 10).radius)


def test_the_curve_of_a_network_is_followed_beyond_its_first_kinks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)).double()
    inputs = 3 * torch.randn(40, 12, generator=generator(), dtype=torch.float64)
    problem = Problem(model, inputs, model(inputs).argmax(1), "l2", (-20.0, 20.0))
    short, once, long = (reach(problem, steps).radius for steps in (10, 1, 200))
    off = lambda radius: (radius / long - 1).abs().median()  # noqa: E731
    assert off(short) < off(once) / 2


def _without_gradient(problem: Problem) -> Logits:
    def logits(inputs: Tensor) -> Tensor:
        assert not inputs.requires_grad
        return problem.logits(inputs)

    return logits

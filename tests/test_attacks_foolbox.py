"""The hole-seeking attack within a distance, and as an attack of foolbox's."""

from __future__ import annotations

from dataclasses import replace

import foolbox
import pytest
import torch
from attack_cases import (
    Linear,
    generator,
    linear_distance,
    linear_guide,
    linear_model,
    linear_problem,
    linear_worst_margin,
)
from torch import Tensor, nn

from brittle.attacks import HoleSeekingAttack, seek_holes_within
from brittle.attacks.problem import Problem
from brittle.errors import UsageError
from brittle.records import Norm

NORMS: tuple[Norm, ...] = ("l2", "linf")


class Wrapped(nn.Module):
    """A linear model as foolbox wants it."""

    def __init__(self, model: Linear) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)


def for_foolbox(problem: Problem) -> foolbox.PyTorchModel:
    return foolbox.PyTorchModel(Wrapped(linear_model(problem)).eval(), bounds=problem.bounds, device="cpu")


@pytest.mark.parametrize("at_bounds", [False, True], ids=["inside", "at the bounds"])
@pytest.mark.parametrize("norm", NORMS)
def test_foolbox_gets_the_optimum_of_a_linear_model(norm: Norm, at_bounds: bool) -> None:
    problem = linear_problem(norm, at_bounds)
    least = linear_distance(problem)
    attack = HoleSeekingAttack(norm)
    epsilons = [least.median().item() * 1.001, None]
    raw, clipped, success = attack(for_foolbox(problem), problem.inputs, problem.labels, epsilons=epsilons)
    assert success[1].all()
    far = attack.distance(problem.inputs, raw[1])
    assert (far <= 1.05 * least).all()
    clear = (least / epsilons[0] - 1).abs() > 0.05
    assert torch.equal(success[0][clear], (least < epsilons[0])[clear])
    assert (attack.distance(problem.inputs, clipped[0]) <= epsilons[0] * (1 + 1e-5)).all()
    assert attack.rows is not None
    assert (attack.rows.evaluations <= 105).all()


def test_foolbox_may_name_targets() -> None:
    problem = linear_problem("l2", at_bounds=False, targeted=True)
    assert problem.targets is not None
    attack = HoleSeekingAttack("l2", guide=linear_guide(problem))
    goal = foolbox.criteria.TargetedMisclassification(problem.targets)
    raw, _, success = attack(for_foolbox(problem), problem.inputs, goal, epsilons=None)
    assert success.all()
    assert torch.equal(linear_model(problem)(raw).argmax(1), problem.targets)
    assert ((raw - problem.inputs).norm(dim=1) <= 1.05 * linear_distance(problem)).all()
    assert attack.route is not None
    assert torch.equal(attack.route.rival, problem.targets)


def test_epsilons_let_an_input_go_early() -> None:
    problem = linear_problem("l2", at_bounds=False)
    attack = HoleSeekingAttack("l2")
    far = 3 * linear_distance(problem).max().item()
    _, _, success = attack(for_foolbox(problem), problem.inputs, problem.labels, epsilons=far)
    assert success.all()
    assert attack.rows is not None
    assert (attack.rows.evaluations < 60).all()


def test_other_norms_criteria_and_arguments_are_refused() -> None:
    problem = linear_problem("l2", at_bounds=False)
    with pytest.raises(UsageError, match="l2 and linf, found 'l1'"):
        HoleSeekingAttack("l1")  # type: ignore[arg-type]
    attack, model = HoleSeekingAttack("l2"), for_foolbox(problem)
    with pytest.raises(TypeError, match="speed"):
        attack(model, problem.inputs, problem.labels, epsilons=None, speed=1)


@pytest.mark.parametrize("guided", [False, True], ids=["gradient", "map"])
@pytest.mark.parametrize("norm", NORMS)
def test_within_a_distance_it_reaches_the_closed_form_margin(norm: Norm, guided: bool) -> None:
    problem = linear_problem(norm, at_bounds=True, classes=2)
    epsilon = {"l2": 2.4, "linf": 0.8}[norm]
    worst = linear_worst_margin(problem, epsilon)
    guide = linear_guide(problem) if guided else "gradient"
    rows, route = seek_holes_within(problem, epsilon, guide, generator=generator())
    margin, fooled = problem.margin(problem.logits(rows.adversarials)), worst < -1e-6
    assert fooled.double().mean() > 0.5
    assert torch.equal(rows.success, fooled)
    assert (margin[fooled] <= 0.99 * worst[fooled]).all()
    assert (rows.distance[fooled] <= epsilon * (1 + 1e-6)).all()
    assert (route is not None) == guided


@pytest.mark.parametrize("norm", NORMS)
def test_within_a_distance_it_goes_for_the_rival_that_gives_way(norm: Norm) -> None:
    """Five classes: all whose nearest plane lies within reach are fooled, and the map's cost is counted."""
    problem = linear_problem(norm, at_bounds=False)
    least, guide = linear_distance(problem), linear_guide(problem)
    epsilon = least.median().item() * 1.001
    rows, route = seek_holes_within(problem, epsilon, guide, generator=generator())
    clear = (least / epsilon - 1).abs() > 0.01
    assert torch.equal(rows.success[clear], (least < epsilon)[clear])
    assert (rows.evaluations <= 100 + (4 + 2) * guide.evaluations).all()
    assert route is not None
    assert torch.equal(route.rival >= 0, rows.success)
    early, _ = seek_holes_within(problem, epsilon, guide, generator=generator(), early=True)
    assert torch.equal(early.success, rows.success)
    assert (early.evaluations[early.success] < rows.evaluations[early.success]).all()
    capped, _ = seek_holes_within(replace(problem, cap=20), epsilon, generator=generator())
    assert (capped.evaluations <= 20).all()

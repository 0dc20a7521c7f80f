"""Attacks on models whose nearest adversarial or worst margin is known."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attack_cases import (
    Counter,
    generator,
    linear_distance,
    linear_guide,
    linear_model,
    linear_problem,
    linear_vicinity,
    linear_worst_margin,
    ring_distance,
    ring_problem,
)
from torch import Tensor

from brittle.attacks import auto_pgd, auto_pgd_minimal, seek_holes
from brittle.attacks.apgd import checkpoints
from brittle.attacks.apgd_targets import auto_pgd_targets
from brittle.attacks.ddn import ddn, step_out
from brittle.attacks.fab import fab
from brittle.attacks.fmn import fmn
from brittle.attacks.foolbox_suite import pgd
from brittle.attacks.geometry import size
from brittle.attacks.planes import to_plane
from brittle.attacks.problem import Problem
from brittle.attacks.search import Search
from brittle.attacks.square import square
from brittle.attacks.vicinity import by_vicinity
from brittle.records import AttackRows, Norm

Attack = Callable[..., AttackRows]


def led(problem: Problem, *, generator: torch.Generator) -> AttackRows:
    """Hole-seeking by a mass map."""
    return seek_holes(problem, linear_guide(problem), generator=generator)[0]


def unled(problem: Problem, *, generator: torch.Generator) -> AttackRows:
    """Hole-seeking without one."""
    return seek_holes(problem, generator=generator)[0]


def vicinal(problem: Problem, *, generator: torch.Generator) -> AttackRows:
    return by_vicinity(problem, linear_vicinity(problem), generator=generator)


def long_fmn(problem: Problem, *, generator: torch.Generator) -> AttackRows:
    return fmn(problem, generator=generator, steps=400)


def long_fab(problem: Problem, *, generator: torch.Generator) -> AttackRows:
    return fab(problem, generator=generator, steps=300)


def long_ddn(problem: Problem, *, generator: torch.Generator) -> AttackRows:
    return ddn(problem, generator=generator, steps=300)


MINIMAL: tuple[Attack, ...] = (led, unled, vicinal, auto_pgd_minimal, long_fab, long_fmn, long_ddn)
NORMS: tuple[Norm, ...] = ("l2", "linf")
EPSILON = {"l2": 0.6, "linf": 0.2}


def assert_within_bounds(problem: Problem, rows: AttackRows) -> None:
    assert (rows.adversarials >= problem.bounds[0]).all()
    assert (rows.adversarials <= problem.bounds[1]).all()


def assert_succeeds(problem: Problem, rows: AttackRows) -> None:
    """Every input is really misclassified, as the class and at the distance that are reported."""
    assert rows.success.all()
    classes = problem.logits(rows.adversarials).argmax(1)
    assert torch.equal(classes, rows.new_class)
    assert ((classes != problem.labels) if problem.targets is None else (classes == problem.targets)).all()
    torch.testing.assert_close(rows.distance, size(rows.adversarials - problem.inputs, problem.norm))
    assert_within_bounds(problem, rows)


@functools.cache
def optimum(norm: Norm, at_bounds: bool, targeted: bool) -> tuple[Problem, Tensor]:
    problem = linear_problem(norm, at_bounds, targeted)
    return problem, linear_distance(problem)


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("at_bounds", [False, True], ids=["inside", "at the bounds"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", MINIMAL)
def test_minimal_attacks_come_within_5_percent_of_a_linear_models_optimum(
    attack: Attack, norm: Norm, at_bounds: bool, targeted: bool
) -> None:
    if attack is long_ddn and norm != "l2":
        pytest.skip("an attack in L2")
    problem, least = optimum(norm, at_bounds, targeted)
    rows = attack(problem, generator=generator())
    assert_succeeds(problem, rows)
    assert (rows.distance >= least * (1 - 1e-6)).all()
    assert (rows.distance <= least * 1.05).all(), (rows.distance / least).max()


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("at_bounds", [False, True], ids=["inside", "at the bounds"])
def test_fmn_in_l1_comes_within_5_percent_of_a_linear_models_optimum(at_bounds: bool, targeted: bool) -> None:
    problem, least = optimum("l1", at_bounds, targeted)
    rows = fmn(problem, generator=generator(), steps=200)
    assert_succeeds(problem, rows)
    assert (rows.distance >= least * (1 - 1e-6)).all()
    assert (rows.distance <= least * 1.05).all(), (rows.distance / least).max()


@pytest.mark.parametrize("at_bounds", [False, True], ids=["inside", "at the bounds"])
def test_fab_in_l1_comes_within_5_percent_of_a_linear_models_optimum(at_bounds: bool) -> None:
    problem, least = optimum("l1", at_bounds, False)
    rows = fab(problem, generator=generator())
    assert_succeeds(problem, rows)
    assert (rows.distance >= least * (1 - 1e-6)).all()
    assert (rows.distance <= least * 1.05).all(), (rows.distance / least).max()


@pytest.mark.parametrize("at_bounds", [False, True], ids=["inside", "at the bounds"])
def test_fmn_in_l0_changes_as_few_numbers_as_can_be(at_bounds: bool) -> None:
    problem, least = optimum("l0", at_bounds, False)
    rows = fmn(problem, generator=generator())
    assert_succeeds(problem, rows)
    assert torch.equal(rows.distance, least.round())


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_a_step_to_a_plane_is_the_smallest_that_reaches_it(norm: Norm) -> None:
    """Against scipy's programs for two classes, where the boundary is one plane; negative gaps go back."""
    problem = linear_problem(norm, at_bounds=True, classes=2)
    least, weight = linear_distance(problem), linear_model(problem).weight
    normal = weight[1 - problem.labels] - weight[problem.labels]
    gap = problem.margin(problem.logits(problem.inputs))
    step = to_plane(problem.inputs, normal, gap, problem.bounds, norm)
    there = problem.inputs + step
    torch.testing.assert_close(size(step, norm), least, rtol=1e-4, atol=1e-6)
    assert (problem.margin(problem.logits(there)).abs() < 1e-9).all()
    assert ((there >= problem.bounds[0] - 1e-12) & (there <= problem.bounds[1] + 1e-12)).all()
    back = to_plane(there, normal, -gap / 2, problem.bounds, norm)
    torch.testing.assert_close((back * normal).sum(1), -gap / 2)
    corner = to_plane(problem.inputs, normal, torch.full_like(gap, 1e6), problem.bounds, norm) + problem.inputs
    assert ((corner - 1).abs() > 2 - 1e-9).all()  # the bounds are -1 and 3


@pytest.mark.parametrize("norm", NORMS)
def test_hole_seeking_finds_the_nearer_circle_of_a_ring(norm: Norm) -> None:
    """Between the circles the slope leads some inputs to the farther one; only another start finds the nearer."""
    problem = ring_problem(norm)
    rows = unled(problem, generator=generator())
    assert_succeeds(problem, rows)
    assert (rows.distance <= ring_distance(problem) * 1.05).all()


def test_bisection_finds_a_circle_of_a_ring() -> None:
    problem = ring_problem("l2")
    rows = auto_pgd_minimal(problem, generator=generator())
    assert_succeeds(problem, rows)
    radius = problem.inputs.norm(dim=1)
    circles = torch.stack([radius - 1, 2 - radius], dim=1)
    assert ((rows.distance[:, None] / circles - 1).abs().amin(1) < 0.05).all()
    assert (rows.distance <= ring_distance(problem) * 1.05).double().mean() >= 0.9


@pytest.mark.parametrize("at_bounds", [False, True], ids=["inside", "at the bounds"])
@pytest.mark.parametrize("norm", NORMS)
def test_auto_pgd_reaches_a_two_class_linear_models_worst_margin(norm: Norm, at_bounds: bool) -> None:
    """Two classes, so that the loss has no local maxima; all inputs are fooled, and the surest success is kept."""
    problem, epsilon = linear_problem(norm, at_bounds, classes=2), 4 * EPSILON[norm]
    worst = linear_worst_margin(problem, epsilon)
    for loss in ("ce", "dlr"):
        rows = auto_pgd(problem, epsilon, loss=loss, generator=generator())
        margin = problem.margin(problem.logits(rows.adversarials))
        fooled = worst < -1e-6
        assert fooled.double().mean() > 0.5
        assert torch.equal(rows.success, fooled)
        assert (margin[fooled] <= 0.99 * worst[fooled]).all()
        assert (margin[fooled] >= 1.000001 * worst[fooled]).all()
        assert_within_bounds(problem, rows)


@pytest.mark.parametrize("at_bounds", [False, True], ids=["inside", "at the bounds"])
@pytest.mark.parametrize("norm", NORMS)
def test_square_fools_what_can_be_fooled_with_some_room(norm: Norm, at_bounds: bool) -> None:
    """Without a gradient: wherever the worst margin is clearly below 0, and never where it is above."""
    problem = linear_problem(norm, at_bounds, classes=2)
    epsilon = 1.3 * linear_distance(problem).median().item()
    worst, clean = linear_worst_margin(problem, epsilon), problem.margin(problem.logits(problem.inputs))
    rows = square(problem, epsilon, generator=generator(), steps=1000)
    assert (rows.distance[rows.success] <= epsilon * (1 + 1e-6)).all()
    assert not rows.success[worst > 0].any()
    room = worst < -(0.05 if norm == "linf" else 0.4) * clean
    assert room.sum() >= 4
    assert rows.success[room].all()
    assert_within_bounds(problem, rows)


def test_targets_reach_what_the_cross_entropy_misses() -> None:
    """APGD-T finds every input whose nearest of four planes lies within epsilon; for two and three classes too."""
    for classes in (2, 3, 5):
        problem = linear_problem("linf", at_bounds=False, classes=classes)
        least = linear_distance(problem)
        epsilon = least.median().item() * 1.001
        rows = auto_pgd_targets(problem, epsilon, generator=generator())
        clear = (least / epsilon - 1).abs() > 1e-2
        assert torch.equal(rows.success[clear], (least < epsilon)[clear])
        assert (rows.evaluations <= 1 + 100 * (classes - 1)).all()


@pytest.mark.parametrize("attack", [auto_pgd, auto_pgd_targets, pgd])
@pytest.mark.parametrize("norm", NORMS)
def test_fixed_attacks_keep_their_budget_and_miss_few(attack: Attack, norm: Norm) -> None:
    problem, least = optimum(norm, True, False)
    epsilon = least.median().item()
    rows = attack(problem, epsilon, generator=generator())
    assert rows.epsilon == epsilon
    assert (rows.distance[rows.success] <= epsilon * (1 + 1e-6)).all()
    assert not rows.success[least > epsilon * (1 + 1e-6)].any()
    assert rows.success[least < 0.9 * epsilon].double().mean() >= 0.8
    assert torch.equal(rows.adversarials[~rows.success], problem.inputs[~rows.success])
    assert rows.distance[~rows.success].isinf().all()


def test_ddn_is_that_of_foolbox() -> None:
    """The nearest success after so many steps is the same; foolbox changes the radius by single-precision factors."""
    foolbox = pytest.importorskip("foolbox")
    problem = linear_problem("l2", at_bounds=True)
    low, wide = problem.bounds[0], problem.bounds[1] - problem.bounds[0]

    class Scaled(torch.nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return problem.logits(low + wide * inputs)

    model = foolbox.PyTorchModel(Scaled().eval(), bounds=(0, 1), device="cpu")
    for steps in (10, 25, 60):
        search = Search(problem)
        step_out(problem, search, steps, generator())
        criterion = foolbox.criteria.Misclassification(problem.labels)
        theirs = foolbox.attacks.DDNAttack(steps=steps).run(model, (problem.inputs - low) / wide, criterion)
        found = search.best.isfinite()
        assert found.any()
        torch.testing.assert_close(search.inputs[found], (low + wide * theirs)[found], rtol=1e-3, atol=1e-5)


def test_checkpoints_are_those_of_the_paper() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


COUNTED = {
    "hole-seeking": unled,
    "hole-seeking, random": lambda p, generator: seek_holes(p, "random", generator=generator)[0],
    "bisection": auto_pgd_minimal,
    "APGD": lambda p, generator: auto_pgd(p, 0.5, generator=generator),
    "DDN": ddn,
    "FAB": fab,
    "FMN": fmn,
    "APGD-T": lambda p, generator: auto_pgd_targets(p, 0.5, generator=generator),
    "Square": lambda p, generator: square(p, 0.5, generator=generator, steps=30),
    "PGD": lambda p, generator: pgd(p, 0.5, generator=generator),
}


@pytest.mark.parametrize("attack", COUNTED.values(), ids=COUNTED)
def test_evaluations_are_the_real_calls_of_each_input(attack: Attack) -> None:
    problem = linear_problem("l2", at_bounds=True)
    for b in range(3):
        counter = Counter(problem.logits)
        rows = attack(replace(problem[slice(b, b + 1)], logits=counter), generator=generator())
        assert rows.evaluations.tolist() == [counter.passes]
    counter = Counter(problem.logits)
    rows = attack(replace(problem, logits=counter), generator=generator())
    assert int(rows.evaluations.sum()) == counter.passes


@pytest.mark.parametrize("attack", COUNTED.values(), ids=COUNTED)
def test_the_same_seed_gives_the_same_rows(attack: Attack) -> None:
    problem = linear_problem("l2", at_bounds=True)
    torch.manual_seed(0)
    first = attack(problem, generator=generator(5))
    torch.manual_seed(1)  # the global generator plays no part
    state = torch.get_rng_state()
    again = attack(problem, generator=generator(5))
    assert torch.equal(first.adversarials, again.adversarials)
    assert torch.equal(first.evaluations, again.evaluations)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "gain"), [("hole-seeking", 10), ("bisection", 10), ("DDN", 1), ("FAB", 10), ("FMN", 10)]
)
def test_inputs_of_any_scale_are_attacked_alike(name: str, gain: float) -> None:
    """Inputs and bounds a thousand times larger, logits `gain` times: distances grow a thousandfold."""
    problem = linear_problem("l2", at_bounds=True)
    low, high = problem.bounds
    large = replace(
        problem,
        logits=lambda inputs: gain * problem.logits(inputs / 1000),
        inputs=1000 * problem.inputs,
        bounds=(1000 * low, 1000 * high),
    )
    near, far = (COUNTED[name](p, generator=generator()).distance for p in (problem, large))
    torch.testing.assert_close(far.log(), (1000 * near).log(), atol=0.02, rtol=0)


@pytest.mark.parametrize("name", ["hole-seeking", "bisection", "DDN", "FAB", "FMN"])
def test_an_input_that_is_not_finite_costs_only_itself(name: str) -> None:
    problem = linear_problem("l2", at_bounds=False)
    poisoned = problem.inputs[3]

    def logits(inputs: Tensor) -> Tensor:
        near = (inputs - poisoned).abs().amax(1) < 0.4
        return torch.where(near[:, None], torch.nan, problem.logits(inputs))

    rows = COUNTED[name](replace(problem, logits=logits), generator=generator())
    assert rows.success[torch.arange(len(problem)) != 3].all()
    assert rows.adversarials.isfinite().all()
    assert (logits(rows.adversarials).argmax(1) != problem.labels)[rows.success].all()

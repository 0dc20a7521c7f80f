"""The interface that all attacks share: budgets, early stops, bounds a channel, any shape, inputs set apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from attack_cases import Counter, generator, linear_distance, linear_model, linear_problem
from torch import Tensor

from brittle.attacks import auto_pgd, auto_pgd_minimal, seek_holes
from brittle.attacks.apgd_targets import auto_pgd_targets
from brittle.attacks.ddn import ddn
from brittle.attacks.fab import fab
from brittle.attacks.fmn import fmn
from brittle.attacks.foolbox_suite import pgd
from brittle.attacks.isolation import attacked
from brittle.attacks.problem import Problem
from brittle.attacks.search import Search
from brittle.attacks.square import square
from brittle.errors import UsageError
from brittle.records import OUTCOMES, AttackRows, Norm

Attack = Callable[..., AttackRows]

ATTACKS: dict[str, Attack] = {
    "hole-seeking": lambda problem, generator: seek_holes(problem, generator=generator)[0],
    "APGD bisection": auto_pgd_minimal,
    "FAB": fab,
    "FMN": fmn,
    "DDN": ddn,
    "APGD": partial(auto_pgd, epsilon=2.4),
    "APGD-T": partial(auto_pgd_targets, epsilon=2.4),
    "PGD": partial(pgd, epsilon=2.4),
    "Square": partial(square, epsilon=2.4),
}
EVERY = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


@EVERY
def test_a_cap_is_kept_to_and_what_was_found_by_then_is_returned(attack: Attack) -> None:
    problem = linear_problem("l2", at_bounds=False)
    for cap in (7, 40):
        counter = Counter(problem.logits)
        rows = attack(replace(problem, logits=counter, cap=cap), generator=generator())
        assert (rows.evaluations <= cap).all()
        assert int(rows.evaluations.sum()) == counter.passes
        assert torch.equal(problem.logits(rows.adversarials).argmax(1) != problem.labels, rows.success)
    assert rows.success.double().mean() >= 0.2 if rows.kind == "fixed" else rows.success.all()


@EVERY
def test_an_input_that_has_enough_is_let_go(attack: Attack) -> None:
    """It costs no more than in a run of its own up to its first success; others go on."""
    problem = linear_problem("l2", at_bounds=False)
    whole = attack(problem, generator=generator())
    asked: list[int] = []

    def logits(inputs: Tensor) -> Tensor:
        asked.append(len(inputs))
        return problem.logits(inputs)

    some = replace(problem, logits=logits, enough=whole.distance[whole.success].median().item() * 1.2)
    rows = attack(some, generator=generator())
    done = rows.distance <= some.enough
    assert done.sum() >= 0.4 * whole.success.sum()
    assert (rows.evaluations <= whole.evaluations).all()
    assert int(rows.evaluations.sum()) == sum(asked)
    if rows.attack not in ("Square", "APGD-T"):  # these let go of every success
        assert (rows.evaluations[done] < whole.evaluations[done]).double().mean() > 0.9


@EVERY
def test_backward_passes_are_counted_apart(attack: Attack) -> None:
    problem, passes = linear_problem("l2", at_bounds=True), [0]

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, values: Tensor) -> Tensor:
            return values.clone()

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
            passes[0] += len(gradient)
            return gradient

    rows = attack(replace(problem, logits=lambda x: Counted.apply(problem.logits(x))), generator=generator())
    assert rows.backwards is not None
    assert int(rows.backwards.sum()) == passes[0]
    assert (rows.backwards <= rows.evaluations).all()
    if rows.attack == "Square":
        assert passes == [0]


def test_a_cap_or_a_number_of_draws_below_one_is_refused() -> None:
    problem = linear_problem("l2", at_bounds=False)
    for name in ("cap", "draws"):
        with pytest.raises(UsageError, match=f"{name} must be at least 1, found 0"):
            replace(problem, **{name: 0})


@pytest.mark.parametrize("norm", ["l2", "linf"])
@EVERY
def test_bounds_may_differ_from_channel_to_channel(attack: Attack, norm: Norm) -> None:
    """Where they are alike it is as with two numbers; where a channel cannot move it does not."""
    if attack is ddn and norm == "linf":
        return
    problem = linear_problem(norm, at_bounds=False)
    low, high = (torch.full((12,), bound, dtype=torch.float64) for bound in problem.bounds)
    plain, spelled = (attack(p, generator=generator()) for p in (problem, replace(problem, bounds=(low, high))))
    torch.testing.assert_close(spelled.distance, plain.distance)
    low[:4], high[:4] = 1.4, 1.5
    held = problem.inputs.clamp(low, high)
    narrow = replace(problem, inputs=held, bounds=(low, high), labels=problem.logits(held).argmax(1))
    rows = attack(narrow, generator=generator())
    assert rows.success.any()
    assert (rows.adversarials >= low).all()
    assert (rows.adversarials <= high).all()


@EVERY
@pytest.mark.parametrize("shape", [(12,), (3, 4), (2, 3, 2)], ids=["vector", "sequence", "image"])
def test_inputs_may_have_any_shape(attack: Attack, shape: tuple[int, ...]) -> None:
    flat = linear_problem("l2", at_bounds=False, classes=2)
    problem = replace(flat, inputs=flat.inputs.reshape(-1, *shape))
    rows, least = attack(problem, generator=generator()), linear_distance(flat)
    assert rows.adversarials.shape == problem.inputs.shape
    if rows.kind == "minimal":
        assert (rows.distance <= 1.06 * least).all()
    else:
        assert rows.success[least < 0.6 * 2.4].all()


def test_inputs_that_are_wrong_before_are_a_class_of_their_own() -> None:
    problem = linear_problem("l2", at_bounds=False)
    labels = problem.labels.clone()
    labels[::4] = (labels[::4] + 1) % 5
    mixed = replace(problem, labels=labels)
    counter = Counter(problem.logits)
    rows = attacked(partial(fmn, generator=generator()), replace(mixed, logits=counter))
    wrong = torch.arange(len(problem)) % 4 == 0
    assert rows.outcome is not None
    assert torch.equal(rows.outcome == OUTCOMES.index("wrong"), wrong)
    assert (rows.outcome[~wrong] == OUTCOMES.index("fooled")).all()
    assert not rows.success[wrong].any()
    assert (rows.distance[wrong] == 0).all()
    assert torch.equal(rows.new_class[wrong], problem.labels[wrong])
    assert rows.evaluations[wrong].tolist() == [1] * int(wrong.sum())
    assert int(rows.evaluations.sum()) == counter.passes
    alone = fmn(problem[~wrong], generator=generator())
    torch.testing.assert_close(rows.distance[~wrong], alone.distance)


def test_a_batch_of_wrong_inputs_is_not_attacked() -> None:
    problem = linear_problem("l2", at_bounds=False)
    rows = attacked(partial(fmn, generator=generator()), replace(problem, labels=(problem.labels + 1) % 5))
    assert (rows.evaluations == 1).all()
    assert rows.outcome is not None
    assert (rows.outcome == OUTCOMES.index("wrong")).all()


def test_an_input_that_raises_is_marked_and_the_rest_goes_on() -> None:
    problem = linear_problem("l2", at_bounds=False)
    bad = problem.inputs[3]

    def logits(inputs: Tensor) -> Tensor:
        if ((inputs - bad).abs().amax(1) < 1e-9).any():
            raise RuntimeError("no such input")
        return problem.logits(inputs)

    with pytest.warns(UserWarning, match="broke at 1 inputs"):
        rows = attacked(partial(fmn, generator=generator()), replace(problem, logits=logits))
    assert rows.outcome is not None
    others = torch.arange(len(problem)) != 3
    assert rows.outcome[3] == OUTCOMES.index("broken")
    assert rows.distance[3] == torch.inf
    assert (rows.outcome[others] == OUTCOMES.index("fooled")).all()
    assert (rows.distance[others] <= 1.05 * linear_distance(problem)[others]).all()


def test_a_random_model_is_judged_by_its_mean() -> None:
    """Linear with noise on its weights: with draws, the surest success is that of the mean model."""
    problem = linear_problem("linf", at_bounds=False, classes=2)
    model, noise = linear_model(problem), generator(9)

    def logits(inputs: Tensor) -> Tensor:
        shaken = model.weight + 2.0 * torch.randn(model.weight.shape, generator=noise, dtype=torch.float64)
        return inputs @ shaken.T + model.bias

    reached = []
    for draws in (1, 30):
        noise.manual_seed(9)
        counter = Counter(logits)
        rows = auto_pgd(replace(problem, logits=counter, draws=draws), 0.8, generator=generator(), steps=20)
        assert rows.evaluations.tolist() == [20 * draws] * len(problem)
        assert counter.passes == 20 * draws * len(problem)
        reached.append(problem.margin(problem.logits(rows.adversarials)).mean().item())
    worst = (
        problem.margin(problem.logits(problem.inputs)) - 0.8 * (model.weight[0] - model.weight[1]).abs().sum()
    ).mean()
    assert worst <= reached[1] < 0.9 * worst, (worst, reached)
    assert reached[1] < reached[0] - 0.1 * abs(worst)


def test_successes_beyond_epsilon_do_not_count() -> None:
    problem = linear_problem("l2", at_bounds=False)
    epsilon = 1.001 * linear_distance(problem).median().item()
    search = Search(replace(problem, bounds=(-99.0, 99.0)), epsilon=epsilon)
    rows = fmn(replace(problem, bounds=(-99.0, 99.0)), generator=generator())
    search.look(rows.adversarials)
    assert torch.equal(search.best.isfinite(), rows.distance <= epsilon)
    assert 0 < search.best.isfinite().sum() < len(problem)


@pytest.mark.parametrize("attack", [auto_pgd, auto_pgd_targets, pgd, square])
def test_a_distance_of_which_rounding_is_a_part_is_no_obstacle(attack: Attack) -> None:
    """Half a level of 255 in single precision: inputs near 1 round by more than a millionth of it."""
    g = generator()
    weight, inputs = torch.randn(2, 300, generator=g), torch.rand(200, 300, generator=g)
    logits = lambda x: (x - 0.5) @ weight.T  # noqa: E731
    gap, reach = weight[1] - weight[0], 0.5 / 255
    problem = Problem(logits, inputs, logits(inputs).argmax(1), "linf", (0.0, 1.0))
    way = gap.sign() * (1 - 2 * problem.labels[:, None])
    worst = problem.margin(logits((inputs + reach * way).clamp(0, 1)))
    rows = attack(problem, epsilon=reach, generator=generator(), steps=300)
    assert (worst < -0.01).sum() >= 5
    if attack is square:
        assert rows.success[worst < -0.01].any()
    else:
        assert rows.success[worst < -0.01].all()
    assert not rows.success[worst > 0.01].any()
    assert (rows.distance[rows.success] <= reach * 1.001).all()


def test_rounding_in_many_dimensions_is_no_obstacle() -> None:
    """In L2 single precision puts points some millionths of epsilon beyond it, where an input has many numbers."""
    g = generator()
    weight, inputs = torch.randn(2, 50_000, generator=g), torch.rand(20, 50_000, generator=g)
    logits = lambda x: (x - 0.5) @ weight.T / 200  # noqa: E731
    problem = Problem(logits, inputs, logits(inputs).argmax(1), "l2", (0.0, 1.0))
    far = problem.margin(logits(inputs)) / (weight[0] - weight[1]).norm() * 200
    rows = auto_pgd(problem, 1.3 * far.median().item(), generator=generator(), steps=20)
    assert rows.success[far <= far.median()].all()


def test_the_surest_success_is_measured_at_the_end() -> None:
    """Where the surest is kept, points are drawn within epsilon before they are asked about; one that was not fails."""
    problem = linear_problem("l2", at_bounds=False)
    least = linear_distance(problem)
    far = fmn(problem, generator=generator())
    search = Search(problem, keep="surest", epsilon=1.001 * least.median().item())
    search.look(far.adversarials)
    rows = search.rows("", "fixed", 1.0)
    assert torch.equal(rows.success, far.distance <= 1.001 * least.median())
    assert rows.distance[~rows.success].isinf().all()
    assert torch.equal(rows.adversarials[~rows.success], problem.inputs[~rows.success])

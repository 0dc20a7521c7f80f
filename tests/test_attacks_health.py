"""Each check of the panel passes on a sound run and fails on the flaw that it is there for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attack_cases import blob_problem, blob_subject, generator, right_queries
from torch import Tensor

from brittle.attacks import auto_pgd, fmn, seek_holes, square
from brittle.attacks.health import examine, verdict
from brittle.attacks.problem import Problem
from brittle.attacks.returned import Check, Verdict
from brittle.records import AttackRows, Norm

NORMS: tuple[Norm, ...] = ("l2", "linf")
EPSILON = {"l2": 0.5, "linf": 0.15}


@pytest.fixture(scope="module", params=NORMS)
def problem(request: pytest.FixtureRequest) -> Problem:
    subject = blob_subject()
    return blob_problem(subject, right_queries(subject, 40), request.param)


def attacks(problem: Problem) -> list[AttackRows]:
    epsilon = EPSILON[problem.norm]
    return [
        seek_holes(problem, generator=generator())[0],
        fmn(problem, generator=generator()),
        auto_pgd(problem, epsilon, generator=generator()),
        square(problem, epsilon, generator=generator(), steps=200),
    ]


@pytest.fixture(scope="module")
def rows(problem: Problem) -> list[AttackRows]:
    return attacks(problem)


def named(checks: list[Check]) -> dict[str, Verdict]:
    return {check.name: check.verdict for check in checks}


def flawed(problem: Problem, change: Callable[[Tensor], Tensor]) -> Problem:
    """The same problem with another way from inputs to logits behind the same decisions."""
    return replace(problem, logits=lambda x: change(problem.logits(x)))


def test_a_sound_run_passes(problem: Problem, rows: list[AttackRows]) -> None:
    checks = examine(problem, rows, generator=generator())
    assert set(named(checks).values()) <= {"pass", "warn"}, checks
    assert [name for name, said in named(checks).items() if said == "warn"] in ([], ["8 bits"])
    assert verdict(checks) == "pass"
    assert len(checks) == 9


def test_steps_without_slope_are_found(problem: Problem, rows: list[AttackRows]) -> None:
    flat = flawed(problem, lambda logits: logits.mul(4).round() + 0 * logits)
    checks = named(examine(flat, rows, generator=generator()))
    assert checks["gradients"] == "fail"


def test_exploding_and_infinite_gradients_are_found(problem: Problem, rows: list[AttackRows]) -> None:
    wild = flawed(problem, lambda logits: logits + (logits - logits.detach()).abs().sqrt())
    assert named(examine(wild, rows, generator=generator()))["gradients"] == "fail"


def test_probabilities_are_found(problem: Problem, rows: list[AttackRows]) -> None:
    checks = examine(flawed(problem, lambda logits: logits.softmax(1)), rows, generator=generator())
    assert named(checks)["outputs"] == "fail"
    assert verdict(checks) == "inconclusive"


def test_randomness_is_found_and_forgiven_where_it_is_averaged(problem: Problem, rows: list[AttackRows]) -> None:
    g = generator(1)
    noisy = flawed(problem, lambda logits: logits + torch.randn(logits.shape, generator=g))
    assert named(examine(noisy, rows, generator=generator()))["randomness"] == "fail"
    averaged = named(examine(replace(noisy, draws=20), rows, generator=generator()))
    assert averaged["randomness"] in ("pass", "warn")


def test_a_black_box_attack_that_sees_more_is_found(problem: Problem, rows: list[AttackRows]) -> None:
    blinded = [
        r if r.attack == "Square" else replace(r, success=r.success & False, distance=r.distance + torch.inf)
        for r in rows
    ]
    assert rows[-1].success.double().mean() > 0.02
    assert named(examine(problem, blinded, generator=generator()))["black box"] == "fail"


def test_a_model_that_nothing_turns_is_found(problem: Problem, rows: list[AttackRows]) -> None:
    sure = replace(problem, logits=lambda x: problem.logits(x) * 0 + 9.0 * torch.eye(3)[0])
    held = replace(sure, labels=torch.zeros_like(problem.labels))
    checks = named(examine(held, rows, generator=generator()))
    assert checks["unbounded"] == "fail"


def test_attacks_that_stopped_too_soon_are_found(problem: Problem, rows: list[AttackRows]) -> None:
    """Attacks that fooled half of what they might at the distance of their median."""
    odd = torch.arange(len(problem)) % 2 == 0
    lame = [replace(r, distance=torch.where(odd, r.distance.median() * 3, torch.inf), success=odd) for r in rows]
    checks = {c.name: c for c in examine(problem, lame, generator=generator())}
    assert checks["convergence"].verdict == "fail"
    assert checks["convergence"].value == pytest.approx(0.5, abs=0.1)


def test_wrong_distances_and_labels_are_found(problem: Problem, rows: list[AttackRows]) -> None:
    shorter = [replace(r, distance=r.distance * 0.99) for r in rows]
    assert named(examine(problem, shorter, generator=generator()))["distances"] == "fail"
    pulled = [replace(r, adversarials=(r.adversarials + problem.inputs) / 2) for r in rows]
    checks = examine(problem, pulled, generator=generator())
    assert named(checks)["labels"] == "fail"
    assert verdict(checks) == "inconclusive"


def test_successes_that_eight_bits_undo_are_counted(problem: Problem, rows: list[AttackRows]) -> None:
    checks = {c.name: c for c in examine(problem, rows, generator=generator())}
    kept = total = 0
    for r in rows:
        for b in range(len(problem)):
            if r.success[b]:
                rounded = (r.adversarials[b] * 255).round() / 255
                kept += int(problem.logits(rounded[None]).argmax(1)[0] != problem.labels[b])
                total += 1
    assert checks["8 bits"].value == pytest.approx(kept / total)
    assert 0 < kept <= total


def test_what_the_checks_cost_is_told(problem: Problem, rows: list[AttackRows]) -> None:
    passes = [0]

    def logits(inputs: Tensor) -> Tensor:
        passes[0] += len(inputs)
        return problem.logits(inputs)

    checks = examine(replace(problem, logits=logits), rows, generator=generator())
    assert sum(check.cost for check in checks) == passes[0]

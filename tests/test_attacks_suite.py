"""The suite: what it returns has been verified, one broken input costs one row, and the envelope is the least."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attack_cases import blob_data, blob_problem, blob_subject, generator, right_queries
from torch import Tensor, nn

from brittle.attacks import suite
from brittle.attacks.ddn import ddn
from brittle.attacks.envelope import envelope, smallest
from brittle.attacks.foolbox_suite import pgd
from brittle.attacks.hole_seeking import seek_holes
from brittle.attacks.isolation import Broken, isolated, joined
from brittle.attacks.neighbours import Neighbours, from_neighbours
from brittle.attacks.plan import BUDGETS, SUITE, members, most_evaluations
from brittle.attacks.problem import Problem
from brittle.attacks.search import Search
from brittle.attacks.verify import verified
from brittle.errors import DataError, UsageError
from brittle.kernel.differentiable import differentiable_mass
from brittle.kernel.tangent import tangent_memory
from brittle.mass import class_groups
from brittle.records import AttackRows, Norm, Queries
from brittle.subject import Subject

NORMS: tuple[Norm, ...] = ("l2", "linf")


@pytest.fixture(scope="module")
def subject() -> Subject:
    return blob_subject()


@pytest.fixture(scope="module")
def queries(subject: Subject) -> Queries:
    return right_queries(subject, 30)


@pytest.fixture(scope="module")
def rows(subject: Subject, queries: Queries) -> list[AttackRows]:
    """The quick preset, led by the tangent memory of the final weights."""
    groups = class_groups(subject)
    memory = tangent_memory(subject, groups)
    return suite.run(
        subject,
        queries,
        mass=differentiable_mass(memory, subject),
        mass_evaluations=2 * memory.evaluations,
        groups=groups,
        generator=generator(),
    )


def test_every_attack_reports_in_its_norms(rows: list[AttackRows]) -> None:
    assert [(r.attack, r.norm, r.kind) for r in rows] == [
        ("hole-seeking", "l2", "minimal"),
        ("DDN", "l2", "minimal"),
        ("APGD bisection", "l2", "minimal"),
        ("vicinity", "l2", "minimal"),
        ("APGD-CE", "l2", "fixed"),
        ("Square", "l2", "fixed"),
        ("hole-seeking", "linf", "minimal"),
        ("FMN", "linf", "minimal"),
        ("APGD bisection", "linf", "minimal"),
        ("vicinity", "linf", "minimal"),
        ("APGD-CE", "linf", "fixed"),
        ("Square", "linf", "fixed"),
    ]


def test_every_row_is_a_real_failure_of_the_model(rows: list[AttackRows], subject: Subject, queries: Queries) -> None:
    for r in rows:
        if r.kind == "minimal":
            assert r.success.all()
        classes = subject.predict(r.adversarials).argmax(1)
        assert torch.equal(classes, r.new_class)
        assert torch.equal(classes != queries.targets, r.success)
        far = (r.adversarials.double() - queries.inputs.double()).flatten(1)
        far = far.norm(dim=1) if r.norm == "l2" else far.abs().amax(1)
        assert r.distance.dtype == torch.float64
        torch.testing.assert_close(r.distance[r.success], far[r.success])
        assert r.distance[~r.success].isinf().all()
        assert torch.equal(r.adversarials[~r.success], queries.inputs[~r.success])
        assert r.adversarials.min() >= 0
        assert r.adversarials.max() <= 1
        assert (r.evaluations > 0).all()


def test_minimal_attacks_agree_with_each_other(rows: list[AttackRows]) -> None:
    """On a smooth small network they all come near the least of them."""
    for r in rows:
        if r.kind == "minimal":
            ratio = r.distance / envelope(rows, r.norm).distance
            assert ratio.median() < 1.02
            assert ratio.max() < 1.3


def test_the_budgets_hold(rows: list[AttackRows]) -> None:
    quick = BUDGETS["quick"]
    for r in rows:
        if r.attack == "hole-seeking":  # two rivals, a map of one node forward and back
            assert (r.evaluations == quick["hole-seeking"] + 2 * 2).all()
        if r.attack == "DDN":
            assert (r.evaluations == quick["DDN"] + 1 + 2 + 6).all()
        if r.attack == "APGD bisection":
            assert (r.evaluations <= 1 + 2 + quick["APGD bisection"] + 6).all()
        if r.attack == "FMN":
            assert (r.evaluations <= quick["FMN"] + 1 + 2 + 8).all()
        if r.attack in ("APGD-CE", "Square"):
            assert (r.evaluations <= quick[r.attack] + 1).all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_envelope_is_the_least_of_all(rows: list[AttackRows], norm: Norm) -> None:
    least, every = envelope(rows, norm), [r for r in rows if r.norm == norm]
    for m in range(len(least.distance)):
        best = min(every, key=lambda r: r.distance[m].item())
        assert least.distance[m] == best.distance[m]
        assert torch.equal(least.adversarials[m], best.adversarials[m])
        assert least.new_class[m] == best.new_class[m]
        assert least.evaluations[m] == sum(int(r.evaluations[m]) for r in every)
    nearest = smallest(rows, norm)
    assert set(nearest) == {r.attack for r in every}
    assert torch.stack(list(nearest.values())).any(0).all()
    for r in every:
        assert torch.equal(nearest[r.attack], r.distance == least.distance)


def test_an_input_that_nothing_fooled_has_an_infinite_envelope(rows: list[AttackRows]) -> None:
    never = [
        replace(r, success=torch.zeros_like(r.success), distance=torch.full_like(r.distance, torch.inf)) for r in rows
    ]
    least = envelope(never, "l2")
    assert least.distance.isinf().all()
    assert not least.success.any()
    assert not any(wins.any() for wins in smallest(never, "l2").values())


def test_the_same_seed_gives_the_same_rows(subject: Subject, queries: Queries) -> None:
    first, again = (
        suite.run(subject, queries[:5], mass=None, groups=None, generator=generator(7), norms=("l2",)) for _ in range(2)
    )
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.adversarials, b.adversarials)
        assert torch.equal(a.evaluations, b.evaluations)


def test_progress_counts_blocks_to_the_end(subject: Subject, queries: Queries, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "BLOCK", 4)
    seen: list[tuple[int, int]] = []
    found = suite.run(
        subject,
        queries[:6],
        mass=None,
        groups=None,
        generator=generator(),
        norms=("linf",),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(k + 1, 12) for k in range(12)]
    assert all(len(r.distance) == 6 for r in found)


def test_wrong_queries_presets_and_maps_are_refused(subject: Subject, queries: Queries) -> None:
    run = lambda q, **more: suite.run(subject, q, generator=generator(), **{"mass": None, "groups": None} | more)  # noqa: E731
    wrong = replace(queries, targets=(queries.targets + 1) % 3)
    with pytest.raises(DataError, match="right when clean, found 30 wrong of 30"):
        run(wrong)
    with pytest.raises(DataError, match="found 0 wrong of 0"):
        run(queries[:0])
    with pytest.raises(UsageError, match="'swift'"):
        run(queries, preset="swift")
    with pytest.raises(DataError, match="found no groups"):
        run(queries, mass=lambda inputs, pairs: inputs.flatten(1))
    with pytest.raises(DataError, match="found no cost"):
        run(queries, mass=lambda inputs, pairs: inputs.flatten(1), groups=class_groups(subject))


def test_a_single_logit_model_is_attacked(subject: Subject) -> None:
    """A linear model with one logit: the nearest adversarial is known."""
    data = blob_data(90, 2)
    data = data[data.targets < 2]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(data.inputs)[:, 0], data.targets.float()).backward()
        optimizer.step()
    binary = Subject(model.eval(), data, data, bounds=(-5.0, 5.0))
    queries = right_queries(binary, 10)
    found = suite.run(binary, queries, mass=None, groups=None, generator=generator())
    weight = model[1].weight.detach().double()
    for r in found:
        size = weight.norm() if r.norm == "l2" else weight.abs().sum()
        least = (queries.logits[:, 1].double() / size).abs()
        if r.kind == "minimal":
            assert (r.distance <= 1.05 * least).all()
        assert (r.distance >= least * (1 - 1e-4)).all()


@pytest.mark.parametrize("lie", ["class", "bounds", "epsilon", "not finite"])
def test_a_lying_attack_is_found_out(subject: Subject, queries: Queries, rows: list[AttackRows], lie: str) -> None:
    fixed = next(r for r in rows if r.kind == "fixed" and r.norm == "linf")
    victim = int(fixed.success.nonzero()[0])
    adversarials, epsilon = fixed.adversarials.clone(), fixed.epsilon
    if lie == "class":
        adversarials[victim] = queries.inputs[victim]
    elif lie == "bounds":
        adversarials[victim] = (adversarials[victim] - 0.01).clamp_max(0.99) - 0.1
    elif lie == "not finite":
        adversarials[victim, 0, 0, 0] = torch.nan
    else:
        assert epsilon is not None
        epsilon *= 0.9
    checked = verified(replace(fixed, adversarials=adversarials, epsilon=epsilon), subject, queries)
    assert not checked.success[victim]
    assert checked.distance[victim] == math.inf
    assert torch.equal(checked.adversarials[victim], queries.inputs[victim])
    assert checked.new_class[victim] == queries.targets[victim]
    if lie != "epsilon":
        others = torch.arange(len(queries)) != victim
        assert torch.equal(checked.success[others], fixed.success[others])


def test_a_wrong_distance_is_corrected(subject: Subject, queries: Queries, rows: list[AttackRows]) -> None:
    checked = verified(replace(rows[0], distance=rows[0].distance / 2), subject, queries)
    torch.testing.assert_close(checked.distance, rows[0].distance)


def breaking(attack: Callable[..., AttackRows], at: Tensor) -> Callable[[Problem], AttackRows]:
    """The attack on a model that raises whenever the input `at` is among those asked about, or near it."""

    def broken(problem: Problem) -> AttackRows:
        def logits(inputs: Tensor) -> Tensor:
            if ((inputs - at).flatten(1).abs().amax(1) < 1e-3).any():
                raise RuntimeError("no such input")
            return problem.logits(inputs)

        return attack(replace(problem, logits=logits), generator=generator())

    return broken


def clean_first(problem: Problem, *, generator: torch.Generator) -> AttackRows:
    """An attack that asks about the clean inputs and finds nothing."""
    search = Search(problem)
    search.look(problem.inputs)
    return search.rows("clean first", "minimal")


@pytest.mark.parametrize("attack", [ddn, clean_first])
def test_one_broken_input_costs_one_row(subject: Subject, queries: Queries, attack: Callable[..., AttackRows]) -> None:
    problem = blob_problem(subject, queries, "l2")
    parts = isolated(breaking(attack, queries.inputs[11]), problem)
    assert sum(isinstance(part, Broken) for part in parts) == 1
    with pytest.warns(UserWarning, match="broke at 1 inputs.*RuntimeError: no such input"):
        found = joined(parts)
    others = torch.arange(len(queries)) != 11
    whole = attack(problem, generator=generator())
    assert not found.success[11]
    assert found.evaluations[11] == 0
    assert torch.equal(found.adversarials[11], queries.inputs[11])
    assert torch.equal(found.success[others], whole.success[others])
    assert torch.equal(found.evaluations[others], whole.evaluations[others])
    torch.testing.assert_close(found.distance[others], whole.distance[others], rtol=1e-4, atol=0)


def test_an_attack_that_breaks_everywhere_raises(subject: Subject, queries: Queries) -> None:
    def broken(problem: Problem) -> AttackRows:
        raise ZeroDivisionError("our bug")

    with pytest.raises(ZeroDivisionError, match="our bug"):
        joined(isolated(broken, blob_problem(subject, queries, "l2")))


def test_foolbox_leaves_no_gradients_in_the_weights(subject: Subject, queries: Queries) -> None:
    subject.model.zero_grad(set_to_none=True)
    pgd(blob_problem(subject, queries[:3], "linf"), 0.1, generator=generator())
    ddn(blob_problem(subject, queries[:3], "l2"), generator=generator(), steps=5)
    assert all(p.grad is None for p in subject.model.parameters())


def test_a_preset_does_more_than_the_one_before() -> None:
    sums = [most_evaluations(preset) for preset in ("quick", "standard", "thorough")]
    assert sums == sorted(sums)
    for preset in ("standard", "thorough"):
        assert set(members(preset, "l2")) == set(SUITE)
        assert set(members(preset, "linf")) == set(SUITE) - {"DDN"}
        assert set(members(preset, "l0")) == {"FMN"}
        assert set(members(preset, "l1")) == {"FMN", "FAB"}


def test_attacks_are_chosen_by_name() -> None:
    assert members("quick", "l2", ["fab", "Apgd-T"]) == {"FAB": 150, "APGD-T": 250}
    with pytest.raises(UsageError, match=r"attacks are hole-seeking.*found 'fgsm'"):
        members("quick", "l2", ["fgsm"])
    with pytest.raises(UsageError, match="DDN works in l2, found linf"):
        members("quick", "linf", ["DDN"])


def test_what_is_settled_is_not_attacked_again(subject: Subject, queries: Queries) -> None:
    """Robustness at one distance: as many inputs hold as without, for fewer evaluations."""
    go = lambda **more: suite.run(  # noqa: E731
        subject,
        queries,
        mass=None,
        groups=None,
        generator=generator(),
        norms=("linf",),
        epsilons={"linf": 0.12},
        **more,
    )
    whole, cut = go(), go(enough={"linf": 0.12})
    held, fast = (envelope(rows, "linf").distance > 0.12 for rows in (whole, cut))
    assert 3 <= held.sum() <= 27
    assert torch.equal(held, fast)
    spent, less = (torch.stack([r.evaluations for r in rows]).sum(0) for rows in (whole, cut))
    assert (less[held] == spent[held]).double().mean() > 0.7
    assert (less[~held] < spent[~held] / 2).all()


@pytest.mark.parametrize("norm", NORMS)
def test_neighbours_start_from_the_nearest_examples_of_other_classes(
    subject: Subject, queries: Queries, norm: Norm
) -> None:
    problem, near = blob_problem(subject, queries, norm), Neighbours(subject.train.inputs, subject.train.targets)
    found = near.unlike(problem, 2)
    for b in range(len(problem)):
        other = subject.train.inputs[subject.train.targets != problem.labels[b]]
        far = (other - problem.inputs[b]).flatten(1).norm(dim=1)
        assert torch.equal(found[b], other[far.argsort()[:2]])
    rows = from_neighbours(problem, near, generator=generator(), steps=100)
    assert (rows.evaluations <= 100).all()
    best = envelope([seek(problem), rows], norm).distance
    assert (rows.distance <= 1.15 * best).double().mean() > 0.9
    only = from_neighbours(problem, near, generator=generator(), steps=1)
    assert only.success.all()
    assert (rows.distance <= only.distance).all()


def seek(problem: Problem) -> AttackRows:
    return seek_holes(problem, generator=generator())[0]


def test_neighbours_of_a_target_are_of_its_class(subject: Subject, queries: Queries) -> None:
    problem = blob_problem(subject, queries, "l2")
    aimed, near = problem.aimed((problem.labels + 1) % 3), Neighbours(subject.train.inputs, subject.train.targets)
    rows = from_neighbours(aimed, near, generator=generator())
    assert torch.equal(rows.new_class[rows.success], aimed.targets[rows.success])  # type: ignore[index]
    assert rows.success.all()
    none = Neighbours(near.inputs[near.classes == 0], near.classes[near.classes == 0])
    alone = none.unlike(problem, 1)[:, 0]
    assert torch.equal(alone[problem.labels == 0], problem.inputs[problem.labels == 0])


@pytest.mark.parametrize("norm", NORMS)
def test_every_attack_keeps_to_the_bounds_of_each_feature(norm: Norm) -> None:
    """Features of different ranges; the attacks would leave the narrow ones if bounds were taken together."""
    low, high = torch.tensor([0.0, -1.0, 0.0, -2.0]), torch.tensor([1.0, 1.0, 0.2, 3.0])
    g = generator(3)
    inputs = low + (high - low) * torch.rand(60, 4, generator=g)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    data = (inputs, model(inputs).argmax(1))
    several = Subject(model, data, data, bounds=(low, high))
    found = suite.run(
        several,
        right_queries(several, 12),
        mass=None,
        groups=None,
        generator=generator(),
        preset="standard",
        norms=(norm,),
        epsilons={norm: 5.0},
    )
    assert {r.attack for r in found} == set(members("standard", norm))
    for r in found:
        assert ((r.adversarials >= low) & (r.adversarials <= high)).all(), r.attack
        assert r.success.float().mean() >= 0.5, r.attack  # what lies outside the bounds would not have stood
    beyond = replace(found[0], adversarials=found[0].adversarials.clone())
    beyond.adversarials[0, 2] = 0.3  # within the range of the others
    assert found[0].success[0]
    assert not verified(beyond, several, right_queries(several, 12)).success[0]

"""The group memory: what each group did to the weights, once, and its mass at any input."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import reference
import torch
from cases import CASES, COUNT, STEPS, Case, Training, queries, train, two_per_class
from cases import float64 as float64
from torch import Tensor, nn

from brittle.data import Examples
from brittle.kernel.differentiable import _row_after_row, differentiable_mass
from brittle.kernel.directional import Directional
from brittle.kernel.displacement import displaced, even_cuts, length_cuts, smoothed
from brittle.kernel.memory import Memory, build, collected, fine_mass, mass
from brittle.kernel.sweep import Quadrature, sweep
from brittle.mass import by_group, class_groups
from brittle.records import Groups, Pairs
from brittle.subject import Subject

NODES = 2
TWICE = ["tanh", "binary", "cnn batch norm", "group norm", "layer norm", "twice"]
"""Cases in which mass is differentiated in the input."""


def single_examples(subject: Subject) -> Groups:
    """Every training example a group of its own."""
    count = len(subject.train)
    return Groups(torch.arange(count), subject.train.targets, tuple(map(str, range(count))))


def contributions(training: Training, segment: int = 1) -> Tensor:
    inputs, pairs = queries(training.subject)
    quadrature = Quadrature(segment=segment, nodes=NODES, most=NODES, tolerance=0.0)
    return sweep(training.path, training.subject, inputs, pairs, quadrature).ledger.contributions


def masses(training: Training, memory: Memory) -> Tensor:
    return mass(memory, training.subject, *queries(training.subject))


# ------------------------------------------------------------------------------------------------------- displacements


RULES = ["nesterov l2", "adamw", "amsgrad", "nadam decoupled", "radam l2", "adamax", "rmsprop momentum", "adagrad l2"]
RULES += ["groups rmsprop", "clipped adam", "frozen", "one cycle adam"]


@pytest.mark.parametrize("recipe", RULES)
def test_displacements_of_every_optimizer_add_up_to_the_training(recipe: str, tmp_path: Path) -> None:
    assert_adds_up(train("tanh", recipe, tmp_path))


@pytest.mark.parametrize("case", CASES)
def test_displacements_in_every_model_add_up_to_the_training(case: str, tmp_path: Path) -> None:
    assert_adds_up(train(case, "momentum l2", tmp_path))


def assert_adds_up(training: Training) -> None:
    memory = build(training.path, training.subject, two_per_class(training.subject), segments=5)
    cuts = even_cuts(STEPS, 5)
    assert cuts == [0, 2, 5, 7, 10, 12]
    states = torch.stack([reference.flat(training.seen.state(at), training.seen) for at in cuts])
    assert torch.allclose(memory.ends, states, atol=1e-14)
    assert torch.allclose(memory.displacements.sum(1), states.diff(dim=0), atol=1e-9)


@pytest.mark.parametrize("recipe", ["momentum l2", "nesterov l2", "adamw", "mixed groups", "clipped"])
def test_displacements_equal_the_reference_example_by_example(recipe: str, tmp_path: Path) -> None:
    training = train("tanh", recipe, tmp_path)
    memory = build(training.path, training.subject, single_examples(training.subject), segments=4)
    expected = reference.displacements(training.seen)
    for t, (a, b) in enumerate([(0, 3), (3, 6), (6, 9), (9, 12)]):
        assert torch.allclose(memory.displacements[t], expected[a:b].sum(0), atol=1e-12)


def test_cuts_cover_the_path_whatever_its_length() -> None:
    assert even_cuts(3, 10) == [0, 1, 2, 3]
    for steps, segments in ((7, 3), (100, 7), (1, 1), (999, 500)):
        cuts = even_cuts(steps, segments)
        assert (cuts[0], cuts[-1], len(cuts)) == (0, steps, segments + 1)
        lengths = torch.tensor(cuts).diff()
        assert lengths.min() >= 1
        assert lengths.max() - lengths.min() <= 1 + (steps / segments % 1 > 0)


# ---------------------------------------------------------------------------------------------------------------- mass


@pytest.mark.parametrize("case", ["tanh", "binary", "cnn batch norm", "attention", "relu"])
def test_mass_equals_the_grouped_contributions_of_the_sweep(case: str, tmp_path: Path) -> None:
    training = train(case, "nesterov l2", tmp_path)
    groups = two_per_class(training.subject)
    memory = build(training.path, training.subject, groups, segments=STEPS, nodes=NODES)
    found = masses(training, memory)
    assert torch.allclose(found[:, :-1], by_group(contributions(training), groups), atol=1e-9)
    inputs, pairs = queries(training.subject)
    quadrature = Quadrature(segment=1, nodes=NODES, most=NODES, tolerance=0.0)
    ledger = sweep(training.path, training.subject, inputs, pairs, quadrature).ledger
    assert torch.allclose(found[:, -1], ledger.decay + ledger.buffers, atol=1e-9)


@pytest.mark.parametrize("recipe", ["adam l2", "adamw", "dampening", "groups", "one cycle"])
def test_mass_over_segments_equals_the_sweep_over_the_same_segments(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("brittle.kernel.sweep.SEGMENTS", 3)
    monkeypatch.setattr("brittle.kernel.sweep.EARLY", ())
    training = train("tanh", recipe, tmp_path)
    memory = build(training.path, training.subject, single_examples(training.subject), segments=3, nodes=NODES)
    assert torch.allclose(masses(training, memory)[:, :-1], contributions(training, segment=4), atol=1e-9)


@pytest.mark.parametrize("case", ["tanh", "batch norm"])
def test_mass_adds_up_to_what_was_learned(case: str, tmp_path: Path) -> None:
    training = train(case, "momentum l2", tmp_path)
    memory = build(training.path, training.subject, class_groups(training.subject), segments=STEPS, nodes=30)
    inputs, pairs = queries(training.subject)
    start = pairs.margin(CASES[case].model().eval()(inputs))
    learned = pairs.margin(training.subject.predict(inputs)) - start
    assert torch.allclose(masses(training, memory).sum(1), learned, atol=1e-5)


@pytest.mark.parametrize("case", ["tanh", "batch norm"])
def test_the_finer_account_equals_the_memory_with_the_same_cuts(case: str, tmp_path: Path) -> None:
    training = train(case, "adamw", tmp_path)
    groups = two_per_class(training.subject)
    memory = build(training.path, training.subject, groups, segments=5, nodes=3)
    inputs, pairs = queries(training.subject)
    fine = fine_mass(training.path, training.subject, groups, inputs, pairs, segments=5, nodes=3)
    assert torch.allclose(fine, masses(training, memory), atol=1e-12)


def test_classes_are_the_sums_of_their_groups(tmp_path: Path) -> None:
    training = train("tanh", "momentum l2", tmp_path)
    groups = two_per_class(training.subject)
    memory = build(training.path, training.subject, groups, segments=4)
    classes = build(training.path, training.subject, class_groups(training.subject), segments=4)
    merged = memory.by_class(groups, training.subject.classes)
    assert torch.allclose(merged.displacements, classes.displacements, atol=1e-13)
    found = masses(training, memory)
    summed = groups.by_class(found[:, :-1], training.subject.classes)
    assert torch.allclose(masses(training, classes), torch.cat([summed, found[:, -1:]], dim=1), atol=1e-12)


def test_a_memory_merged_into_fewer_segments_is_one_built_with_them(tmp_path: Path) -> None:
    training = train("cnn", "adamw", tmp_path)
    groups = two_per_class(training.subject)
    fine, coarse = (build(training.path, training.subject, groups, n, nodes=1) for n in (12, 4))
    merged = fine.merged(4, nodes=1)
    assert (merged.segments, merged.evaluations) == (4, 4)
    assert torch.allclose(merged.ends, coarse.ends)
    assert torch.allclose(merged.displacements, coarse.displacements, atol=1e-13)
    assert fine.merged(100).segments == 12


def test_blocks_of_inputs_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = train("cnn batch norm", "momentum", tmp_path)
    memory = build(training.path, training.subject, class_groups(training.subject), segments=3)
    whole, told = masses(training, memory), []
    monkeypatch.setattr("brittle.kernel.quadrature.BLOCK", 1)
    inputs, pairs = queries(training.subject)
    found = mass(memory, training.subject, inputs, pairs, progress=lambda done, of: told.append((done, of)))
    assert torch.allclose(found, whole, atol=1e-12)
    assert told == [(k + 1, memory.evaluations) for k in range(6)]


def test_a_replayed_path_gives_the_same_memory(tmp_path: Path) -> None:
    stored = train("batch norm", "adamw", tmp_path / "stored")
    thinned = train("batch norm", "adamw", tmp_path / "thinned", budget=3000)
    assert len(thinned.path.marks) < STEPS / 2
    groups = class_groups(stored.subject)
    a, b = (build(t.path, t.subject, groups, segments=5) for t in (stored, thinned))
    assert torch.allclose(a.displacements, b.displacements, atol=1e-8)
    assert torch.allclose(a.ends, b.ends, atol=1e-8)


def test_segments_come_as_they_are_walked(tmp_path: Path) -> None:
    training, told = train("tanh", "sgd", tmp_path), []
    parts = displaced(
        training.path,
        training.subject,
        class_groups(training.subject),
        [0, 5, 12],
        progress=lambda done, of: told.append((done, of)),
    )
    next(parts)
    assert told == [(k, STEPS) for k in range(1, 6)]
    assert len(list(parts)) == 1


# ---------------------------------------------------------------------------------------------------- differentiability


class Inner(nn.Module):
    """Logits come from a method that only `forward=` knows of, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.read(x)}

    def read(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh())


def by_method(training: Training) -> Training:
    subject = training.subject
    again = Subject(
        subject.model,
        subject.train,
        Examples.of(subject.test, "test"),
        normalize=(0.0, 1.0),
        path=subject.path,
        forward=lambda model, x: {"out": model.read(x)},
    )
    return replace(training, subject=again)


@pytest.mark.parametrize(
    "case", ["tanh", "binary", "cnn batch norm", "group norm", "layer norm", "attention", "by method"]
)
def test_the_differentiable_mass_is_the_mass_and_its_gradient_finite_differences(case: str, tmp_path: Path) -> None:
    made = Case("by method", Inner) if case == "by method" else CASES[case]
    training = train(made, "momentum l2", tmp_path)
    training = by_method(training) if case == "by method" else training
    memory = build(training.path, training.subject, two_per_class(training.subject), segments=3, nodes=NODES)
    inputs, pairs = queries(training.subject)
    mass_of = differentiable_mass(memory, training.subject)
    x = inputs.clone().requires_grad_(True)
    found = mass_of(x, pairs)
    assert torch.allclose(found, masses(training, memory)[:, :-1], atol=1e-9)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(5))
    (gradient,) = torch.autograd.grad((weights * found).sum(), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(6))
    ends = [
        (weights * mass(memory, training.subject, inputs + h * direction, pairs)[:, :-1]).sum() for h in (1e-5, -1e-5)
    ]
    assert torch.allclose((gradient * direction).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-5)


@pytest.mark.parametrize("trusted", [True, False])
def test_a_layer_that_vmap_differentiates_wrongly_is_taken_row_by_row(
    trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's own layer normalization is such a layer; written out, it is not."""
    if not trusted:
        monkeypatch.setattr("brittle.kernel.differentiable._LayerNormWrittenOut", nullcontext)
    calls: list[int] = []
    monkeypatch.setattr(
        "brittle.kernel.differentiable._row_after_row", lambda *args: calls.append(1) or _row_after_row(*args)
    )
    training = train("layer norm", "momentum", tmp_path)
    memory = build(training.path, training.subject, class_groups(training.subject), segments=2, nodes=1)
    mass_of = differentiable_mass(memory, training.subject)
    assert calls == [1], "the check"
    mass_of(*queries(training.subject))
    assert len(calls) == (1 if trusted else 3)


def test_the_differentiable_mass_of_a_row_depends_on_that_row_alone(tmp_path: Path) -> None:
    training = train("batch norm", "momentum", tmp_path)
    memory = build(training.path, training.subject, class_groups(training.subject), segments=2)
    inputs, pairs = queries(training.subject)
    mass_of = differentiable_mass(memory, training.subject)
    parts = [mass_of(inputs[m : m + 1], Pairs(pairs.predicted[m : m + 1], pairs.rival[m : m + 1])) for m in range(3)]
    assert torch.allclose(torch.cat(parts), mass_of(inputs, pairs), atol=1e-12)


def test_groups_without_examples_have_no_mass(tmp_path: Path) -> None:
    training = train("tanh", "momentum", tmp_path)
    groups = Groups(torch.zeros(COUNT, dtype=torch.int64), torch.tensor([0, 1]), ("all", "none"))
    memory = build(training.path, training.subject, groups, segments=2)
    assert (masses(training, memory)[:, 1] == 0).all()


# ------------------------------------------------------------------------------------------------------------- two ways


def directional(training: Training) -> tuple[Directional, Tensor, Tensor]:
    """Both ways, some point of the path and three displacements there, one of them zero."""
    memory = build(training.path, training.subject, two_per_class(training.subject), segments=2)
    moved = torch.stack([memory.displacements[0, 0], torch.zeros_like(memory.ends[0]), memory.displacements[0, 1]])
    return Directional(training.subject), memory.ends[1], moved


BACKWARD_ONLY = ["batch norm", "cnn batch norm", "attention"]
"""Running statistics, and attention's short cut for evaluation, have no forward mode."""


@pytest.mark.parametrize("case", [name for name in CASES if name not in BACKWARD_ONLY])
def test_forward_and_backward_find_the_same(case: str, tmp_path: Path) -> None:
    training = train(case, "momentum l2", tmp_path)
    along, state, moved = directional(training)
    asked = queries(training.subject)
    expected = along.backward(state, moved, *asked)
    assert expected.abs().max() > 0
    assert along.forward_agrees
    assert torch.allclose(along.forward(state, moved, *asked), expected, atol=1e-10)
    assert torch.allclose(along(state, moved, *asked), expected, atol=1e-10)


@pytest.mark.parametrize("case", BACKWARD_ONLY)
def test_what_has_no_forward_mode_is_taken_backward(case: str, tmp_path: Path) -> None:
    along, state, moved = directional(training := train(case, "momentum", tmp_path))
    assert not along.forward_agrees
    asked = queries(training.subject)
    assert torch.equal(along(state, moved[:1], *asked), along.backward(state, moved[:1], *asked))


@pytest.mark.parametrize(
    ("case", "count", "way"),
    [("tanh", 1, "forward"), ("tanh", 4, "backward"), ("cnn", 1, "forward"), ("cnn", 3, "backward")],
)
def test_the_way_goes_by_the_written_costs(
    case: str, count: int, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    along, state, moved = directional(training := train(case, "momentum", tmp_path))
    assert along.forward_agrees
    asked = queries(training.subject)
    moved = moved[:1].repeat(count, 1)
    monkeypatch.setattr(along, "forward" if way == "backward" else "backward", None)
    assert along(state, moved, *asked).shape == (len(asked[0]), count)


def test_displacements_of_nothing_cost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    along, state, moved = directional(training := train("tanh", "momentum", tmp_path))
    rows: list[int] = []
    backward = along.backward
    monkeypatch.setattr(along, "forward_agrees", False)
    monkeypatch.setattr(
        along, "backward", lambda state, moved, *asked: rows.append(len(moved)) or backward(state, moved, *asked)
    )
    found = along(state, moved, *queries(training.subject))
    assert rows == [2]
    assert (found[:, 1] == 0).all()
    assert (along(state, moved[1:2], *queries(training.subject)) == 0).all()
    assert rows == [2]


# ---------------------------------------------------------------------------------------------------- the smoothed path


def test_the_smoothed_path_leads_over_the_means_of_its_stretches(tmp_path: Path) -> None:
    training = train("tanh", "adamw", tmp_path)
    groups = two_per_class(training.subject)
    steps = list(displaced(training.path, training.subject, groups, range(STEPS + 1)))
    states = torch.stack([steps[0].low, *[part.high for part in steps]])
    found = collected(smoothed(steps, [0, 3, 4, 9, 12]), most=9, nodes=1)
    means = [states[a:b].mean(0) for a, b in pairwise([0, 3, 4, 9, 12])]
    assert torch.allclose(found.ends, torch.stack([states[0], *means, states[-1]]), atol=1e-14)
    assert torch.allclose(found.displacements.sum(1), found.ends.diff(dim=0), atol=1e-12)
    whole = torch.stack([part.moved for part in steps]).sum(0)
    assert torch.allclose(found.displacements.sum(0), whole, atol=1e-13), "nobody's displacement is lost"


def test_stretches_of_one_step_are_the_steps_themselves(tmp_path: Path) -> None:
    training = train("batch norm", "momentum", tmp_path)
    groups = class_groups(training.subject)
    steps = list(displaced(training.path, training.subject, groups, range(STEPS + 1)))
    found = list(smoothed(steps, range(STEPS + 1)))
    assert len(found) == STEPS
    for a, b in zip(found, steps, strict=True):
        assert torch.allclose(a.low, b.low)
        assert torch.allclose(a.high, b.high)
        assert torch.allclose(a.moved, b.moved)


def test_averaged_weights_end_a_smoothed_path(tmp_path: Path) -> None:
    training = train("tanh", "ema", tmp_path)
    steps = list(displaced(training.path, training.subject, class_groups(training.subject), range(STEPS + 1)))
    assert len(steps) == STEPS + 1
    found = list(smoothed(steps, [0, 6, 12]))
    assert len(found) == 4
    assert found[-1] is steps[-1]
    assert torch.equal(found[-2].high, found[-1].low)


def test_stretches_are_of_equal_length(tmp_path: Path) -> None:
    path = train("tanh", "cosine", tmp_path).path
    cuts = length_cuts(path, range(STEPS + 1), 4)
    states = [path.snapshot(step).state for step in range(STEPS + 1)]
    along = torch.tensor([0.0, *[(b - a).norm() for a, b in pairwise(states)]]).cumsum(0)
    assert (cuts[0], cuts[-1]) == (0, STEPS)
    for place, cut in enumerate(cuts[1:-1], 1):
        assert cut == (along - place / 4 * along[-1]).abs().argmin()
    assert length_cuts(path, [0, 5, 12], 40) == [0, 1, 2]

"""The group memory: what each group did to the weights, once, and its mass at any input."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import CASES, COUNT, STEPS, Case, Training, queries, train, two_per_class
from cases import float64 as float64
from torch import Tensor, nn

from brittle.data import Examples
from brittle.kernel.choice import Choice, Fineness, choose
from brittle.kernel.differentiable import _row_after_row, differentiable_mass
from brittle.kernel.directional import Carried, Directional
from brittle.kernel.displacement import displaced, even_cuts, joined, length_cuts
from brittle.kernel.halved import halved
from brittle.kernel.kinks import Averaged
from brittle.kernel.memory import Memory, build, fine_mass, mass
from brittle.kernel.quadrature import output_gradients, outputs_at
from brittle.kernel.sweep import Quadrature, sweep
from brittle.mass import by_group, class_groups
from brittle.path.flat import FlatModel
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


@pytest.mark.parametrize("case", ["tanh", "binary", "cnn batch norm", "attention"])
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
    monkeypatch.setattr("brittle.kernel.sweep.segment_cuts", lambda steps, segment: [0, 4, 8, 12])
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
    monkeypatch.setattr("brittle.kernel.directional.BLOCK", 1)
    inputs, pairs = queries(training.subject)
    found = mass(memory, training.subject, inputs, pairs, progress=lambda done, of: told.append((done, of)))
    assert torch.allclose(found, whole, atol=1e-12)
    assert told == [(k, len(inputs) * memory.evaluations) for k in range(1, len(inputs) * memory.evaluations + 1)]


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


BACKWARD_ONLY = ["batch norm", "cnn batch norm"]
"""Running statistics have no forward mode."""


def directional(training: Training) -> tuple[Directional, Carried, tuple[Tensor, Tensor], Tensor]:
    """Some inputs on the path, a line of it and three displacements there, one of them zero."""
    memory = build(training.path, training.subject, two_per_class(training.subject), segments=2)
    moved = torch.stack([memory.displacements[0, 0], torch.zeros_like(memory.ends[0]), memory.displacements[0, 1]])
    along = Directional(training.subject)
    return along, along.at(*queries(training.subject)), (memory.ends[0], memory.ends[1]), moved


@pytest.mark.parametrize("case", [name for name in CASES if name not in BACKWARD_ONLY])
def test_forward_and_backward_find_the_same(case: str, tmp_path: Path) -> None:
    along, carried, line, moved = directional(train(case, "momentum l2", tmp_path))
    expected = carried.backward(*line, moved)
    assert expected.abs().max() > 0
    assert along.forward_agrees
    assert torch.allclose(carried.forward(*line, moved), expected, atol=1e-10)
    assert torch.allclose(carried(*line, moved), expected, atol=1e-10)


@pytest.mark.parametrize("case", BACKWARD_ONLY)
def test_what_has_no_forward_mode_is_taken_backward(case: str, tmp_path: Path) -> None:
    along, carried, line, moved = directional(train(case, "momentum", tmp_path))
    assert not along.forward_agrees
    assert torch.equal(carried(*line, moved[:1]), carried.backward(*line, moved[:1]))


@pytest.mark.parametrize(("case", "most"), [("tanh", 2), ("cnn", 1), ("tokens", 1000)])
def test_the_way_goes_by_the_written_costs(case: str, most: int, tmp_path: Path) -> None:
    """Forward for at most so many displacements: few in a convolution, any number in a table that mostly rests."""
    along = directional(train(case, "momentum", tmp_path))[0]
    assert along.forward_agrees
    f, p = along.multiplications, len(along.flat)
    assert f == {"tanh": 4 * 5 + 5 * 3, "cnn": 9 * 9 * 4 + 36 * 3, "tokens": 5 * 3}[case]
    for k in range(1, 20):
        assert along.forward_pays(k) == (k <= most) == ((3 + 2.5 * k) * f < 6 * f + k * p)


def test_without_decay_the_groups_alone_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = train("tanh", "momentum", tmp_path)
    memory = build(training.path, training.subject, class_groups(training.subject), segments=2)
    rows: list[int] = []
    backward = Carried.backward
    monkeypatch.setattr(Carried, "backward", lambda *args: rows.append(len(args[-1])) or backward(*args))
    assert (masses(training, memory)[:, -1] == 0).all()
    assert rows == [3] * memory.evaluations
    assert replace(memory, displacements=torch.zeros_like(memory.displacements)).used() == 0


# ---------------------------------------------------------------------------------------------------------------- kinks


class Kinked(nn.Module):
    """ReLU in every way of writing it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d, e, f = self.layers
        x = torch.relu(a(x)) + F.relu(b(x), inplace=True) + c(x).relu() + nn.ReLU(inplace=True)(d(x))
        y = e(x)
        y.relu_()
        return self.last(F.relu(input=f(y)))


def test_kinks_are_what_relu_is_on_average() -> None:
    low, high = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    z = torch.lerp(low, high, torch.linspace(0, 1, 100_001)[:, None])
    x = torch.randn(50, requires_grad=True)
    with Averaged([(low, low.relu())], [(high, high.relu())]):
        found = torch.relu(x)
    (slope,) = torch.autograd.grad(found.sum(), x)
    assert torch.allclose(found, z.relu().mean(0), atol=1e-5)
    assert torch.allclose(slope, (z > 0).to(z).mean(0), atol=1e-4)


def test_at_a_point_kinks_change_nothing(tmp_path: Path) -> None:
    training = train(Case("kinked", Kinked), "momentum", tmp_path)
    along, carried, (low, _), moved = directional(training)
    inputs, pairs = queries(training.subject)
    assert len(carried._kinks(low)) == 6
    expected = output_gradients(training.subject, along.flat, low, inputs, pairs) @ moved.T
    assert torch.allclose(carried.backward(low, low, moved), expected, atol=1e-12)
    assert torch.allclose(carried.forward(low, low, moved), expected, atol=1e-12)


def test_one_node_with_kinks_finds_what_many_midpoints_find(tmp_path: Path) -> None:
    training = train(Case("kinked", Kinked), "momentum", tmp_path)
    subject, groups = training.subject, two_per_class(training.subject)
    inputs, pairs = queries(subject, 20)
    few = build(training.path, subject, groups, segments=STEPS, nodes=1)
    expected, plain = (plain_mass(subject, replace(few, nodes=n), inputs, pairs) for n in (60, 1))
    found = mass(few, subject, inputs, pairs)
    assert (found - expected).norm() < 0.25 * (plain - expected).norm()


def plain_mass(subject: Subject, memory: Memory, inputs: Tensor, pairs: Pairs) -> Tensor:
    """Mass by midpoints alone: kinks are hit or missed."""
    flat = FlatModel(subject.model)
    parts = [output_gradients(subject, flat, state, inputs, pairs) @ moved.T for state, moved in memory.points()]
    return torch.stack(parts).sum(0)


# -------------------------------------------------------------------------------------------------------------- lengths


def test_segments_are_of_equal_length(tmp_path: Path) -> None:
    path = train("tanh", "cosine", tmp_path).path
    cuts = length_cuts(path, range(STEPS + 1), 4)
    states = [path.snapshot(step).state for step in range(STEPS + 1)]
    along = torch.tensor([0.0, *[(b - a).norm() for a, b in pairwise(states)]]).cumsum(0)
    assert (cuts[0], cuts[-1]) == (0, STEPS)
    for place, cut in enumerate(cuts[1:-1], 1):
        assert cut == (along - place / 4 * along[-1]).abs().argmin()
    assert length_cuts(path, [0, 5, 12], 40) == [0, 1, 2]


def test_joined_segments_are_those_of_a_coarser_walk(tmp_path: Path) -> None:
    training = train("batch norm", "ema", tmp_path)
    groups = class_groups(training.subject)
    fine, coarse = (displaced(training.path, training.subject, groups, at) for at in (range(STEPS + 1), [0, 3, 4, 12]))
    found, expected = list(joined(fine, [0, 3, 4, 12])), list(coarse)
    assert len(found) == len(expected) == 4
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.low, b.low)
        assert torch.allclose(a.high, b.high)
        assert torch.allclose(a.moved, b.moved, atol=1e-13)


# --------------------------------------------------------------------------------------------------------------- choice


def sample(training: Training) -> tuple[Tensor, Pairs, Tensor]:
    """Some queries, and three probes of each."""
    inputs, pairs = queries(training.subject)
    noise = torch.randn(len(inputs), 3, *inputs.shape[1:], generator=torch.Generator().manual_seed(7))
    return inputs, pairs, inputs[:, None] + 0.05 * noise


def choice(training: Training, tolerance: float, most: Fineness) -> Choice:
    groups, finer = two_per_class(training.subject), Fineness(STEPS, 4)
    return choose(training.path, training.subject, groups, *sample(training), tolerance, most, finer)


def true_error(training: Training, memory: Memory, nodes: int = 4) -> float:
    """The shift's error, written out query by query and probe by probe, against every step by itself."""
    subject, groups = training.subject, two_per_class(training.subject)
    inputs, pairs, probes = sample(training)
    flat, first = FlatModel(subject.model), training.path.snapshot(0).state
    masses_of = lambda x, p: (  # noqa: E731
        mass(memory, subject, x, p),
        fine_mass(training.path, subject, groups, x, p, STEPS, nodes),
        p.margin(subject.predict(x)),
        outputs_at(subject, flat, first, x, p),
    )
    distances, residuals, changes = [], [], []
    for m in range(len(inputs)):
        pair = pairs[m : m + 1]
        clean = masses_of(inputs[m : m + 1], pair)
        for probe in probes[m]:
            found, fine, margin, start = (a - b for a, b in zip(masses_of(probe[None], pair), clean, strict=True))
            by_class = [groups.by_class(s[0, :-1], subject.classes) for s in (found, fine)]
            distances.append((by_class[0] - by_class[1]).norm() / by_class[1].norm())
            residuals.append((margin - start - found.sum()).abs())
            changes.append(margin.abs())
    return max(torch.stack(distances).median().item(), (sum(residuals) / sum(changes)).item())


@pytest.mark.parametrize(("case", "recipe"), [("tanh", "momentum l2"), ("cnn", "adamw")])
@pytest.mark.parametrize("tolerance", [0.3, 0.05])
def test_the_choice_meets_its_tolerance_and_nothing_cheaper_does(
    case: str, recipe: str, tolerance: float, tmp_path: Path
) -> None:
    training = train(case, recipe, tmp_path)
    found = choice(training, tolerance, Fineness(STEPS, 4))
    assert found.met
    assert found.error <= tolerance
    assert true_error(training, found.memory) == pytest.approx(found.error, rel=1e-6)
    *cheaper, taken = found.candidates
    assert (taken.segments, taken.evaluations) == (found.memory.segments, found.memory.evaluations)
    assert all(c.error > tolerance and c.evaluations <= taken.evaluations for c in cheaper)


def test_a_tolerance_that_cannot_be_met_takes_the_best_and_says_so(tmp_path: Path) -> None:
    training = train("relu", "momentum", tmp_path)
    found = choice(training, 0.0, Fineness(STEPS, 2))
    assert not found.met
    assert found.error == min(c.error for c in found.candidates) > 0
    assert sorted({(c.segments, c.nodes) for c in found.candidates}) == [(6, 1), (6, 2), (12, 1), (12, 2)]
    assert true_error(training, found.memory) == pytest.approx(found.error, rel=1e-6)
    inputs = 3 * (1 + 3)
    assert found.evaluations == inputs * (4 * STEPS + sum(c.evaluations for c in found.candidates))


def test_the_chosen_memory_accounts_for_the_whole_path(tmp_path: Path) -> None:
    training = train("cnn batch norm", "ema", tmp_path)
    memory = choice(training, 0.5, Fineness(6, 2)).memory
    assert torch.equal(memory.ends[-1], training.path.final())
    assert torch.allclose(memory.displacements.sum(1), memory.ends.diff(dim=0), atol=1e-9)


# ------------------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("case", ["tanh", "batch norm"])
def test_what_rounding_does_to_masses_is_stated_and_bounded(case: str, tmp_path: Path) -> None:
    training = train(case, "momentum l2", tmp_path)
    subject, groups = training.subject, two_per_class(training.subject)
    memory = build(training.path, subject, groups, segments=4, nodes=2)
    inputs, pairs = queries(subject)
    kept = halved(memory, subject, inputs, pairs)
    assert kept.displacements.dtype == torch.float16
    exact, off = masses(training, memory), masses(training, kept.whole())
    assert (
        kept.whole().rounding == kept.error == pytest.approx(((off - exact).abs().mean() / exact.abs().mean()).item())
    )
    assert 0 < kept.error < 2e-3
    bound = torch.zeros_like(exact)
    for k, (state, _) in enumerate(memory.points()):
        slope = output_gradients(subject, FlatModel(subject.model), state, inputs, pairs).norm(dim=1)
        bound += slope[:, None] * kept.lost[k // memory.nodes] / memory.nodes
    assert ((off - exact).abs() <= bound + 1e-12).all()
    lengths = memory.displacements.norm(dim=-1)
    assert (kept.lost <= 2**-11 * lengths + 1e-9 * lengths.max()).all()


def test_rows_of_any_size_keep_their_digits(tmp_path: Path) -> None:
    """Without a scale of its own a row of size 1e-9 would vanish, and one of 1e9 overflow."""
    training = train("tanh", "momentum", tmp_path)
    memory = build(training.path, training.subject, class_groups(training.subject), segments=1, nodes=1)
    sizes = torch.tensor([1e-9, 1.0, 1e9, 0.0])
    scaled = replace(memory, displacements=memory.displacements[:, :1] * sizes[None, :, None])
    kept = halved(scaled, training.subject, *queries(training.subject))
    assert (kept.lost <= 2**-11 * scaled.displacements.norm(dim=-1)).all()
    assert (kept.whole().displacements[:, 3] == 0).all()

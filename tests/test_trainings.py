"""Whatever optimizer people take and whatever their loops do: the account equals the slow reference, entry by entry.

First the reference by itself: the displacements that it credits to examples and to decay are the training's own.
Then the package, from a path with every state and from one that keeps a few and is replayed between.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import reference
import torch
from cases import LOOPS, RECIPES, VARIANTS, Training, plain_pairs, queries, seen, train, two_per_class
from cases import float64 as float64
from reference import Seen
from torch import Tensor

from brittle.kernel.memory import build
from brittle.kernel.sweep import Quadrature, sweep
from brittle.records import Ledger

STEPS, NODES, QUERIES = 9, 2, 2
FEW_STATES = 3000
"""A budget in bytes that keeps a few states of these small models only."""

CROSSED = {
    "cnn batch norm": [
        "clip by value",
        "accumulation",
        "accumulation, clipped",
        "class weights",
        "mixup",
        "augmented",
        "attacked",
        "scaler",
        "looked at between",
        "thawed",
        "ema",
        "ema of buffers",
        "ema by hand",
        "swa, statistics anew",
        "fine-tuning",
        "replacement",
        "epochs",
        "told before",
        "closure, clipped",
        "resting statistics",
        "resumed",
        "resumed ema",
        "nadam decoupled",
        "rmsprop momentum",
    ],
    "dropout": [
        "momentum l2",
        "accumulation, clipped",
        "mixup, accumulated",
        "augmented",
        "attacked",
        "attacked in training mode",
        "scaler",
        "told before, accumulated",
        "closure",
        "resumed",
        "ema",
    ],
    "cnn dropout": ["accumulation", "attacked", "closure", "resumed adam", "swa", "resting statistics"],
    "attention dropout": ["adamw", "resumed"],
    "dropped layer": [
        "momentum l2",
        "adamw",
        "amsgrad",
        "nadam decoupled",
        "radam l2",
        "adamax l2",
        "rmsprop centered momentum",
        "adagrad l2",
        "foreach NAdam",
        "maximize SGD",
        "accumulation",
        "clip each tensor",
        "gradients kept at zero",
        "gradients kept at zero, adam",
        "ema by hand",
        "scaler, clipped adam",
        "scaler, gradients kept at zero",
        "resumed adam",
    ],
    "binary": ["accumulation", "nadam", "attacked"],
    "tokens": ["adagrad", "swa"],
    "attention": ["adamw amsgrad", "ema"],
    "residual": ["radam", "clip some tensors"],
    "twice": ["rmsprop centered", "clip by norm, then by value"],
    "group norm": ["adamax", "mixup"],
    "layer norm": ["nadam l2", "example weights"],
}
"""Models whose training differs by more than their gradients, and one or two of the others."""

PLAIN = [("tanh", recipe) for recipe in (*RECIPES, *VARIANTS, *LOOPS)]
TRAININGS = PLAIN + [
    pytest.param(case, recipe, marks=pytest.mark.slow) for case, recipes in CROSSED.items() for recipe in recipes
]


# ------------------------------------------------------------------------------------------------------- the reference


@cache
def told(case: str, recipe: str) -> tuple[Seen, Tensor]:
    """A training without a recorder: what it saw, and what every example did to its weights."""
    notes = seen(case, recipe, STEPS)
    return notes, reference.displacements(notes)


@pytest.mark.parametrize(("case", "recipe"), TRAININGS)
def test_the_reference_credits_what_the_training_moved(case: str, recipe: str) -> None:
    notes, moved = told(case, recipe)
    states = torch.stack([reference.flat(notes.state(at), notes) for at in range(notes.segments + 1)])
    parameters = slice(None, sum(p.numel() for p in notes.model.parameters()))
    assert torch.allclose(moved.sum(1)[:, parameters], states.diff(dim=0)[:, parameters], rtol=1e-10, atol=1e-11)
    assert (states[-1] - states[0]).norm() > 0.05


@pytest.mark.parametrize("case", ["tanh", "cnn", "attention", "twice", "tokens", "binary"])
def test_rows_apart_are_the_gradients_of_examples_on_their_own(case: str) -> None:
    notes = seen(case, "momentum", steps=3)
    for step in notes.steps:
        rows, alone = reference.row_gradients(notes, step), reference.example_gradients(notes, step)
        for row, example in zip(rows, alone, strict=True):
            assert torch.allclose(reference.flat(row, notes), reference.flat(example, notes), atol=1e-14)


def factors(notes: Seen) -> Tensor:
    """By what the gradient's coordinates were shrunk in the first step."""
    return torch.cat([f.reshape(-1) for f in notes.steps[0].factor.values()])


HAPPENS: dict[str, Callable[[Seen], bool]] = {
    "clipped": lambda n: factors(n).unique_consecutive().diff().abs().max().item() < 1e-12 and n.steps[0].clip < 0.9,
    "clip by value": lambda n: len(factors(n).unique()) > 10 and factors(n).max() == 1,
    "clip some tensors": lambda n: bool(
        n.steps[0].factor["0.bias"].max() < 0.9 and n.steps[0].factor["2.bias"].min() == 1
    ),
    "accumulation": lambda n: [len(p.ids) for p in n.steps[0].passes] == [4, 4, 4],
    "mixup": lambda n: n.steps[0].passes[0].ids.shape == (4, 2),
    "attacked": lambda n: not torch.equal(n.steps[0].passes[0].inputs, n.inputs[n.steps[0].ids]),
    "scaler": lambda n: not torch.equal(n.steps[1].ids, seen("tanh", "momentum l2").steps[1].ids),
    "ema": lambda n: n.average is not None and bool(n.average[1:].min() > 0) and n.average[0] == 0,
    "ema by hand": lambda n: n.average is not None and bool(n.average.min() > 0),
    "swa": lambda n: n.average is not None and n.average.count_nonzero() == 3,
    "replacement": lambda n: any(len(s.ids.unique()) < len(s.ids) for s in n.steps),
    "epochs": lambda n: [len(s.ids) for s in n.steps[:4]] == [4, 4, 2, 4],
    "maximize Adam": lambda n: bool(n.loss(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long)) < 0),
}


@pytest.mark.parametrize("recipe", HAPPENS)
def test_the_loop_does_what_it_is_named_after(recipe: str) -> None:
    notes, _ = told("tanh", recipe)
    assert HAPPENS[recipe](notes)
    assert notes.average is None or notes.average.sum() == pytest.approx(1)


def test_layers_rest_where_they_have_no_gradient() -> None:
    given = [set(step.settings) for step in seen("dropped layer", "momentum").steps]
    assert set.intersection(*given) == {"first.weight", "first.bias", "last.weight", "last.bias"}
    assert any("inner.weight" in names for names in given)
    assert not any("spare.weight" in names for names in given)
    kept = [set(step.settings) for step in seen("dropped layer", "gradients kept at zero").steps]
    first = next(k for k, names in enumerate(kept) if "inner.weight" in names)
    assert all("inner.weight" in names for names in kept[first:]), "a zero is a gradient"


# --------------------------------------------------------------------------------------------------------- the package


def ledger_of(training: Training, nodes: int = NODES) -> Ledger:
    quadrature = Quadrature(segment=1, nodes=nodes, most=nodes, gauss=True)
    return sweep(training.path, training.subject, *queries(training.subject, QUERIES), quadrature).ledger


def account_of(training: Training, case: str, recipe: str) -> reference.Account:
    """The slow account of the same training, which no recorder watched."""
    for name, tensor in told(case, recipe)[0].final.items():
        assert torch.equal(tensor, training.seen.final[name]), "recording changes nothing"
    notes, moved = told(case, recipe)
    inputs, pairs = queries(training.subject, QUERIES)
    return reference.account(notes, moved, inputs, plain_pairs(pairs), NODES, gauss=True)


def assert_equal(ledger: Ledger, expected: reference.Account) -> None:
    for row in ("start", "output", "decay", "buffers", "contributions"):
        assert torch.allclose(getattr(ledger, row), getattr(expected, row), rtol=0, atol=1e-8), row
    assert torch.allclose(ledger.residual + ledger.unexplained, expected.residual, rtol=0, atol=1e-8)
    assert ledger.unexplained.abs().max() < 1e-8
    assert torch.allclose(ledger.total(), ledger.output, atol=1e-12)


@pytest.mark.parametrize(("case", "recipe"), TRAININGS)
def test_the_ledger_equals_the_reference_entry_by_entry(case: str, recipe: str, tmp_path: Path) -> None:
    thinned = train(case, recipe, tmp_path / "thinned", steps=STEPS, budget=FEW_STATES)
    assert len(thinned.path.marks) < STEPS
    expected = account_of(thinned, case, recipe)
    assert expected.contributions.abs().max() > 0.01
    assert_equal(ledger_of(thinned), expected)
    if (case, recipe) in PLAIN:
        stored = train(case, recipe, tmp_path / "stored", steps=STEPS)
        assert len(stored.path.marks) == STEPS + 1
        assert_equal(ledger_of(stored), expected)


@pytest.mark.parametrize(("case", "recipe"), [("tanh", "nadam l2"), ("cnn batch norm", "swa"), ("dropout", "scaler")])
def test_nothing_is_left_over_with_nodes_enough(case: str, recipe: str, tmp_path: Path) -> None:
    ledger = ledger_of(train(case, recipe, tmp_path), nodes=9)
    assert ledger.residual.abs().max() < 1e-9
    assert ledger.unexplained.abs().max() < 1e-9


MEMORIES = [
    ("cnn batch norm", "momentum l2"),
    ("dropped layer", "nadam decoupled"),
    ("dropout", "accumulation, clipped"),
    ("tanh", "rmsprop centered momentum"),
    ("tanh", "mixup"),
    ("tanh", "clip by value"),
    ("cnn batch norm", "scaler"),
    ("cnn batch norm", "ema of buffers"),
    ("tanh", "swa"),
    ("tanh", "resumed ema"),
]


@pytest.mark.parametrize(("case", "recipe"), MEMORIES)
def test_the_memorys_displacements_lead_from_the_first_weights_to_the_audited(
    case: str, recipe: str, tmp_path: Path
) -> None:
    training = train(case, recipe, tmp_path, budget=FEW_STATES)
    memory = build(training.path, training.subject, two_per_class(training.subject), segments=5)
    ends = [reference.flat(training.seen.state(at), training.seen) for at in (0, training.seen.segments)]
    assert torch.allclose(memory.displacements.sum((0, 1)), ends[1] - ends[0], atol=1e-9)

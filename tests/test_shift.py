"""The shift map: what it adds up to, who leaves and arrives, and where the margin is gone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import CASES, STEPS, Training, train, two_per_class
from cases import float64 as float64
from torch import Tensor, nn

from brittle.kernel.memory import Memory, build, mass
from brittle.probes import MAP_SHARES, Family
from brittle.records import Groups, Pairs, Queries, ShiftMap
from brittle.shift import draw_probes, flow, gone_at, probe_inputs, shift_map
from brittle.split import queries_at
from brittle.subject import Subject

SHARES = (1 / 8, 1 / 4)


def straight(name: str, reference: float) -> Family:
    """A walk along a direction that is drawn once an input."""
    return Family(
        name,
        "L2",
        reference,
        lambda x, g: torch.randn(x.shape, generator=g),
        lambda x, s, d: x + s.reshape(-1, *[1] * (x.dim() - 1)) * d,
    )


FAMILIES = (straight("near", 0.02), straight("far", 0.08))


def mapped(training: Training, queries: Queries, nodes: int = 8) -> tuple[ShiftMap, Memory]:
    memory = build(training.path, training.subject, two_per_class(training.subject), segments=STEPS, nodes=nodes)
    draws = draw_probes(queries, FAMILIES, torch.Generator().manual_seed(0))
    whole = lambda x, pairs: mass(memory, training.subject, x, pairs)  # noqa: E731
    return shift_map(training.subject, queries, FAMILIES, draws, whole, SHARES), memory


def test_the_shift_is_the_change_of_mass_query_by_query(tmp_path: Path) -> None:
    training = train("cnn", "momentum l2", tmp_path)
    queries = queries_at(training.subject, torch.tensor([4, 1, 7]))
    found, memory = mapped(training, queries, nodes=2)
    draws = draw_probes(queries, FAMILIES, torch.Generator().manual_seed(0))
    assert found.severities.tolist() == [[0.0025, 0.005], [0.01, 0.02]]
    for m in range(3):
        pair = queries.pairs[m : m + 1]
        clean = mass(memory, training.subject, queries.inputs[m : m + 1], pair)
        assert torch.allclose(found.mass[m], clean[0], atol=1e-12)
        for f, family in enumerate(FAMILIES):
            for k, share in enumerate(SHARES):
                probe = queries.inputs[m] + share * family.reference * draws[family.name][m]
                there = mass(memory, training.subject, probe[None], pair)
                assert torch.allclose(found.shift[m, f, k], (there - clean)[0], atol=1e-12)
                logits = training.subject.predict(probe[None])[0]
                own, rival = int(pair.predicted), int(pair.rival)
                assert found.probed_margin[m, f, k] == pytest.approx((logits[own] - logits[rival]).item())
                others = [z for c, z in enumerate(logits.tolist()) if c != own]
                assert found.probed_lead[m, f, k] == pytest.approx(logits[own].item() - max(others))
    assert torch.allclose(found.rate, found.shift[:, :, 0] / found.severities[:, 0, None])


@pytest.mark.parametrize("case", ["tanh", "batch norm"])
def test_shifts_add_up_to_the_change_of_what_was_learned(case: str, tmp_path: Path) -> None:
    """The margin's change, less that of the untrained network."""
    training = train(case, "momentum l2", tmp_path)
    queries = queries_at(training.subject, torch.arange(5))
    found, _ = mapped(training, queries, nodes=20)
    start = CASES[case].model().eval()
    draws = draw_probes(queries, FAMILIES, torch.Generator().manual_seed(0))
    for f, family in enumerate(FAMILIES):
        probes = probe_inputs(queries.inputs, family, draws[family.name], SHARES)
        for k in range(2):
            untrained = queries.pairs.margin(start(probes[:, k])) - queries.pairs.margin(start(queries.inputs))
            learned = found.probed_margin[:, f, k] - found.margin - untrained
            assert torch.allclose(found.shift[:, f, k].sum(1), learned, atol=1e-6)
            assert learned.abs().max() > 1e-4


def test_a_linear_models_mass_shifts_in_proportion_to_the_severity(tmp_path: Path) -> None:
    training = train("linear", "momentum", tmp_path)
    found, _ = mapped(training, queries_at(training.subject, torch.arange(4)), nodes=1)
    assert torch.allclose(found.shift[:, :, 1], 2 * found.shift[:, :, 0], atol=1e-12)


def test_rows_of_the_map_are_its_queries(tmp_path: Path) -> None:
    training = train("linear", "sgd", tmp_path)
    found, _ = mapped(training, queries_at(training.subject, torch.arange(4)), nodes=1)
    rows = torch.tensor([2, 0])
    for name in ("mass", "probed", "rival", "margin", "probed_margin", "probed_lead"):
        assert torch.equal(getattr(found[rows], name), getattr(found, name)[rows])
    assert found[rows].families == found.families


def test_probes_share_their_draw_over_all_severities() -> None:
    inputs = torch.rand(3, 4)
    family = straight("line", 2.0)
    draws = family.draw(inputs, torch.Generator().manual_seed(1))
    probes = probe_inputs(inputs, family, draws, (0.0, 0.5, 1.0))
    assert probes.shape == (3, 3, 4)
    assert torch.equal(probes[:, 0], inputs)
    assert torch.allclose(probes[:, 2] - inputs, 2 * (probes[:, 1] - inputs))
    assert max(MAP_SHARES) <= 0.25


# ------------------------------------------------------------------------------------------------------------- gone at


def plane(weights: list[list[float]]) -> Subject:
    """A linear classifier of points in the square."""
    model = nn.Linear(2, len(weights), bias=False).eval()
    with torch.no_grad():
        model.weight.copy_(torch.tensor(weights))
    inputs = torch.tensor([[0.8, 0.2], [0.6, 0.5], [0.1, 0.1]])
    return Subject(model, (inputs, torch.tensor([0, 0, 1])), (inputs, torch.tensor([0, 0, 1])))


def along(direction: Tensor, reference: float) -> Family:
    return Family("line", "L2", reference, lambda x, g: x, lambda x, s, d: x + s[:, None] * direction)


def leads(subject: Subject, *families: Family) -> ShiftMap:
    queries = queries_at(subject, torch.arange(3))
    named = [replace(family, name=str(f)) for f, family in enumerate(families)]
    draws = {family.name: queries.inputs for family in named}
    nothing = lambda x, pairs: torch.zeros(len(x), 1)  # noqa: E731
    return shift_map(subject, queries, named, draws, nothing)


def test_in_a_linear_model_the_severity_at_which_the_prediction_flips_is_exact() -> None:
    """Two classes, z0 - z1 = x0 - x1: walking along (-1, 1) / sqrt 2 it is gone after (x0 - x1) / sqrt 2."""
    subject = plane([[1.0, 0.0], [0.0, 1.0]])
    down = torch.tensor([-1.0, 1.0]) / math.sqrt(2)
    found = gone_at(leads(subject, along(down, 1.0), along(-down, 1.0), along(down, 0.04)))
    expected = torch.tensor([0.6, 0.1, 0.0]) / math.sqrt(2)
    assert torch.allclose(found[:2, 0], expected[:2])
    assert torch.allclose(found[:2, 2], expected[:2]), "whatever the reference"
    assert (found[:2, 1] == torch.inf).all(), "away from the boundary, never"


def test_a_third_class_that_overtakes_flips_the_prediction_too() -> None:
    """Predicted 0, rival 1 at the query; along the first axis class 2 gains, and class 1 does not."""
    subject = plane([[1.0, 0.0], [0.9, 0.0], [0.2, 0.0]])
    shift = leads(subject, along(torch.tensor([-1.0, 0.0]), 8.0))
    assert shift.rival[0] == 1
    assert gone_at(shift)[0, 0] > 0
    assert (shift.probed_lead <= shift.probed_margin + 1e-12).all()


# ---------------------------------------------------------------------------------------------------------------- flow


def made(mass: list[float], probed: list[float], rival: int = 1) -> ShiftMap:
    """One query under one family: the mass at the query and at the larger severity."""
    return ShiftMap(
        families=("f",),
        units=("u",),
        severities=torch.tensor([[0.1, 0.5]]),
        reference=torch.tensor([2.0]),
        mass=torch.tensor([mass]),
        probed=torch.tensor([[[mass, probed]]]),
        rival=torch.tensor([rival]),
        margin=torch.tensor([1.0]),
        probed_margin=torch.tensor([[[1.0, 0.5]]]),
        probed_lead=torch.tensor([[[1.0, 0.5]]]),
    )


FOUR = Groups(torch.arange(4), torch.tensor([0, 0, 1, 1]), ("a", "b", "c", "d"))


def test_the_group_that_held_up_and_falls_most_leaves_and_the_rivals_that_turns_most_arrives() -> None:
    found = flow(made([5.0, 3.0, -2.0, -1.0], [4.5, 2.0, -2.5, -3.0]), FOUR)
    assert (int(found.leaving), int(found.arriving)) == (1, 3)
    assert found.lost.item() == pytest.approx(1.0 / 0.5)
    assert found.gained.item() == pytest.approx(2.0 / 0.5)


def test_what_spoke_against_the_prediction_does_not_leave() -> None:
    found = flow(made([1.0, -5.0, -2.0, 1.0], [0.9, -9.0, -2.0, 1.0]), FOUR)
    assert int(found.leaving) == 0
    assert int(found.arriving) in (2, 3)


def test_where_nothing_falls_nothing_is_lost() -> None:
    found = flow(made([5.0, 3.0, -2.0, -1.0], [6.0, 3.5, -1.0, -0.5]), FOUR)
    assert found.lost.item() == 0
    assert found.gained.item() == 0


def test_arrival_is_read_from_the_rivals_class() -> None:
    shift = made([5.0, -3.0, 2.0, -1.0], [5.0, -4.0, -2.0, -5.0], rival=0)
    assert int(flow(shift, FOUR).arriving) == 1
    assert isinstance(shift.rival, Tensor)
    assert Pairs(torch.tensor([1]), shift.rival).rival.tolist() == [0]

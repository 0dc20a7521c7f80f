"""The account of each output, example by example: equal to the slow reference, and obeying its own laws."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from by_hand import ByHand, sgd
from cases import CASES, COUNT, QUERIES, RECIPES, SMOOTH, STEPS, Training, plain_pairs, queries, train
from cases import float64 as float64
from torch import Tensor, nn
from torch.optim import SGD

from brittle.errors import UnsupportedError
from brittle.kernel.credit import Credit
from brittle.kernel.lowrank import LowRank
from brittle.kernel.mixed import Layout
from brittle.kernel.quadrature import Allowance, Line, line_gradient
from brittle.kernel.sweep import Quadrature, Swept, segment_cuts, stretches, sweep
from brittle.records import Ledger, Pairs

NODES = 3
BATCH_NORM = ["batch norm", "cnn batch norm"]


def fixed(nodes: int = NODES, segment: int = 1) -> Quadrature:
    """The same number of midpoints in every segment."""
    return Quadrature(segment=segment, nodes=nodes, most=nodes, tolerance=0.0)


def swept(training: Training, quadrature: Quadrature | None = None) -> Swept:
    inputs, pairs = queries(training.subject)
    return sweep(training.path, training.subject, inputs, pairs, quadrature or fixed())


def slow(training: Training, nodes: int = NODES, cuts: list[int] | None = None) -> reference.Account:
    inputs, pairs = queries(training.subject)
    split = reference.row_gradients if training.couples else reference.example_gradients
    moved = reference.displacements(training.seen, split)
    return reference.account(training.seen, moved, inputs, plain_pairs(pairs), nodes, cuts)


def assert_equal(ledger: Ledger, expected: reference.Account, atol: float = 1e-9) -> None:
    for row in ("start", "contributions", "decay", "buffers", "output"):
        assert torch.allclose(getattr(ledger, row), getattr(expected, row), rtol=1e-9, atol=atol), row
    assert torch.allclose(ledger.residual + ledger.unexplained, expected.residual, atol=10 * atol)


def assert_balanced(ledger: Ledger) -> None:
    assert torch.allclose(ledger.total(), ledger.output, atol=1e-12)
    learned = (ledger.output - ledger.start).abs().max()
    assert learned > 0.05
    assert ledger.unexplained.abs().max() < 1e-8 * learned


# ------------------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("case", CASES)
def test_every_model_is_accounted_for_as_by_the_reference(case: str, tmp_path: Path) -> None:
    training = train(case, "momentum l2", tmp_path)
    found, expected = swept(training), slow(training)
    assert_equal(found.ledger, expected)
    assert_balanced(found.ledger)
    assert (expected.buffers.abs().min() > 1e-3) == (case in BATCH_NORM)


@pytest.mark.parametrize("case", BATCH_NORM)
def test_adam_gives_no_credit_where_a_normalized_batch_has_no_gradient(case: str, tmp_path: Path) -> None:
    """The bias before the normalization: its rows cancel, and Adam divides them by the root of their sum."""
    training = train(case, "adamw", tmp_path)
    found = swept(training)
    assert_equal(found.ledger, slow(training))
    assert found.ledger.contributions.abs().max() < 20
    assert found.ledger.unexplained.abs().max() < 1e-6


@pytest.fixture
def long_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments as long as they are asked for, in short paths as well."""
    monkeypatch.setattr("brittle.kernel.sweep.segment_cuts", even_cuts)


def even_cuts(steps: int, segment: int) -> list[int]:
    return sorted({0, *range(steps, 0, -segment)})


def test_a_path_is_cut_into_segments_that_are_short_where_it_begins_and_many_where_it_is_short() -> None:
    assert segment_cuts(803, 8) == [0, 1, 2, 3, 4, 6, 9, 13, *range(19, 803, 8), 803]
    assert segment_cuts(60, 8) == [0, 1, 2, 3, 4, 6, 9, 13, *range(18, 59, 5), 60]
    assert segment_cuts(12, 8) == list(range(13))
    assert segment_cuts(800, 1) == list(range(801))
    assert segment_cuts(1, 8) == [0, 1]
    for steps, segment in ((7, 3), (100, 7), (999, 50)):
        cuts = segment_cuts(steps, segment)
        assert (cuts[0], cuts[-1]) == (0, steps)
        assert 1 <= torch.tensor(cuts).diff().min() <= torch.tensor(cuts).diff().max() <= segment


@pytest.mark.usefixtures("long_segments")
@pytest.mark.parametrize("segment", [2, 5, 100])
def test_segments_of_several_steps_share_one_gradient(segment: int, tmp_path: Path) -> None:
    training = train("cnn", "nesterov l2", tmp_path)
    cuts = even_cuts(STEPS, segment)
    assert_equal(swept(training, fixed(2, segment)).ledger, slow(training, 2, cuts))


@pytest.mark.usefixtures("long_segments")
@pytest.mark.parametrize("recipe", ["momentum l2", "adamw"])
def test_segments_under_batch_normalization_move_weights_and_statistics_together(recipe: str, tmp_path: Path) -> None:
    training = train("cnn batch norm", recipe, tmp_path)
    assert_equal(swept(training, fixed(2, segment=4)).ledger, slow(training, 2, [0, 4, 8, 12]))


def test_the_split_is_by_row_and_not_by_loss_term(tmp_path: Path) -> None:
    """Both splits of a normalized batch add up to the same learning, and give different credit."""
    training = train("batch norm", "momentum", tmp_path)
    found = swept(training).ledger
    inputs, pairs = queries(training.subject)
    terms = reference.displacements(training.seen, reference.loss_term_gradients)
    other = reference.account(training.seen, terms, inputs, plain_pairs(pairs), NODES)
    assert torch.allclose(found.contributions.sum(1), other.contributions.sum(1), atol=1e-9)
    differ = (found.contributions - other.contributions).norm() / other.contributions.norm()
    assert 0.05 < differ < 2


# -------------------------------------------------------------------------------------------------------- the identity


@pytest.mark.parametrize("case", SMOOTH)
def test_the_residual_of_smooth_networks_falls_as_nodes_rise(case: str, tmp_path: Path) -> None:
    training = train(case, "momentum", tmp_path)
    coarse, finer = (swept(training, fixed(n)).ledger.residual.abs().max() for n in (1, 9))
    assert finer < coarse / 40 + 1e-9, "the error of the midpoint rule falls with the square of the nodes"


def test_the_residual_is_gone_with_enough_nodes(tmp_path: Path) -> None:
    ledger = swept(train("tanh", "momentum", tmp_path), fixed(81)).ledger
    assert ledger.relative_residual < 1e-6
    assert ledger.residual.abs().max() < 1e-6


def test_a_linear_model_leaves_no_residual(tmp_path: Path) -> None:
    ledger = swept(train("linear", "adam l2", tmp_path), fixed(1, segment=STEPS)).ledger
    assert ledger.residual.abs().max() < 1e-12


def test_a_kinked_network_is_accounted_for_but_for_its_residual(tmp_path: Path) -> None:
    ledger = swept(train("relu", "momentum", tmp_path), fixed(9)).ledger
    assert_balanced(ledger)
    assert 0 < ledger.relative_residual < 0.01


def test_output_and_start_are_the_models_own(tmp_path: Path) -> None:
    training = train("cnn batch norm", "momentum", tmp_path)
    inputs, pairs = queries(training.subject)
    ledger = swept(training).ledger
    assert torch.allclose(ledger.output, pairs.margin(training.subject.predict(inputs)))
    assert torch.allclose(ledger.start, pairs.margin(CASES["cnn batch norm"].model().eval()(inputs)))


# ---------------------------------------------------------------------------------------------------------- quadrature


def test_nodes_are_tripled_until_the_increment_is_met(tmp_path: Path) -> None:
    training = train("group norm", "momentum", tmp_path)
    tolerances = (0.5, 0.02, 1e-4)
    found = [swept(training, Quadrature(segment=3, nodes=1, most=81, tolerance=t)) for t in tolerances]
    for tolerance, swept_ in zip(tolerances, found, strict=True):
        assert swept_.ledger.relative_residual <= tolerance
    assert found[0].evaluations < found[1].evaluations < found[2].evaluations


def test_tripled_nodes_are_the_nodes_themselves(tmp_path: Path) -> None:
    training = train("tanh", "momentum", tmp_path)
    grown = swept(training, Quadrature(segment=4, nodes=1, most=9, tolerance=0.0))
    direct = swept(training, fixed(9, segment=4))
    assert torch.allclose(grown.ledger.contributions, direct.ledger.contributions, atol=1e-13)


def test_a_line_is_held_to_its_own_share_first_and_then_to_the_sums() -> None:
    """Misses of either sign: what one line misses beyond its share may be what another one gave back."""
    allowance = Allowance(line=1.0, total=2.0, so_far=torch.tensor([3.0, -3.0]))
    back, on = torch.tensor([-2.0, 2.0]), torch.tensor([0.5, -0.5])
    assert not allowance.covers(back, finely=False)
    assert allowance.covers(back, finely=True)
    assert not allowance.covers(on, finely=False)
    assert not allowance.covers(on, finely=True)
    assert Allowance(1.0, 4.0, allowance.so_far).covers(on, finely=False)


def test_the_last_midpoints_are_for_the_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = train("group norm", "momentum", tmp_path)
    lines: list[int] = []

    def noted(*args: Any, **options: Any) -> Line:
        found = line_gradient(*args, **options)
        lines.append(found.nodes)
        return found

    monkeypatch.setattr("brittle.kernel.sweep.line_gradient", noted)
    monkeypatch.setattr("brittle.kernel.sweep._Account._missed", lambda account: torch.zeros_like(account.decay))
    swept(training, Quadrature(segment=3, nodes=1, most=27, tolerance=1e-9))
    assert set(lines) == {27}  # each line's miss alone is more than the sum may be
    lines.clear()
    monkeypatch.setattr("brittle.kernel.sweep.Allowance", lambda **given: Allowance(**{**given, "total": math.inf}))
    swept(training, Quadrature(segment=3, nodes=1, most=27, tolerance=1e-9))
    assert set(lines) == {9}


@pytest.mark.parametrize("case", ["tanh", "cnn"])
def test_a_few_gauss_nodes_are_worth_many_midpoints_on_smooth_networks(case: str, tmp_path: Path) -> None:
    training = train(case, "momentum", tmp_path)
    by_gauss = swept(training, Quadrature(segment=1, nodes=3, gauss=True))
    midpoints = swept(training, fixed(3))
    assert by_gauss.evaluations == midpoints.evaluations
    assert by_gauss.ledger.residual.abs().max() < midpoints.ledger.residual.abs().max() / 1000


@pytest.mark.usefixtures("long_segments")
def test_evaluations_count_queries_and_training_rows(tmp_path: Path) -> None:
    training = train("tanh", "momentum", tmp_path)
    assert swept(training, fixed(3, segment=4)).evaluations == 3 * 3 * QUERIES + STEPS * 4


# ---------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("case", ["tanh", "batch norm"])
def test_a_permutation_of_the_examples_permutes_the_ledger(case: str, tmp_path: Path) -> None:
    place = torch.randperm(COUNT, generator=torch.Generator().manual_seed(3))
    plain = swept(train(case, "momentum", tmp_path / "plain")).ledger.contributions
    moved = swept(train(case, "momentum", tmp_path / "moved", place=place)).ledger.contributions
    assert torch.allclose(moved[:, place], plain, atol=1e-12)


@pytest.mark.parametrize("case", ["tanh", "cnn batch norm"])
def test_blocks_of_queries_do_not_matter(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = train(case, "adamw", tmp_path)
    inputs, pairs = queries(training.subject)
    whole = swept(training).ledger
    parts = [
        sweep(training.path, training.subject, inputs[rows], pairs[rows], fixed()).ledger
        for rows in (slice(0, 1), slice(1, None))
    ]
    assert torch.allclose(torch.cat([p.contributions for p in parts]), whole.contributions, atol=1e-12)
    monkeypatch.setattr("brittle.kernel.quadrature.BLOCK", 2)
    assert torch.allclose(swept(training).ledger.contributions, whole.contributions, atol=1e-12)


def test_swapping_the_classes_of_the_margin_changes_every_sign(tmp_path: Path) -> None:
    training = train("tanh", "momentum l2", tmp_path)
    inputs, pairs = queries(training.subject)
    other = sweep(training.path, training.subject, inputs, Pairs(pairs.rival, pairs.predicted), fixed()).ledger
    plain = swept(training).ledger
    for row in ("start", "contributions", "decay", "residual", "output"):
        assert torch.allclose(getattr(other, row), -getattr(plain, row), atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------- rest


@pytest.mark.parametrize("recipe", ["momentum l2", "adamw"])
@pytest.mark.parametrize("case", ["tanh", "batch norm"])
def test_steps_that_are_replayed_give_the_same_ledger(case: str, recipe: str, tmp_path: Path) -> None:
    stored = train(case, recipe, tmp_path / "stored")
    thinned = train(case, recipe, tmp_path / "thinned", budget=3000)
    assert len(thinned.path.marks) < STEPS / 2 < len(stored.path.marks)
    found, expected = swept(thinned), swept(stored).ledger
    for row in ("contributions", "decay", "buffers", "residual"):
        assert torch.allclose(getattr(found.ledger, row), getattr(expected, row), atol=1e-9), row
    assert found.drift < 1e-7


def test_the_subjects_model_is_left_alone(tmp_path: Path) -> None:
    training = train("batch norm", "momentum", tmp_path)
    before = {k: v.clone() for k, v in training.subject.model.state_dict().items()}
    wanted = [p.requires_grad for p in training.subject.model.parameters()]
    swept(training)
    assert all(torch.equal(before[k], v) for k, v in training.subject.model.state_dict().items())
    assert [p.requires_grad for p in training.subject.model.parameters()] == wanted
    assert not training.subject.model.training
    assert all(p.grad is None or p.grad.isfinite().all() for p in training.subject.model.parameters())


@pytest.mark.usefixtures("long_segments")
def test_progress_counts_steps(tmp_path: Path) -> None:
    training, told = train("tanh", "sgd", tmp_path), []
    inputs, pairs = queries(training.subject)
    sweep(
        training.path,
        training.subject,
        inputs,
        pairs,
        fixed(1, segment=5),
        progress=lambda done, of: told.append((done, of)),
    )
    assert told == [(5, 12), (10, 12), (12, 12)]


class Reused(nn.Module):
    """Reads a layer's weight past the layer: its rows cannot be told."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.tanh(self.first(x)) @ self.first.weight)


def test_a_model_that_cannot_be_taken_apart_is_refused_by_name(tmp_path: Path) -> None:
    case = replace(CASES["tanh"], build=Reused)
    training = train(case, "momentum", tmp_path)
    with pytest.raises(UnsupportedError, match=r"those of first\.weight do not add up"):
        swept(training)


def test_a_frozen_trunk_that_the_model_itself_keeps_from_learning_is_fine(tmp_path: Path) -> None:
    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = nn.Linear(4, 5).requires_grad_(False), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = F.tanh(self.trunk(x))
            return self.head(h)

    recipe = replace(RECIPES["momentum"], optimizer=lambda m: SGD(m.head.parameters(), lr=0.1, momentum=0.9))
    training = train(replace(CASES["tanh"], build=Trunk), recipe, tmp_path)
    assert_equal(swept(training).ledger, slow(training))


# ---------------------------------------------------------------------------------------------------------- stretches


@pytest.mark.parametrize("recipe", ["momentum l2", "adamw", "sgd"])
def test_the_accounts_of_stretches_add_up_to_the_whole(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = train("tanh", recipe, tmp_path)
    inputs, pairs = queries(training.subject)
    parts = [(0, 3), (3, 4), (4, training.path.steps)]
    whole = swept(training).ledger
    monkeypatch.setattr("brittle.kernel.sweep.TAIL", 1e-14)
    found = [sweep(training.path, training.subject, inputs, pairs, fixed(), stretch=part).ledger for part in parts]
    for row in ("contributions", "decay", "buffers", "unexplained", "residual"):
        assert torch.allclose(sum(getattr(part, row) for part in found), getattr(whole, row), atol=1e-11), row
    assert torch.equal(found[0].start, whole.start)
    assert torch.equal(found[-1].output, whole.output)
    for before, after in pairwise(found):
        assert torch.allclose(before.output, after.start, atol=1e-12)
        assert before.contributions.abs().max() > 1e-3
    for part in found:
        assert torch.allclose(part.total(), part.output, atol=1e-12)


def test_a_stretch_needs_the_later_steps_only_as_long_as_momentum_lasts(tmp_path: Path) -> None:
    loop = ByHand(tmp_path, sgd(momentum=0.3))
    loop.steps(200)
    path, subject = loop.close(), loop.subject()
    inputs, pairs = queries(subject)
    parts = stretches(path, fixed(segment=4))
    assert parts == [(0, parts[0][1]), (parts[0][1], 200)]
    walked: list[int] = []
    found = [
        sweep(path, subject, inputs, pairs, fixed(segment=4), stretch=part, progress=lambda _, n: walked.append(n))
        for part in parts
    ]
    assert parts[0][1] < walked[0] < 150
    whole = sweep(path, subject, inputs, pairs, fixed(segment=4)).ledger
    total = sum(part.ledger.contributions for part in found)
    assert torch.allclose(total, whole.contributions, atol=1e-8)


# ----------------------------------------------------------------------------------------------------------- low rank


@pytest.fixture
def low_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear weights of any size are kept of low rank, and nothing is left out."""
    monkeypatch.setattr("brittle.kernel.mixed.LEAST", 1)
    monkeypatch.setattr("brittle.kernel.sweep.LEFT_OUT", 0.0)
    monkeypatch.setattr("brittle.kernel.lowrank.LowRank.dear", False)


@pytest.mark.usefixtures("low_rank", "long_segments")
@pytest.mark.parametrize("recipe", ["sgd", "momentum l2", "nesterov"])
@pytest.mark.parametrize("case", ["tanh", "cnn"])
def test_low_rank_is_the_same_account(case: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = train(case, recipe, tmp_path)
    layouts: list[Layout] = []
    monkeypatch.setattr(
        "brittle.kernel.sweep.Credit", lambda layout, *rest: layouts.append(layout) or Credit(layout, *rest)
    )
    found = swept(training, fixed(segment=4)).ledger
    assert layouts[-1].low
    assert_equal(found, slow(training, cuts=even_cuts(STEPS, 4)))
    assert_balanced(found)


@pytest.mark.usefixtures("low_rank", "long_segments")
@pytest.mark.parametrize("dear", [True, False])
def test_low_rank_becomes_a_matrix_where_it_must(dear: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where terms are too many, or a step's rule is not plain: gradients of the first steps are clipped by value."""
    training = train("tanh", "momentum l2" if dear else "clip by value", tmp_path)
    monkeypatch.setattr("brittle.kernel.sweep.plain", lambda rule: True)
    monkeypatch.setattr("brittle.kernel.lowrank.LowRank.dear", dear)
    plain_before = []
    original = Credit.back

    def watched(credit: Credit, *rest: Any) -> Any:
        found = original(credit, *rest)
        plain_before.append(not found.low)
        return found

    monkeypatch.setattr(Credit, "back", watched)
    found = swept(training, fixed(segment=4)).ledger
    assert plain_before[-1]
    assert_equal(found, slow(training, cuts=even_cuts(STEPS, 4)))


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 1e-3])
def test_what_is_left_out_keeps_to_the_tolerance(tolerance: float) -> None:
    draw = torch.Generator().manual_seed(0)
    size = torch.logspace(0, -6, 8)[None, :, None]
    terms = LowRank(size * torch.randn(5, 8, 6, generator=draw), torch.randn(5, 8, 30, generator=draw))
    short = terms.shortened(tolerance)
    off, whole = (short.matrices() - terms.matrices()).norm(dim=1), terms.matrices().norm(dim=1)
    assert short.rank < terms.rank
    assert (off <= tolerance * whole).all()
    assert (off > 1e-3 * tolerance * whole).any()


def test_a_low_rank_multiplies_rows_that_have_positions() -> None:
    """A layer may be applied at more places in an earlier step than in the last, by which the layout was chosen."""
    draw = torch.Generator().manual_seed(0)
    terms, rows = (
        LowRank(torch.randn(m, k, 6, generator=draw), torch.randn(m, k, 9, generator=draw)) for m, k in ((5, 8), (4, 3))
    )
    assert torch.allclose(terms.products(rows), terms.matrices() @ rows.matrices().T)

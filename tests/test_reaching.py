"""The audit's prediction of the adversarial distance: right on linear models, undefined ranks last, no label needed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from attack_cases import Counter, generator, linear_distance, linear_model, linear_problem
from scipy.stats import spearmanr
from torch import nn

from brittle.attacks.problem import Problem
from brittle.data import Examples
from brittle.pipeline import reaching
from brittle.pipeline.context import NORMS
from brittle.pipeline.reaching import REACH_PASSES, reach_score
from brittle.records import Norm, Pairs, Queries
from brittle.split import Unlabelled
from brittle.subject import Subject


def asked(problem: Problem, model: nn.Module | None = None) -> tuple[Subject, Queries]:
    """A linear problem as a subject, or another model at its inputs, and unlabelled queries of it."""
    inputs = problem.inputs.float()
    if model is None:
        weights = vars(linear_model(problem))
        model = nn.Linear(inputs.shape[1], len(weights["bias"]))
        model.load_state_dict(weights)
    data = Examples(inputs, problem.labels)
    subject = Subject(model.eval(), data, data, bounds=problem.bounds)
    logits = subject.predict(inputs)
    return subject, Unlabelled(torch.arange(len(inputs)), inputs, logits, Pairs.of(logits))


@pytest.mark.parametrize("norm", NORMS)
def test_where_two_classes_are_linear_and_bounds_do_not_matter_the_distance_is_told(norm: Norm) -> None:
    problem = replace(linear_problem(norm, False, classes=2), bounds=(-100.0, 100.0))
    score = reach_score(*asked(problem), norm, generator())
    torch.testing.assert_close(score, -linear_distance(problem).log(), rtol=0, atol=1e-4)
    assert torch.equal(score.argsort(), (-linear_distance(problem)).argsort())


@pytest.mark.parametrize("norm", NORMS)
def test_near_the_bounds_and_among_rivals_the_order_is_about_right(norm: Norm) -> None:
    problem = linear_problem(norm, True)
    found = spearmanr(reach_score(*asked(problem), norm, generator()), -linear_distance(problem))
    assert found.statistic > 0.9


def test_the_nearest_in_linf_is_no_farther_than_that_in_l2() -> None:
    subject, queries = asked(replace(linear_problem("l2", False), bounds=(-100.0, 100.0)))
    far = {norm: reach_score(subject, queries, norm, generator()) for norm in NORMS}
    assert (far["linf"] > far["l2"]).all()


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_slope_the_distance_is_undefined_and_ranks_last(norm: Norm) -> None:
    flat = nn.Linear(12, 5)
    nn.init.zeros_(flat.weight)
    score = reach_score(*asked(linear_problem(norm, False), flat), norm, generator())
    assert (score == -torch.inf).all()


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_not_finite_ranks_last(norm: Norm) -> None:
    problem = linear_problem(norm, False)
    subject, queries = asked(problem)
    whole = reach_score(subject, queries, norm, generator())
    queries.inputs[3] = torch.nan
    score = reach_score(subject, queries, norm, generator())
    assert score[3] == -torch.inf
    others = torch.arange(len(queries)) != 3
    torch.testing.assert_close(score[others], whole[others])


def test_each_query_takes_ten_passes_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, queries = asked(linear_problem("l2", False))
    whole = reach_score(subject, queries, "l2", generator())
    counter = Counter(partial(subject.model.forward))
    monkeypatch.setattr(subject.model, "forward", counter)
    monkeypatch.setattr(reaching, "BLOCK", 7)
    torch.testing.assert_close(reach_score(subject, queries, "l2", generator()), whole)
    assert counter.passes == (REACH_PASSES + 1) * len(queries)

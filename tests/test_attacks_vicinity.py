"""Descents by way of disturbed weights: how far these are, what they cost, and that they see past a flat place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attack_cases import Counter, blob_problem, blob_subject, generator, right_queries
from torch import Tensor, nn

from brittle.attacks import Problem, Vicinity, by_vicinity, reach
from brittle.records import Norm
from brittle.subject import Subject


@pytest.fixture(scope="module")
def subject() -> Subject:
    return blob_subject()


def test_weights_are_as_far_as_asked_and_the_models_own_stay(subject: Subject) -> None:
    own = {name: value.clone() for name, value in subject.model.named_parameters()}
    seen: list[dict[str, Tensor]] = []

    def logits(model: nn.Module, inputs: Tensor) -> Tensor:
        seen.append({name: value.clone() for name, value in model.named_parameters()})
        return subject.class_logits(model, inputs)

    inputs, vicinity = subject.test.inputs[:4], Vicinity(subject.model, logits)
    near, again, other, none = (vicinity.network(*at)(inputs) for at in ((0.3, 1), (0.3, 1), (0.3, 2), (0.0, 1)))
    assert torch.equal(near, again)
    assert not torch.equal(near, other)
    torch.testing.assert_close(none, subject.class_logits(subject.model, inputs))
    for name, value in subject.model.named_parameters():
        assert torch.equal(value, own[name])
        assert value.requires_grad
        if value.numel() > 200:
            far = (seen[0][name] - value).square().mean().sqrt() / value.square().mean().sqrt()
            assert 0.25 < far < 0.35, name


def test_every_pass_is_counted_those_through_other_weights_too(subject: Subject) -> None:
    problem = blob_problem(subject, right_queries(subject, 10), "l2")
    own, others = Counter(problem.logits), Counter(problem.logits)
    vicinity = Vicinity(subject.model, lambda _, inputs: others(inputs))
    rows = by_vicinity(replace(problem, logits=own), vicinity, generator=generator(), steps=100)
    assert (rows.evaluations * len(problem)).unique().tolist() == [own.passes + others.passes]
    assert others.passes == 3 * 10 * len(problem)  # at three scales, of eight parts
    assert 90 <= rows.evaluations.max() <= 100


def test_a_cap_ends_it_with_the_best_it_had(subject: Subject) -> None:
    problem = blob_problem(subject, right_queries(subject, 10), "linf")
    rows = by_vicinity(
        replace(problem, cap=50), Vicinity(subject.model, subject.class_logits), generator=generator(), steps=100
    )
    assert rows.evaluations.max() <= 50
    assert rows.success.all()


class Shelf(nn.Module):
    """Two classes with the boundary at a mean of 1 / 2, and no gradient below a mean of 0.4."""

    def __init__(self) -> None:
        super().__init__()
        self.edge = nn.Parameter(torch.full((64,), 0.4))
        self.lead = nn.Parameter(torch.full((64,), 0.1))

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, D) -> (B, 2)."""
        above = (inputs.mean(1, keepdim=True) - self.edge).clamp_min(0) - self.lead
        return torch.stack([torch.zeros(len(inputs)), above.mean(1)], 1)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_disturbed_weights_see_past_a_flat_place(norm: Norm) -> None:
    """Where the model's own gradient vanishes, the vicinity's does not, and a few passes know the way."""
    model, inputs = Shelf(), torch.full((6, 9), 0.35)
    problem = Problem(model, inputs, torch.zeros(6, dtype=torch.int64), norm, (0.0, 1.0))
    vicinity = Vicinity(model, lambda network, x: network(x))
    networks = [vicinity.network(0.3, seed) for seed in range(20)]
    truth = 0.15 * (3.0 if norm == "l2" else 1.0)
    led = reach(problem, 20, through=networks, generator=generator())
    assert ((led.radius / truth - 1).abs() < 0.2).all()
    assert (by_vicinity(problem, vicinity, generator=generator(), steps=60).distance < truth * 1.05).all()

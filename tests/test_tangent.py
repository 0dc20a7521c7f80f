"""The tangent kernel of the final weights, by plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import reference
import torch
from cases import CASES, COUNT, Case, Training, plain_pairs, queries, train, two_per_class
from cases import float64 as float64
from torch import Tensor, nn

from brittle.errors import UnsupportedError
from brittle.kernel.memory import mass
from brittle.kernel.tangent import tangent_contributions, tangent_features, tangent_memory
from brittle.mass import by_group
from brittle.records import Pairs
from brittle.subject import Subject


def parameters_gradient(training: Training, x: Tensor, pair: tuple[int, int]) -> Tensor:
    size = sum(p.numel() for p in training.seen.model.parameters())
    return reference.jacobian(training.seen, training.seen.final, x, pair)[:size]


def loss_gradient(training: Training, i: int) -> Tensor:
    """Of one example's own loss, the model being evaluated."""
    seen, rows = training.seen, slice(i, i + 1)
    at = reference.trained_part(seen, seen.final)
    found = reference.gradient(
        lambda w: seen.loss(reference.logits(seen.model, seen.final | w, seen.inputs[rows]), seen.targets[rows]), at
    )
    return torch.cat([g.reshape(-1) for g in found.values()])


@pytest.mark.parametrize(
    "case", ["linear", "tanh", "relu", "binary", "cnn", "batch norm", "cnn batch norm", "attention"]
)
def test_contributions_are_minus_the_kernel_with_each_examples_loss(case: str, tmp_path: Path) -> None:
    training = train(case, "momentum", tmp_path)
    inputs, pairs = queries(training.subject)
    found = tangent_contributions(training.subject, inputs, pairs)
    for m, pair in enumerate(plain_pairs(pairs)):
        j = parameters_gradient(training, inputs[m], pair)
        expected = torch.stack([-(j @ loss_gradient(training, i)) / COUNT for i in range(COUNT)])
        assert torch.allclose(found[m], expected, atol=1e-10)
    assert found.abs().max() > 1e-3


@pytest.mark.parametrize("case", ["tanh", "cnn batch norm"])
def test_the_memory_of_one_step_holds_the_same_by_group(case: str, tmp_path: Path) -> None:
    training = train(case, "momentum", tmp_path)
    inputs, pairs = queries(training.subject)
    groups = two_per_class(training.subject)
    memory = tangent_memory(training.subject, groups)
    expected = by_group(tangent_contributions(training.subject, inputs, pairs), groups)
    found = mass(memory, training.subject, inputs, pairs)
    assert torch.allclose(found[:, :-1], expected, atol=1e-10)
    assert (found[:, -1] == 0).all(), "there is no decay"
    assert torch.equal(memory.ends[0], memory.ends[1])
    merged = memory.merged(4).by_class(groups, training.subject.classes)
    assert torch.allclose(mass(merged, training.subject, inputs, pairs)[:, :-1].sum(1), found.sum(1), atol=1e-10)


def test_a_small_step_of_gradient_descent_moves_the_output_so(tmp_path: Path) -> None:
    training = train("tanh", "momentum", tmp_path)
    inputs, pairs = queries(training.subject)
    model, rate = training.subject.model, 1e-5
    before = pairs.margin(model(inputs)).detach()
    model.zero_grad()
    training.seen.loss(model(training.seen.inputs), training.seen.targets).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= rate * parameter.grad
    moved = (pairs.margin(model(inputs)) - before) / rate
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += rate * parameter.grad
    assert torch.allclose(tangent_contributions(training.subject, inputs, pairs).sum(1), moved, rtol=1e-3)


def test_blocks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, told = train("cnn batch norm", "momentum", tmp_path), []
    inputs, pairs = queries(training.subject)
    whole = tangent_contributions(training.subject, inputs, pairs)
    monkeypatch.setattr("brittle.kernel.matrix.BLOCK", 4)
    found = tangent_contributions(training.subject, inputs, pairs, progress=lambda done, of: told.append((done, of)))
    assert torch.allclose(found, whole, atol=1e-12)
    assert told == [(4, 10), (8, 10), (10, 10)]


def test_features_estimate_the_kernel_between_margins() -> None:
    """The mean over projections is the kernel, and the spread of one is about its size / sqrt(dimensions)."""
    subject = random_subject(CASES["tanh"])
    pairs = Pairs.of(subject.predict(subject.test.inputs))
    seen = reference.Seen(
        subject.model, "SGD", [], dict(subject.model.state_dict()), subject.test.inputs, pairs.predicted, torch.dist
    )
    jacobian = torch.stack(
        [
            reference.jacobian(seen, seen.final, x, pair)
            for x, pair in zip(subject.test.inputs, plain_pairs(pairs), strict=True)
        ]
    )
    kernel, dimensions, draws = jacobian @ jacobian.T, 16, 200
    features = [
        tangent_features(subject, subject.test, dimensions, torch.Generator().manual_seed(seed))
        for seed in range(draws)
    ]
    estimates = torch.stack([f @ f.T for f in features])
    scale = torch.outer(kernel.diagonal(), kernel.diagonal()).sqrt()
    assert (((estimates.mean(0) - kernel) / scale).abs() < 5 * (2 / dimensions / draws) ** 0.5).all()
    spread = ((estimates - kernel) / scale).square().mean().sqrt()
    assert 0.7 < spread * dimensions**0.5 < 2


def test_features_have_no_more_dimensions_than_the_weights() -> None:
    subject = random_subject(CASES["linear"])
    found = tangent_features(subject, subject.test, 1000, torch.Generator().manual_seed(0))
    assert found.shape == (4, 15)


def random_subject(case: Case) -> Subject:
    """An untrained model with a few data."""
    return Subject(case.model().eval(), case.data(COUNT, seed=1), case.data(4, seed=2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x).tanh() @ self.inner.weight)[:, :3]


@pytest.mark.parametrize(
    "statement",
    [
        lambda s: tangent_contributions(s, s.test.inputs, Pairs.of(s.predict(s.test.inputs))),
        lambda s: tangent_memory(s, two_per_class(s)),
        lambda s: tangent_features(s, s.test, 8, torch.Generator().manual_seed(0)),
    ],
)
def test_a_model_that_cannot_be_taken_apart_is_refused(statement: Callable[[Subject], object]) -> None:
    with pytest.raises(UnsupportedError, match=r"inner\.weight do not add up"):
        statement(random_subject(Case("tied", Tied)))

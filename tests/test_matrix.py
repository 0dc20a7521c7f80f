"""The kernel between queries and training examples at several checkpoints, by plain autograd."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, COUNT, QUERIES, Case, binary_loss
from cases import float64 as float64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from brittle.errors import UnsupportedError
from brittle.kernel import matrix
from brittle.kernel.matrix import kernel_matrix
from brittle.path.flat import state_of
from brittle.records import Pairs
from brittle.subject import Subject

RATES = torch.tensor([0.3, 0.1])


def subject_of(case: str) -> Subject:
    of = CASES[case]
    return Subject(of.model().eval(), of.data(COUNT, seed=1), of.data(4, seed=2))


def states_of(subject: Subject) -> Tensor:
    """Two checkpoints, (2, P)."""
    state = state_of(subject.model)
    return torch.stack([state + 0.2 * torch.rand(len(state)), state])


def gradients(subject: Subject, state: Tensor, values: Tensor | None, inputs: Tensor, pairs: Pairs | None) -> Tensor:
    """Of each input's loss, or of its margin, one at a time: (rows, parameters)."""
    model, found = subject.model, []
    torch.nn.utils.vector_to_parameters(state[: sum(p.numel() for p in model.parameters())], model.parameters())
    buffers = state[sum(p.numel() for p in model.parameters()) :]
    for buffer in (b for b in model.buffers() if b.is_floating_point()):
        buffer.copy_(buffers[: buffer.numel()].view_as(buffer))
        buffers = buffers[buffer.numel() :]
    for i in range(len(inputs)):
        logits = subject.run(model, inputs[i : i + 1])
        if pairs is not None:
            scalar = pairs[i : i + 1].margin(subject.class_logits(model, inputs[i : i + 1])).sum()
        else:
            assert values is not None
            scalar = (binary_loss if subject.binary else cross_entropy)(logits, values[i : i + 1])
        own = torch.autograd.grad(scalar, list(model.parameters()), allow_unused=True, materialize_grads=True)
        found.append(torch.cat([g.reshape(-1) for g in own]))
    return torch.stack(found)


@pytest.mark.parametrize("by", ["margins", "losses"])
@pytest.mark.parametrize("case", ["tanh", "binary", "cnn", "cnn batch norm", "tokens", "attention", "twice"])
def test_it_is_the_sum_over_checkpoints_of_inner_products(case: str, by: str) -> None:
    subject = subject_of(case)
    states, inputs, train = states_of(subject), subject.test.inputs[:QUERIES], subject.train
    pairs = Pairs.of(subject.predict(inputs)) if by == "margins" else None
    targets = None if pairs else subject.test.targets[:QUERIES]
    found = kernel_matrix(subject, states, RATES, inputs, subject.test.targets[:QUERIES] if pairs is None else pairs)
    expected = torch.zeros(QUERIES, COUNT)
    for state, rate in zip(states, RATES, strict=True):
        queries = gradients(subject, state, targets, inputs, pairs)
        examples = gradients(subject, state, train.targets, train.inputs, None)
        expected += rate * queries @ examples.T
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)
    assert expected.abs().max() > 1e-3


def test_blocks_and_the_order_of_examples_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, told = subject_of("cnn"), []
    states, inputs, targets = states_of(subject), subject.test.inputs, subject.test.targets
    whole = kernel_matrix(subject, states, RATES, inputs, targets)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    permuted = Subject(subject.model, (subject.train.inputs[order], subject.train.targets[order]), subject.test)
    assert torch.allclose(kernel_matrix(permuted, states, RATES, inputs, targets), whole[:, order], atol=1e-12)
    monkeypatch.setattr(matrix, "BLOCK", 4)
    monkeypatch.setattr(matrix, "QUERIES", 3)
    found = kernel_matrix(subject, states, RATES, inputs, targets, progress=lambda *at: told.append(at))
    assert torch.allclose(found, whole, atol=1e-12)
    assert told == [(done, 2 * COUNT) for done in (4, 8, 10, 14, 18, 20)]


def test_queries_among_the_examples_have_a_symmetric_and_positive_kernel() -> None:
    subject = subject_of("cnn")
    found = kernel_matrix(subject, states_of(subject), RATES, subject.train.inputs, subject.train.targets)
    assert torch.allclose(found, found.T, atol=1e-12)
    assert torch.linalg.eigvalsh(found).min() > -1e-10


def test_the_subject_is_left_as_it_was() -> None:
    subject = subject_of("cnn batch norm")
    before, states = state_of(subject.model), states_of(subject)
    kernel_matrix(subject, states, RATES, subject.test.inputs, subject.test.targets)
    assert torch.equal(state_of(subject.model), before)


def test_a_model_that_cannot_be_taken_apart_is_refused() -> None:
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return (self.inner(x).tanh() @ self.inner.weight)[:, :3]

    case = Case("outside", Outside)
    subject = Subject(case.model().eval(), case.data(COUNT, seed=1), case.data(4, seed=2))
    with pytest.raises(UnsupportedError, match=r"inner\.weight do not add up"):
        kernel_matrix(subject, states_of(subject), RATES, subject.test.inputs, subject.test.targets)

"""The kernel machine: its kernel by plain autograd, its regression by solving the normal equations."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, COUNT
from cases import float64 as float64
from torch import Tensor

from brittle.kernel.machine import Axes, Machine, principal
from brittle.path.flat import state_of
from brittle.subject import Subject


def subject_of(case: str) -> Subject:
    of = CASES[case]
    return Subject(of.model().eval(), of.data(COUNT, seed=1), of.data(4, seed=2))


def gradients(subject: Subject, state: Tensor, direction: Tensor, inputs: Tensor) -> list[Tensor]:
    """Of direction . logits in each weight of at least two dimensions, one input at a time: (R, *) each."""
    model, weights = subject.model, [p for p in subject.model.parameters() if p.dim() > 1]
    torch.nn.utils.vector_to_parameters(state, model.parameters())
    rows = []
    for x in inputs:
        value = (subject.class_logits(model, x[None]) @ direction).sum()
        rows.append([g.reshape(-1) for g in torch.autograd.grad(value, weights)])
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("case", ["linear", "tanh", "cnn", "binary", "residual", "tokens"])
def test_the_kernel_weighs_every_weight_and_state_alike(case: str) -> None:
    subject = subject_of(case)
    state = state_of(subject.model)
    states = [state, state + 0.2 * torch.rand(len(state))]
    machine = Machine(subject, states, torch.Generator().manual_seed(3), landmarks=6)
    found = machine.kernel(subject.test.inputs)
    direction = torch.randn(subject.classes, generator=torch.Generator().manual_seed(3))
    expected = torch.zeros(4, 6)
    for s in states:
        own = gradients(subject, s, direction, subject.test.inputs)
        of_landmarks = gradients(subject, s, direction, subject.train.inputs[machine.landmarks])
        for left, right in zip(own, of_landmarks, strict=True):
            if right.norm() > 0:
                expected += left @ right.T / right.pow(2).sum(1).mean() / len(states)
    assert torch.allclose(found, expected, atol=1e-10)


def drawn(count: int, dimensions: int) -> tuple[Tensor, Tensor]:
    """A kernel of `count` examples with all of them as landmarks, and the features behind it."""
    features = torch.randn(count, dimensions, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features *= 1 / torch.arange(1.0, dimensions + 1)
    return features @ features.T, features


def test_the_regression_is_ridge_on_the_features_behind_the_kernel() -> None:
    kernel, features = drawn(40, 5)
    targets = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
    axes, floor = principal(kernel, torch.arange(40)), 0.05
    places = axes.places(kernel)
    centred, pulled = features - features.mean(0), targets - targets.mean(0)
    spread = centred.T @ centred / 40
    ridge = spread + floor * spread.trace() * torch.eye(5)
    expected = centred @ torch.linalg.solve(ridge, centred.T @ pulled / 40)
    assert torch.allclose(places @ axes.regression(places, targets, floor), expected, atol=1e-8)
    leverage = (centred @ torch.linalg.inv(ridge) * centred).sum(1)
    assert torch.allclose(axes.novelty(places, floor), leverage, atol=1e-8)


def test_places_are_centred_uncorrelated_and_fall_off_as_the_spectrum_says() -> None:
    kernel, features = drawn(40, 5)
    axes: Axes = principal(kernel, torch.arange(40))
    places = axes.places(kernel)
    assert places.shape == (40, 5), "no direction of rounding is kept"
    assert torch.allclose(places.mean(0), torch.zeros(5), atol=1e-8)
    assert torch.allclose(places.T @ places / 40, axes.spectrum.diag(), atol=1e-8)
    centred = features - features.mean(0)
    assert torch.allclose(axes.spectrum, torch.linalg.svdvals(centred).pow(2) / 40, atol=1e-8)


def test_half_of_the_examples_as_landmarks_span_what_has_few_dimensions() -> None:
    kernel, _ = drawn(40, 5)
    rows = torch.arange(0, 40, 2)
    whole, part = principal(kernel, torch.arange(40)), principal(kernel[:, rows], rows)
    assert torch.allclose(part.spectrum, whole.spectrum, atol=1e-8)
    all_places, few = whole.places(kernel), part.places(kernel[:, rows])
    assert torch.allclose(few @ few.T, all_places @ all_places.T, atol=1e-7)

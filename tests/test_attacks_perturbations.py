"""Failure severities against closed forms, and the two families that are added here."""

from __future__ import annotations

import pytest
import torch
from attack_cases import generator
from torch import Tensor, nn

from brittle.attacks.perturbations import HALVINGS, LEVELS, failure_severities, failure_severity, perturbations
from brittle.data import Examples
from brittle.errors import DataError
from brittle.probes import Family
from brittle.records import Pairs, Queries
from brittle.subject import Subject


class Brightness(nn.Module):
    """Bright where the mean is above a half."""

    def __init__(self) -> None:
        super().__init__()
        self.steepness = nn.Parameter(torch.tensor(10.0))

    def forward(self, inputs: Tensor) -> Tensor:
        mean = inputs.flatten(1).mean(1)
        return torch.stack([0.5 - mean, mean - 0.5], dim=1) * self.steepness


def images(count: int = 12) -> Examples:
    levels = torch.linspace(0.2, 0.45, count)
    inputs = levels[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    return Examples(inputs, torch.zeros(count, dtype=torch.int64))


def queries_of(subject: Subject, targets: Tensor) -> Queries:
    inputs = subject.test.inputs
    logits = subject.predict(inputs)
    return Queries(torch.arange(len(inputs)), inputs, targets, logits, Pairs.of(logits))


@pytest.fixture
def subject() -> Subject:
    data = images()
    both = Examples(torch.cat([data.inputs, 1 - data.inputs]), torch.cat([data.targets, 1 - data.targets]))
    return Subject(Brightness().eval(), both, data)


def test_the_severity_of_brightness_is_the_distance_to_a_half(subject: Subject) -> None:
    queries = queries_of(subject, subject.test.targets)
    family = next(f for f in perturbations((1, 8, 8), (0.0, 1.0)) if f.name == "brightness")
    up = torch.ones(len(queries))
    found = failure_severity(subject, queries, family, up)
    exact = (0.5 - queries.inputs.flatten(1).mean(1)).double()
    step = found.most / LEVELS / 2**HALVINGS
    assert ((found.severity - exact).abs() <= step + 1e-6).all()
    assert (found.holds <= exact + 1e-6).all()
    assert (found.new_class == 1).all()
    assert (found.evaluations <= LEVELS + HALVINGS).all()
    down = failure_severity(subject, queries, family, -up)
    assert down.severity.isinf().all()
    assert torch.equal(down.new_class, queries.targets)
    assert down.evaluations.tolist() == [LEVELS] * len(queries)


def test_the_first_failing_severity_counts_where_a_later_one_holds(subject: Subject) -> None:
    """A family that fails between 0.3 and 0.6 and holds again after that."""

    def apply(inputs: Tensor, severity: Tensor, _: Tensor) -> Tensor:
        fails = (severity >= 0.3) & (severity <= 0.6)
        return torch.where(fails[:, None, None, None], 0.9, inputs)

    family = Family("window", "units", 0.5, lambda inputs, g: torch.zeros(len(inputs)), apply)
    found = failure_severity(subject, queries_of(subject, subject.test.targets), family, torch.zeros(12))
    torch.testing.assert_close(found.severity, torch.full((12,), 0.3, dtype=torch.float64), atol=1 / 8 / 2**8, rtol=0)


def test_an_input_that_is_wrong_when_clean_fails_at_zero_and_costs_nothing(subject: Subject) -> None:
    targets = subject.test.targets.clone()
    targets[3] = 1
    for found in failure_severities(
        subject, queries_of(subject, targets), perturbations((1, 8, 8), (0.0, 1.0)), generator=generator()
    ):
        assert found.severity[3] == 0
        assert found.evaluations[3] == 0
        assert (found.severity[targets == 0] > 0).all()


def test_all_nine_families_are_there_and_leave_an_input_alone_at_zero() -> None:
    families = {f.name: f for f in perturbations((3, 12, 10), (-1.0, 2.0))}
    assert set(families) == {
        "rotation", "translation", "scale", "brightness", "contrast", "blur", "noise", "JPEG", "occlusion",
    }  # fmt: skip
    inputs = torch.rand(5, 3, 12, 10, generator=generator()) * 3 - 1
    for family in families.values():
        draws = family.draw(inputs, generator())
        assert torch.equal(family.apply(inputs, torch.zeros(5), draws), inputs), family.name
        changed = family.apply(inputs, torch.full((5,), family.reference), draws)
        assert changed.shape == inputs.shape
        assert (changed >= -1).all()
        assert (changed <= 2).all()
        assert (changed - inputs).abs().amax() > 0.01, family.name
    with pytest.raises(DataError, match="image probes need"):
        perturbations((7,), (0.0, 1.0))


def test_a_scaled_square_is_as_large_as_it_should_be() -> None:
    image = torch.zeros(2, 1, 40, 40)
    image[:, :, 10:30, 10:30] = 1
    family = next(f for f in perturbations((1, 40, 40), (0.0, 1.0)) if f.name == "scale")
    larger, smaller = family.apply(image, torch.tensor([0.25, 0.5]), torch.tensor([1.0, -1.0]))[:, 0]
    assert larger.sum().item() == pytest.approx(25**2, rel=0.02)
    assert smaller.sum().item() == pytest.approx(10**2, rel=0.02)
    assert larger[20, 20] == 1
    assert larger[5, 5] == 0


def test_jpeg_loses_more_the_lower_its_quality_and_is_faithful_at_the_top() -> None:
    g = generator()
    smooth = nn.functional.interpolate(torch.rand(4, 3, 4, 4, generator=g), size=(32, 32), mode="bilinear")
    for channels in (1, 2, 3):
        image = smooth[:, :channels] * 2 - 1
        family = next(f for f in perturbations((channels, 32, 32), (-1.0, 1.0)) if f.name == "JPEG")
        lost = [
            (family.apply(image, torch.full((4,), s), torch.zeros(4)) - image).flatten(1).norm(dim=1)
            for s in (1.0, 50.0, 95.0)
        ]
        assert (lost[0] < lost[1]).all()
        assert (lost[1] < lost[2]).all()
        assert (lost[0] / image.flatten(1).norm(dim=1) < 0.1).all()  # colours are kept at half the resolution

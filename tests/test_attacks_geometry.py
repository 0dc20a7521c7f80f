"""Projections, directions and losses of the attacks, against slow references and their laws."""

from __future__ import annotations

import pytest
import torch
from attack_cases import generator
from torch import Tensor

from brittle.attacks.geometry import distance, dual_size, into_ball, onto_sphere, size, steepest
from brittle.attacks.losses import cross_entropy, dlr, margin, soft_margin
from brittle.records import Norm

BOUNDS = (-0.5, 1.0)
NORMS: tuple[Norm, ...] = ("l2", "linf")


def points_and_centres(count: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    g = generator()
    centres = torch.rand(count, 2, 3, generator=g, dtype=torch.float64) * 1.5 - 0.5
    centres[::3] = torch.where(centres[::3] > 0, *BOUNDS[::-1]).double()
    points = centres + 2 * torch.randn(count, 2, 3, generator=g, dtype=torch.float64)
    return points, centres, torch.linspace(0.01, 3.0, count, dtype=torch.float64)


def slow_projection(point: Tensor, centre: Tensor, radius: float) -> Tensor:
    """Dykstra's alternating projections on the ball and the box."""
    x, p, q = point, torch.zeros_like(point), torch.zeros_like(point)
    for _ in range(3_000):
        offset = x + p - centre
        y = centre + offset * min(1.0, radius / offset.norm().item())
        p = x + p - y
        x, q = (y + q).clamp(*BOUNDS), y + q - (y + q).clamp(*BOUNDS)
    return x


def test_l2_projection_equals_alternating_projections() -> None:
    points, centres, radius = (v[::5] for v in points_and_centres())
    fast = into_ball(points, centres, radius, BOUNDS, "l2")
    for b in range(len(points)):
        slow = slow_projection(points[b], centres[b], radius[b].item())
        torch.testing.assert_close(fast[b], slow, rtol=0, atol=2e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_projections_stay_in_ball_and_bounds(norm: Norm) -> None:
    points, centres, radius = points_and_centres()
    near = into_ball(points, centres, radius, BOUNDS, norm)
    assert (near >= BOUNDS[0]).all()
    assert (near <= BOUNDS[1]).all()
    assert (size(near - centres, norm) <= radius * (1 + 1e-6)).all()
    again = into_ball(near, centres, radius, BOUNDS, norm)
    torch.testing.assert_close(again, near, rtol=0, atol=1e-4)


def test_sphere_is_reached_wherever_the_bounds_allow() -> None:
    points, centres, radius = points_and_centres()
    onto = onto_sphere(points, centres, radius, BOUNDS)
    far = size(onto - centres, "l2")
    corner = torch.where(points > centres, BOUNDS[1], BOUNDS[0])  # the farthest that this direction leads
    torch.testing.assert_close(far, torch.minimum(radius, size(corner - centres, "l2")), rtol=1e-3, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_direction_gains_its_dual_norm(norm: Norm) -> None:
    gradient = torch.randn(10, 4, 3, generator=generator(), dtype=torch.float64) * 10.0 ** torch.arange(
        -200, 0, 20
    ).reshape(-1, 1, 1)
    way = steepest(gradient, norm)
    torch.testing.assert_close(size(way, norm), torch.ones(10, dtype=torch.float64))
    gain = (way * gradient).flatten(1).sum(1)
    kept = slice(3, None)  # below 1e-150 the dual norm itself underflows
    torch.testing.assert_close(gain[kept], dual_size(gradient, norm)[kept])


@pytest.mark.parametrize("norm", NORMS)
def test_lost_gradients_become_seeded_random_directions(norm: Norm) -> None:
    gradient = torch.ones(4, 5)
    gradient[1], gradient[2, 0], gradient[3, 4] = 0.0, torch.nan, torch.inf
    way, again = (steepest(gradient, norm, generator(3)) for _ in range(2))
    assert torch.equal(way, again)
    torch.testing.assert_close(size(way, norm), torch.ones(4))
    torch.testing.assert_close(way[0], steepest(gradient[:1], norm)[0])


def test_distance_is_computed_in_float64() -> None:
    inputs = torch.full((1, 10_000), 0.1)
    others = inputs + torch.tensor(1e-4)
    exact = (others.double() - inputs.double()).square().sum().sqrt()
    assert distance(inputs, others, "l2").dtype == torch.float64
    assert distance(inputs, others, "l2").item() == pytest.approx(exact.item(), rel=1e-12)


def logits_and_labels(classes: int) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randn(40, classes, generator=generator(), dtype=torch.float64) * 3
    labels = torch.arange(40) % classes
    return logits, labels, (labels + 1) % classes


@pytest.mark.parametrize("classes", [3, 4, 10])
@pytest.mark.parametrize("targeted", [False, True])
def test_dlr_is_unmoved_by_shift_and_scale(classes: int, targeted: bool) -> None:
    logits, labels, targets = logits_and_labels(classes)
    goal = targets if targeted else None
    torch.testing.assert_close(dlr(5 * logits - 7, labels, goal), dlr(logits, labels, goal))


def test_dlr_of_a_row_by_hand() -> None:
    logits = torch.tensor([[4.0, 1.0, 3.0, 0.5]])
    one = torch.tensor([0])
    assert dlr(logits, one).item() == pytest.approx(-(4 - 3) / (4 - 1))
    assert dlr(logits, one, torch.tensor([1])).item() == pytest.approx(-(4 - 1) / (4 - (1 + 0.5) / 2))
    assert dlr(logits[:, :3], one, torch.tensor([1])).item() == pytest.approx(-(4 - 1) / (4 - 1))
    assert dlr(logits[:, :2], one).item() == pytest.approx(-3.0)
    assert dlr(logits[:, :2], one, torch.tensor([1])).item() == pytest.approx(-3.0)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_margin_is_negative_exactly_where_the_class_is_wrong(classes: int) -> None:
    logits, labels, targets = logits_and_labels(classes)
    assert torch.equal(margin(logits, labels) < 0, logits.argmax(1) != labels)
    assert torch.equal(margin(logits, labels, targets) < 0, logits.argmax(1) == targets)


@pytest.mark.parametrize("targeted", [False, True])
def test_soft_margin_tends_to_the_margin_from_the_unsafe_side(targeted: bool) -> None:
    logits, labels, targets = logits_and_labels(6)
    goal = targets if targeted else None
    cold, warm = (soft_margin(logits, labels, goal, torch.full((40,), t).double()) for t in (1e-3, 1.0))
    torch.testing.assert_close(cold, -margin(logits, labels, goal), atol=5e-3, rtol=0)
    assert ((warm > cold) != targeted).all()


@pytest.mark.parametrize("targeted", [False, True])
def test_soft_margin_climbs_the_same_way_as_cross_entropy(targeted: bool) -> None:
    logits, labels, targets = logits_and_labels(6)
    goal = targets if targeted else None
    logits.requires_grad_()
    soft = torch.autograd.grad(soft_margin(logits, labels, goal, torch.ones(40).double()).sum(), logits)[0]
    entropy = torch.autograd.grad(cross_entropy(logits, labels, goal).sum(), logits)[0]
    torch.testing.assert_close(steepest(soft, "l2"), steepest(entropy, "l2"))

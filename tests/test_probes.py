"""Laws of every probe family, and the closed form of each."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from scipy.special import ive
from torch import Tensor, nn

from brittle.data import Examples
from brittle.errors import DataError, NotFiniteError
from brittle.probes import (
    MAP_SHARES,
    Family,
    class_distance,
    direction_families,
    families_for,
    image_families,
    margin_gradient,
)
from brittle.probes.images import blur, occlusion, rotation, translation
from brittle.records import Pairs
from brittle.subject import Subject

SHAPES = [(8, 8), (3, 9, 14), (1, 28, 28)]
BOUNDS = [(0.0, 1.0), (-2.0, 3.0)]
NAMES = ["brightness", "contrast", "noise", "blur", "rotation", "translation", "occlusion"]
DIRECTIONS = ["random direction", "margin gradient"]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(m: int, shape: tuple[int, ...], bounds: tuple[float, float] = (0.0, 1.0), seed: int = 0) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(m, *shape, generator=seeded(seed))


def linear_subject(
    shape: tuple[int, ...] = (6,), classes: int = 3, bounds: tuple[float, float] = (0.0, 1.0), n: int = 60
) -> Subject:
    """A linear classifier that labels its own data."""
    torch.manual_seed(1)
    inputs = uniform(2 * n, shape, bounds, seed=2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes)).eval()
    with torch.no_grad():
        model[1].bias.copy_(-model[1].weight @ inputs.flatten(1).mean(0))  # so that every class is predicted
        targets = model(inputs).argmax(1)
    return Subject(model, Examples(inputs[:n], targets[:n]), Examples(inputs[n:], targets[n:]), bounds=bounds)


def family(name: str, shape: tuple[int, ...] = (1, 8, 8), bounds: tuple[float, float] = (0.0, 1.0)) -> Family:
    return next(f for f in families_for(linear_subject(shape, bounds=bounds), seeded()) if f.name == name)


def probes_of(f: Family, inputs: Tensor, share: float, draws: Tensor) -> Tensor:
    return f.apply(inputs, torch.full((len(inputs),), share * f.reference), draws)


@pytest.mark.parametrize("name", NAMES + DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bounds", BOUNDS)
class TestEveryFamily:
    def test_severity_zero_is_the_input(self, name: str, shape: tuple[int, ...], bounds: tuple[float, float]) -> None:
        f, inputs = family(name, shape, bounds), uniform(5, shape, bounds)
        assert torch.equal(probes_of(f, inputs, 0, f.draw(inputs, seeded())), inputs)

    def test_probes_lie_inside_the_bounds(self, name: str, shape: tuple[int, ...], bounds: tuple[float, float]) -> None:
        f, inputs = family(name, shape, bounds), uniform(5, shape, bounds)
        for share in (0.1, 1, 3):
            probes = probes_of(f, inputs, share, f.draw(inputs, seeded()))
            assert probes.shape == inputs.shape
            assert probes.min() >= bounds[0]
            assert probes.max() <= bounds[1]
            assert not torch.equal(probes, inputs)

    def test_one_draw_traces_a_continuous_curve(
        self, name: str, shape: tuple[int, ...], bounds: tuple[float, float]
    ) -> None:
        """Four times as many steps along the severity make the largest step about a quarter as long."""
        f, inputs = family(name, shape, bounds), uniform(4, shape, bounds)
        draws = f.draw(inputs, seeded())

        def largest_step(steps: int) -> float:
            curve = torch.stack([probes_of(f, inputs, k / steps, draws) for k in range(steps + 1)])
            return curve.diff(dim=0).abs().max().item()

        assert largest_step(256) < 0.35 * largest_step(64)

    def test_a_query_does_not_depend_on_its_neighbours(
        self, name: str, shape: tuple[int, ...], bounds: tuple[float, float]
    ) -> None:
        f, inputs = family(name, shape, bounds), uniform(5, shape, bounds)
        draws, severity = f.draw(inputs, seeded()), torch.linspace(0.2, 1, 5) * f.reference
        assert len(draws) == len(inputs)
        alone = [f.apply(inputs[i : i + 1], severity[i : i + 1], draws[i : i + 1]) for i in range(5)]
        torch.testing.assert_close(torch.cat(alone), f.apply(inputs, severity, draws))


@pytest.mark.parametrize("name", NAMES + DIRECTIONS)
def test_the_same_seed_draws_the_same(name: str) -> None:
    f, inputs = family(name), uniform(20, (1, 8, 8))
    assert torch.equal(f.draw(inputs, seeded(3)), f.draw(inputs, seeded(3)))
    if name not in ("contrast", "blur", "margin gradient"):
        assert not torch.equal(f.draw(inputs, seeded(3)), f.draw(inputs, seeded(4)))


@pytest.mark.parametrize("name", NAMES + DIRECTIONS)
def test_float32_inputs_give_float32_probes(name: str) -> None:
    f, inputs = family(name), uniform(3, (1, 8, 8))
    torch.set_default_dtype(torch.float32)
    draws = f.draw(inputs, seeded())
    assert f.apply(inputs.float(), torch.full((3,), f.reference), draws).dtype == torch.float32


def test_bounds_only_change_the_units() -> None:
    """A family on inputs in [-2, 3] is the family on the same images in [0, 1], scaled."""
    inputs = uniform(4, (1, 8, 8))
    for name in NAMES:
        f, scaled = family(name), family(name, bounds=(-2.0, 3.0))
        draws = f.draw(inputs, seeded())
        torch.testing.assert_close(probes_of(scaled, 5 * inputs - 2, 1, draws), 5 * probes_of(f, inputs, 1, draws) - 2)


def test_bounds_may_differ_by_channel() -> None:
    """Each channel is scaled by its own; severities are in the units of [0, 1]."""
    low, high = torch.tensor([0.0, -2.0, 1.0])[:, None, None], torch.tensor([1.0, 3.0, 1.5])[:, None, None]
    inputs = uniform(4, (3, 8, 8))
    both = zip(image_families((3, 8, 8), (0.0, 1.0)), image_families((3, 8, 8), (low, high)), strict=True)
    for f, scaled in both:
        draws = f.draw(inputs, seeded())
        expected = low + (high - low) * probes_of(f, inputs, 1, draws)
        torch.testing.assert_close(probes_of(scaled, low + (high - low) * inputs, 1, draws), expected)


def test_families_fit_the_input() -> None:
    assert [f.name for f in families_for(linear_subject((1, 8, 8)), seeded())] == NAMES + DIRECTIONS
    for shape in ((6,), (1, 8, 7), (28, 28, 1), (2, 3, 8, 8)):
        assert [f.name for f in families_for(linear_subject(shape), seeded())] == DIRECTIONS
    assert max(MAP_SHARES) <= 1 / 4
    with pytest.raises(DataError, match="sides of at least 8, found \\(1, 8, 7\\)"):
        image_families((1, 8, 7), (0.0, 1.0))


class TestClosedForms:
    def test_brightness(self) -> None:
        f, inputs = family("brightness"), 0.4 + 0.2 * uniform(2, (1, 8, 8))
        probes = f.apply(inputs, torch.full((2,), 0.1), torch.tensor([1.0, -1.0]))
        torch.testing.assert_close(probes, inputs + torch.tensor([0.1, -0.1]).reshape(2, 1, 1, 1))

    def test_contrast_ends_at_the_mean(self) -> None:
        f, inputs = family("contrast"), uniform(2, (1, 8, 8))
        mean = inputs.mean((1, 2, 3), keepdim=True)
        draws = f.draw(inputs, seeded())
        torch.testing.assert_close(f.apply(inputs, torch.full((2,), 0.5), draws), (inputs + mean) / 2)
        torch.testing.assert_close(f.apply(inputs, torch.full((2,), 1.7), draws), mean.expand_as(inputs))

    def test_noise_has_the_severity_as_its_deviation(self) -> None:
        f, inputs = family("noise", (1, 28, 28)), torch.full((50, 1, 28, 28), 0.5)
        noise = f.apply(inputs, torch.full((50,), 0.05), f.draw(inputs, seeded())) - inputs
        assert noise.std().item() == pytest.approx(0.05, rel=0.02)  # 39,200 values: standard error .4 %
        assert abs(noise.mean().item()) < 4 * 0.05 / math.sqrt(noise.numel())

    @pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0, 2.0])
    def test_blur_is_the_discrete_gaussian_away_from_the_edges(self, sigma: float) -> None:
        image = torch.zeros(1, 1, 41, 41)
        image[0, 0, 20, 20] = 1
        kernel = torch.tensor(ive(abs(torch.arange(41) - 20).numpy(), sigma**2))
        s = torch.full((1, 1, 1, 1), sigma)
        torch.testing.assert_close(blur(image, s, image)[0, 0], torch.outer(kernel, kernel))

    def test_blur_keeps_the_mean_and_adds_variances(self) -> None:
        images = uniform(3, (2, 8, 11))
        at = lambda s: torch.full((3, 1, 1, 1), s)  # noqa: E731
        twice = blur(blur(images, at(0.6), images), at(0.8), images)
        torch.testing.assert_close(twice, blur(images, at(1.0), images))
        torch.testing.assert_close(twice.mean((2, 3)), images.mean((2, 3)))

    def test_rotation_by_right_angles_moves_pixels(self) -> None:
        images, signs = uniform(2, (3, 9, 9)), torch.tensor([1.0, -1.0])
        turned = rotation(images, torch.full((2, 1, 1, 1), 90.0), signs)
        torch.testing.assert_close(turned[0], images[0].rot90(1, (1, 2)))
        torch.testing.assert_close(turned[1], images[1].rot90(-1, (1, 2)))

    def test_rotation_keeps_shapes_on_oblong_images(self) -> None:
        """A disc in a 12 x 20 image stays a disc, and half a turn is two reflections."""
        y, x = torch.meshgrid(torch.arange(12.0) - 5.5, torch.arange(20.0) - 9.5, indexing="ij")
        disc = torch.exp(-(x**2 + y**2) / 5)[None, None]
        turn = lambda images, degrees: rotation(images, torch.full((1, 1, 1, 1), degrees), torch.ones(1))  # noqa: E731
        torch.testing.assert_close(turn(disc, 90.0), disc, atol=0.02, rtol=0)
        images = uniform(1, (1, 12, 20))
        torch.testing.assert_close(turn(images, 180.0), images.flip(2, 3))

    def test_translation_by_whole_pixels_rolls_and_repeats_the_edge(self) -> None:
        images = uniform(2, (1, 8, 10))
        moved = translation(images, torch.full((2, 1, 1, 1), 0.2), torch.tensor([0.0, math.pi / 2]))
        right = torch.cat([images[0, :, :, :1].expand(1, 8, 2), images[0, :, :, :-2]], 2)
        down = torch.cat([images[1, :, :1].expand(1, 2, 10), images[1, :, :-2]], 1)
        torch.testing.assert_close(moved[0], right)
        torch.testing.assert_close(moved[1], down)

    @pytest.mark.parametrize("share", [0.05, 0.33, 0.4])
    def test_occlusion_covers_the_square_of_its_side(self, share: float) -> None:
        """On black ground the grey adds up to half of the area, wherever the square lies."""
        images = torch.zeros(20, 1, 12, 16)
        places = torch.rand(20, 2, generator=seeded())
        grey = occlusion(images, torch.full((20, 1, 1, 1), share), places, reserved=0.4)
        torch.testing.assert_close(grey.sum((1, 2, 3)), torch.full((20,), 0.5 * (16 * share) ** 2))
        assert grey.max() <= 0.5

    def test_occlusion_reaches_the_corners(self) -> None:
        images = uniform(2, (1, 10, 10))
        places = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        covered = occlusion(images, torch.full((2, 1, 1, 1), 0.3), places, reserved=0.3)
        expected = images.clone()
        expected[0, 0, :3, :3] = expected[1, 0, -3:, -3:] = 0.5
        torch.testing.assert_close(covered, expected)


class TestDirections:
    def test_directions_are_unit_vectors_that_stay_inside(self) -> None:
        subject, inputs = linear_subject((40,)), uniform(30, (40,))
        inputs[:, :10], inputs[:, 10:20] = 0, 1
        for f in direction_families(subject, seeded()):
            draws = f.draw(inputs, seeded())
            torch.testing.assert_close(draws.norm(dim=1), torch.ones(30))
            assert (draws[:, :10] >= 0).all()
            assert (draws[:, 10:20] <= 0).all()
            free = torch.where((inputs > 0) & (inputs < 1), 0.5, inputs)
            moved = f.apply(free, torch.full((30,), 0.4), f.draw(free, seeded())) - free
            torch.testing.assert_close(moved.norm(dim=1), torch.full((30,), 0.4))

    def test_steepest_descent_of_a_linear_margin(self) -> None:
        """The margin falls by |gradient| per unit of severity, and no unit direction lowers it faster."""
        subject, inputs = linear_subject((6,)), torch.full((1, 6), 0.5)
        weight, bias = (p.detach() for p in subject.model[1].parameters())
        logits = inputs @ weight.T + bias
        pair = Pairs.of(logits)
        gradient = weight[pair.predicted] - weight[pair.rival]
        descent = direction_families(subject, seeded())[1]
        draws = descent.draw(inputs, seeded())
        torch.testing.assert_close(draws, -gradient / gradient.norm())
        probe = descent.apply(inputs, torch.tensor([0.2]), draws)
        fall = pair.margin(logits) - pair.margin(probe @ weight.T + bias)
        torch.testing.assert_close(fall, 0.2 * gradient.norm()[None])

    def test_an_input_without_a_gradient_stays(self) -> None:
        subject, inputs = linear_subject((6,)), uniform(3, (6,))
        with torch.no_grad():
            subject.model[1].weight.zero_()
        descent = direction_families(subject, seeded())[1]
        draws = descent.draw(inputs, seeded())
        assert torch.equal(descent.apply(inputs, torch.full((3,), 2.0), draws), inputs)

    def test_margin_gradient_is_the_difference_quotient(self) -> None:
        torch.manual_seed(0)
        subject = linear_subject((6,))
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
        subject = Subject(model, subject.train, subject.test, normalize=(0.5, 0.2))
        inputs, step = uniform(4, (6,)), 1e-6
        pairs = Pairs.of(subject.predict(inputs))
        margin, gradient = margin_gradient(subject, inputs, batch=3)
        torch.testing.assert_close(margin, pairs.margin(subject.predict(inputs)))
        for k in range(6):
            e = step * torch.eye(6)[k]
            rise = pairs.margin(subject.predict(inputs + e)) - pairs.margin(subject.predict(inputs - e))
            torch.testing.assert_close(gradient[:, k], rise / (2 * step), rtol=1e-6, atol=1e-6)
        swapped = margin_gradient(subject, inputs, Pairs(pairs.rival, pairs.predicted))
        torch.testing.assert_close(swapped[1], -gradient)

    def test_margin_gradient_of_a_single_logit(self) -> None:
        """The margin is |logit|, and its gradient the logit's, signed towards the predicted class."""
        part = linear_subject((6,), classes=2)
        model = nn.Linear(6, 1).eval()
        subject, inputs = Subject(model, part.train, part.test), uniform(10, (6,))
        margin, gradient = margin_gradient(subject, inputs)
        logit = model(inputs)[:, 0].detach()
        torch.testing.assert_close(margin, logit.abs())
        torch.testing.assert_close(gradient, logit.sign()[:, None] * model.weight.detach())

    def test_a_gradient_that_is_not_finite_is_named(self) -> None:
        class Root(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.ones(6, 3))

            def forward(self, x: Tensor) -> Tensor:
                return (x.sqrt() @ self.weight).cumsum(1)

        part = linear_subject((6,))
        with pytest.raises(NotFiniteError, match="at 1 inputs of 2"):
            margin_gradient(Subject(Root().eval(), part.train, part.test), torch.tensor([[0.0] * 6, [0.5] * 6]))

    def test_class_distance_is_the_median_over_pairs(self) -> None:
        subject = linear_subject((4,))
        x, y = subject.train.inputs, subject.train.targets
        nearest = [min((x[i] - x[j]).norm().item() for j in range(len(x)) if y[j] != y[i]) for i in range(len(x))]
        expected = torch.tensor(nearest).median().item()
        assert class_distance(subject, seeded()) == pytest.approx(expected, rel=1e-9)
        random, descent = direction_families(subject, seeded())
        assert random.reference == pytest.approx(expected)
        assert descent.reference == pytest.approx(expected / 4)

    def test_class_distance_leaves_out_twins(self) -> None:
        x = torch.tensor([[0.0], [0.0], [0.5], [1.0]])
        subject = linear_subject((1,), classes=2)
        twins = Subject(subject.model, Examples(x, torch.tensor([0, 1, 0, 0])), subject.test)
        assert class_distance(twins, seeded()) in (pytest.approx(0.5), pytest.approx(1.0))
        single = Subject(subject.model, Examples(x, torch.zeros(4, dtype=torch.int64)), subject.test)
        with pytest.raises(DataError, match="at least two classes"):
            class_distance(single, seeded())

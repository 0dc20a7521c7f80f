"""Seven families of image probes, from 8 x 8 pixels upwards.

Each change is written for images in [0, 1]; `_within` carries it to raw inputs and clamps it to their bounds.

Blur is diffusion on the pixel grid with reflecting edges, exp(s^2 L / 2) with L the second difference: away from
the edges its kernel is exp(-t) I_n(t), t = s^2, the Gaussian's discrete form. A sampled Gaussian stops blurring
below a third of a pixel; this one does not, and blurs of s and r make one of sqrt(s^2 + r^2). Source: Scale-space
for discrete signals, T. Lindeberg, 1990, https://doi.org/10.1109/34.49051.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from brittle.bounds import Bounds, within
from brittle.errors import DataError
from brittle.probes.family import Apply, Draw, Family, column

SMALLEST_SIDE = 8
"""Pixels an input must have along both of its last two axes to count as an image."""

Change = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images (M, C, H, W) in [0, 1], severity (M, 1, 1, 1), draws) -> changed images, not yet clamped."""


def is_image(input_shape: Sequence[int]) -> bool:
    """Whether inputs are read as images: (H, W) or (C, H, W) with both sides at least 8."""
    return len(input_shape) in (2, 3) and min(input_shape[-2:]) >= SMALLEST_SIDE


def image_families(input_shape: Sequence[int], bounds: Bounds) -> tuple[Family, ...]:
    """The seven families for images.

    References were set on scikit-learn's digits (8 x 8) and Fashion-MNIST (28 x 28): a person still reads the
    image there, while small CNNs fail on 4 to 23 and 8 to 50 per cent of what they have right. Lengths follow the
    image's width, but blur its root: strokes of one pixel are lost to a blur that a larger image survives.

    Args:
        input_shape: (C, H, W) or (H, W), both sides at least 8.
        bounds: smallest and largest value of a raw input.

    Raises:
        DataError: where the inputs are no images.
    """
    if not is_image(input_shape):
        raise DataError(
            f"image probes need inputs of shape (C, H, W) or (H, W) with sides of at least {SMALLEST_SIDE}, "
            f"found {tuple(input_shape)}; use direction_families"
        )
    height, width = input_shape[-2:]
    side, of_range, of_width = 0.35, "share of the range", "share of the width"
    table: list[tuple[str, str, float, Draw, Change]] = [
        ("brightness", of_range, 0.35, _signs, brightness),
        ("contrast", "share of the contrast", 0.7, _nothing, contrast),
        ("noise", of_range, 0.2, _pattern, noise),
        ("blur", "pixels", 0.3 * math.sqrt(width), _nothing, blur),
        ("rotation", "degrees", 20.0, _signs, rotation),
        ("translation", of_width, 0.1, _bearings, translation),
        ("occlusion", of_width, side, _places, partial(occlusion, reserved=side)),
    ]
    return tuple(Family(*row[:4], _within(row[4], height, width, bounds)) for row in table)


def brightness(images: Tensor, severity: Tensor, signs: Tensor) -> Tensor:
    """All pixels brighter or darker by a share of the range. signs: (M,)."""
    return images + column(signs, images) * severity


def contrast(images: Tensor, severity: Tensor, _: Tensor) -> Tensor:
    """Pixels drawn towards the image's mean; from severity 1 on nothing is left of the image."""
    mean = images.mean((1, 2, 3), keepdim=True)
    return images + severity.clamp(max=1) * (mean - images)


def noise(images: Tensor, severity: Tensor, pattern: Tensor) -> Tensor:
    """Gaussian noise; severity is its standard deviation. pattern: (M, *input), standard normal."""
    return images + severity * pattern.reshape(images.shape)


def blur(images: Tensor, severity: Tensor, _: Tensor) -> Tensor:
    """Discrete Gaussian blur of standard deviation `severity` pixels, reflected at the edges."""
    down, across = (_diffusion(severity.reshape(-1), n) for n in images.shape[-2:])
    return torch.einsum("mij,mcjk,mlk->mcil", down, images, across)


def rotation(images: Tensor, severity: Tensor, signs: Tensor) -> Tensor:
    """Turned about the centre by `severity` degrees, anticlockwise where the sign is positive. signs: (M,)."""
    angle = torch.deg2rad(severity.reshape(-1) * signs)
    aspect = images.shape[-2] / images.shape[-1]  # the sampling grid runs from -1 to 1 along both axes
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rows = (cos, -sin * aspect, zero), (sin / aspect, cos, zero)
    return _resample(images, torch.stack([torch.stack(row, 1) for row in rows], 1))


def translation(images: Tensor, severity: Tensor, bearings: Tensor) -> Tensor:
    """Moved by a share of the width along a bearing: 0 to the right, a quarter turn down. bearings: (M,) radians."""
    pixels = severity.reshape(-1, 1) * images.shape[-1] * torch.stack([bearings.cos(), bearings.sin()], 1)
    offset = -2 * pixels / pixels.new_tensor([images.shape[-1], images.shape[-2]])
    unit = torch.eye(2).to(images).expand(len(images), 2, 2)
    return _resample(images, torch.cat([unit, offset[:, :, None]], 2))


def occlusion(images: Tensor, severity: Tensor, places: Tensor, reserved: float) -> Tensor:
    """A grey square whose side is a share of the width, centred at a drawn place.

    Its fill is the middle of the range, which shows on dark and on bright ground alike; a pixel covered in part
    is mixed. places: (M, 2) in [0, 1], (0, 0) and (1, 1) the outermost centres at which a square of side
    `reserved` lies inside.
    """
    height, width = images.shape[-2:]
    half = severity.reshape(-1, 1) * width / 2
    room = reserved * width
    cover = [
        _covered(room / 2 + place[:, None] * (n - room), half, n)
        for place, n in zip(places.unbind(1), (height, width), strict=True)
    ]
    share = torch.einsum("mh,mw->mhw", *cover)[:, None]
    return images + share * (0.5 - images)


def _within(change: Change, height: int, width: int, bounds: Bounds) -> Apply:
    """`change` as a family's `apply`: on raw inputs, inside the bounds, exactly the input at severity 0."""
    low, high = bounds

    def apply(inputs: Tensor, severity: Tensor, draws: Tensor) -> Tensor:
        images = inputs.reshape(len(inputs), -1, height, width)  # shape: (M, C, H, W)
        s = column(severity, images)
        changed = change((images - low) / (high - low), s, draws.to(images))
        probes = within(low + (high - low) * changed, bounds)
        return torch.where(s == 0, images, probes).reshape(inputs.shape)

    return apply


def _diffusion(sigma: Tensor, n: int) -> Tensor:
    """exp(sigma^2 L / 2) for n pixels in a row, L the second difference with reflecting ends. (M,) -> (M, n, n)."""
    step = torch.arange(n, dtype=torch.float64)
    waves = torch.cos(math.pi / n * (step[:, None] + 0.5) * step)  # column k: the k-th cosine, an eigenvector of L
    waves = F.normalize(waves, dim=0)
    decay = torch.exp(-(sigma.double().cpu()[:, None] ** 2) * (1 - torch.cos(math.pi / n * step)))
    return torch.einsum("ik,mk,jk->mij", waves, decay, waves).to(sigma)


def _resample(images: Tensor, theta: Tensor) -> Tensor:
    """Bilinear; beyond the edge the edge's pixel goes on, so that no frame of a foreign colour moves in."""
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _covered(centre: Tensor, half: Tensor, n: int) -> Tensor:
    """Share of each of n pixels that lies within `half` of `centre`. centre, half: (M, 1) -> (M, n)."""
    edge = torch.arange(n + 1).to(centre)
    return (edge - centre).clamp(-half, half).diff(dim=1)


def _nothing(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs.new_zeros(len(inputs), 0)


def _signs(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (len(inputs),), generator=generator).to(inputs) * 2 - 1


def _bearings(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return 2 * math.pi * torch.rand(len(inputs), generator=generator).to(inputs)


def _places(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(len(inputs), 2, generator=generator).to(inputs)


def _pattern(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(inputs.shape, generator=generator).to(inputs)

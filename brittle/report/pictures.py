"""Inputs as small PNG images in data URIs: images as they are, vectors as bars.

Raw inputs lie in [low, high]; a pixel is the nearest of 256 levels between them. A difference of two inputs is
drawn around mid-grey, stretched so that its largest change is black or white.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import encode_png

BAR_HEIGHT, BAR_WIDTH, MOST_BARS = 48, 3, 96
SMOOTH_FROM = 48
"""Images at least this many pixels wide are smoothed when enlarged; smaller ones show their pixels."""


@dataclass(frozen=True)
class Picture:
    """A PNG in a data URI, with its true size in pixels."""

    uri: str
    width: int
    height: int
    smooth: bool


@dataclass(frozen=True)
class Album:
    """Pictures by key, none larger than `side` pixels."""

    pictures: Mapping[str, Tensor]
    bounds: tuple[float, float]
    side: int

    def picture(self, key: str) -> Picture | None:
        """The picture of an input; None where it was not kept."""
        return self._encode(_unit(self.pictures[key], *self.bounds), 0.0) if key in self.pictures else None

    def difference(self, before: str, after: str) -> Picture | None:
        """What changed from one input to another; None where either is missing or the shapes differ."""
        a, b = self.pictures.get(before), self.pictures.get(after)
        if a is None or b is None or a.shape != b.shape:
            return None
        change = (b - a).float()
        return self._encode(change / (2 * change.abs().max().clamp_min(1e-12)) + 0.5, 0.5)

    def _encode(self, x: Tensor, base: float) -> Picture:
        """x: an input scaled to [0, 1]; `base` is where a vector's bars start."""
        image = (_bars(x.reshape(-1), base) if _is_vector(x) else _shrink(_channels(x), self.side)).clamp(0, 1)
        png = encode_png((image * 255).round().to(torch.uint8), compression_level=9)
        uri = "data:image/png;base64," + base64.b64encode(png.numpy().tobytes()).decode()
        return Picture(uri, image.shape[2], image.shape[1], image.shape[2] >= SMOOTH_FROM)


def _unit(x: Tensor, low: float, high: float) -> Tensor:
    return (x.float() - low) / (high - low)


def _is_vector(x: Tensor) -> bool:
    return x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[0] > 4)


def _channels(x: Tensor) -> Tensor:
    """(H, W) or (C, H, W) -> one or three channels. Shape: (1 or 3, H, W)."""
    x = x[None] if x.dim() == 2 else x
    return x if len(x) in (1, 3) else x.mean(0, keepdim=True)


def _shrink(x: Tensor, side: int) -> Tensor:
    """Average areas down to at most `side` pixels."""
    longest = max(x.shape[1:])
    if longest <= side:
        return x
    size = [max(1, round(n * side / longest)) for n in x.shape[1:]]
    return F.interpolate(x[None], size=size, mode="area")[0]


def _bars(x: Tensor, base: float) -> Tensor:
    """A vector (D,) in [0, 1] as upright bars from `base`, dark on light. Shape: (1, height, width)."""
    x = F.adaptive_avg_pool1d(x[None], min(len(x), MOST_BARS))[0].clamp(0, 1)
    low, high = torch.minimum(x, torch.tensor(base)), torch.maximum(x, torch.tensor(base))
    level = (torch.arange(BAR_HEIGHT, 0, -1) - 0.5)[:, None] / BAR_HEIGHT
    bars = ~((level >= low) & (level <= high))  # shape: (height, D)
    gap = torch.ones(BAR_HEIGHT, len(x), BAR_WIDTH + 1)
    gap[:, :, :BAR_WIDTH] = bars[:, :, None] * 0.8 + 0.15
    return gap.reshape(1, BAR_HEIGHT, -1)

"""Perturbations that people meet, and the severity at which each input fails.

All families of images in `probes` (rotation, translation, brightness, contrast, blur, noise, occlusion), and

    scale   the image drawn larger or smaller about its centre, by a share of its size
    JPEG    the image written as a JPEG of quality 100 - severity, and read again

each searched up to `REACH` times its reference. Failure need not grow with severity, so the first failing one among
equally spaced severities is looked for, and then the boundary below it is halved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from brittle.bounds import Bounds, within
from brittle.probes import Family, image_families
from brittle.probes.family import column
from brittle.records import Progress, Queries
from brittle.subject import Subject

REACH = 2.0
"""Largest severity, in units of the reference; where a family ends sooner (contrast, JPEG), there."""

SCALE, QUALITY_LOST = 0.2, 90.0
"""References of the two families added here: a fifth larger or smaller, and JPEG quality 10."""

ENDS = {"contrast": 1.0, "JPEG": 99.0, "scale": 0.5}
"""Severities beyond which a family has nothing more to give."""

LEVELS, HALVINGS = 8, 8
"""Severities that are looked at first, and halvings after that."""

LARGEST = 255
"""Of an 8-bit value."""


@dataclass(frozen=True)
class Severities:
    """The severity at which each input fails under one family, infinite where it never does."""

    family: str
    unit: str
    reference: float
    most: float  # the largest severity that was tried
    severity: Tensor  # shape: (M,) float64; 0 where the clean input is wrong
    holds: Tensor  # shape: (M,) float64, the largest severity below it that was seen to hold
    new_class: Tensor  # shape: (M,) int64, at `severity`
    evaluations: Tensor  # shape: (M,) int64 forward passes


def perturbations(input_shape: Sequence[int], bounds: Bounds) -> tuple[Family, ...]:
    """All families for images. Raises `DataError` where the inputs are none."""
    low, high = bounds
    side = tuple(input_shape[-2:])

    def scale(inputs: Tensor, severity: Tensor, draws: Tensor) -> Tensor:
        images = inputs.reshape(len(inputs), -1, *side)
        factor = 1 + draws.to(images) * severity.to(images)
        theta = torch.zeros(len(images), 2, 3).to(images)
        theta[:, 0, 0] = theta[:, 1, 1] = 1 / factor
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        drawn = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        return within(torch.where(column(severity, images) == 0, images, drawn), bounds).reshape(inputs.shape)

    def jpeg(inputs: Tensor, severity: Tensor, _: Tensor) -> Tensor:
        rows = zip(inputs.reshape(len(inputs), -1, *side), severity.tolist(), strict=True)
        written = [image if lost == 0 else _written(image, 100 - lost, low, high) for image, lost in rows]
        return torch.stack(written).to(inputs).reshape(inputs.shape)

    def signs(inputs: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randint(2, (len(inputs),), generator=generator) * 2.0 - 1

    def nothing(inputs: Tensor, _: torch.Generator) -> Tensor:
        return torch.zeros(len(inputs))

    return (
        *image_families(input_shape, bounds),
        Family("scale", "share of the size", SCALE, signs, scale),
        Family("JPEG", "points of quality", QUALITY_LOST, nothing, jpeg),
    )


def failure_severity(
    subject: Subject, queries: Queries, family: Family, draws: Tensor, most: float | None = None
) -> Severities:
    """Where each query first fails under a family.

    Args:
        draws: the family's randomness, one row a query.
        most: largest severity; `REACH` references, or where the family ends, if left out.

    Cost: `LEVELS` + `HALVINGS` forward passes a query that is right when clean.
    """
    most = min(REACH * family.reference, ENDS.get(family.name, math.inf)) if most is None else most
    count = len(queries)
    low, high = torch.zeros(count, dtype=torch.float64), torch.full((count,), torch.inf, dtype=torch.float64)
    new_class, spent = queries.pairs.predicted.clone(), torch.zeros(count, dtype=torch.int64)
    high[~queries.right] = 0

    def look(severity: Tensor, rows: Tensor) -> None:
        """Note what holds and what fails at a severity each."""
        probes = family.apply(queries.inputs[rows], severity.to(queries.inputs), draws[rows])
        classes = subject.predict(probes).argmax(1)
        failed = classes != queries.targets[rows]
        spent[rows] += 1
        high[rows] = torch.where(failed, severity, high[rows])
        new_class[rows] = torch.where(failed, classes, new_class[rows])
        low[rows] = torch.where(failed, low[rows], severity)

    for level in torch.linspace(0, most, LEVELS + 1, dtype=torch.float64)[1:]:
        rows = high.isinf().nonzero()[:, 0]
        if len(rows):
            look(level.expand(len(rows)), rows)
    rows = (high.isfinite() & queries.right).nonzero()[:, 0]
    for _ in range(HALVINGS if len(rows) else 0):
        look((low[rows] + high[rows]) / 2, rows)
    return Severities(family.name, family.unit, family.reference, most, high, low, new_class, spent)


def failure_severities(
    subject: Subject,
    queries: Queries,
    families: Sequence[Family],
    *,
    generator: torch.Generator,
    draws: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> list[Severities]:
    """Where each query first fails under each family. draws: randomness by family; made anew where there is none."""
    found = []
    for k, family in enumerate(families):
        drawn = (draws or {}).get(family.name)
        drawn = family.draw(queries.inputs, generator) if drawn is None else drawn
        found.append(failure_severity(subject, queries, family, drawn))
        if progress:
            progress(k + 1, len(families))
    return found


def _written(image: Tensor, quality: float, low: float | Tensor, high: float | Tensor) -> Tensor:
    """An image (C, H, W) after it was a JPEG; colours together where there are three, else each channel alone."""
    levels = ((image.cpu() - low) / (high - low) * LARGEST).round().clamp(0, LARGEST).to(torch.uint8)
    planes = [levels] if len(levels) == 3 else list(levels[:, None])
    read: Callable[[Tensor], Tensor] = lambda plane: decode_jpeg(  # noqa: E731
        encode_jpeg(plane, quality=round(quality)), ImageReadMode.RGB if len(plane) == 3 else ImageReadMode.GRAY
    )
    return low + torch.cat([read(plane.contiguous()) for plane in planes]).to(image) / LARGEST * (high - low)

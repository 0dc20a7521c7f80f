"""Probes: families of small changes whose severity grows from nothing, so that each traces one curve.

family       what a family is
images       brightness, contrast, noise, blur, rotation, translation, occlusion
directions   a random direction and the steepest descent of the margin, for any input
"""

import torch

from brittle.probes.directions import class_distance, direction_families, margin_gradient
from brittle.probes.family import MAP_SHARES, Family
from brittle.probes.images import image_families, is_image
from brittle.subject import Subject

__all__ = [
    "MAP_SHARES",
    "Family",
    "class_distance",
    "direction_families",
    "families_for",
    "image_families",
    "is_image",
    "margin_gradient",
]


def families_for(subject: Subject, generator: torch.Generator) -> tuple[Family, ...]:
    """All families that fit the subject's inputs: directions always, the others where the input is an image."""
    shape = tuple(subject.train.inputs.shape[1:])
    directions = direction_families(subject, generator)
    return (*image_families(shape, subject.bounds), *directions) if is_image(shape) else directions

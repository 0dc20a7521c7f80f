"""Probes along one direction, for inputs of any shape: x + s d, clamped to the bounds, |d| = 1.

The severity s is the L2 distance in raw units, until a further component meets its bound: a component that starts
on its bound and would leave it is dropped from d beforehand.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from brittle.bounds import within
from brittle.errors import DataError, NotFiniteError
from brittle.probes.family import Family, column
from brittle.records import Pairs
from brittle.subject import Subject


def direction_families(subject: Subject, generator: torch.Generator, sample: int = 200) -> tuple[Family, ...]:
    """A random direction, and the steepest descent of the predicted class's margin over its rival.

    With D the `class_distance`, the random direction's reference is D and that of the steepest descent, along
    which networks fail far sooner, D / 4: small CNNs on digits and Fashion-MNIST then fail on 16 and 7, and on 43
    and 56 per cent of what they have right.

    Args:
        subject: its model gives the gradients, its training data the distance.
        generator: draws the training examples on which the distance is measured, `sample` of them.
    """
    distance = class_distance(subject, generator, sample)
    low, high = subject.bounds

    def random(inputs: Tensor, generator: torch.Generator) -> Tensor:
        normal = torch.randn(inputs.shape, generator=generator).to(inputs)
        return _feasible(normal, inputs, low, high)

    def descent(inputs: Tensor, generator: torch.Generator) -> Tensor:
        return _feasible(-margin_gradient(subject, inputs)[1], inputs, low, high)

    def apply(inputs: Tensor, severity: Tensor, draws: Tensor) -> Tensor:
        return within(inputs + column(severity, inputs) * draws.to(inputs), subject.bounds)

    return (
        Family("random direction", "L2", distance, random, apply),
        Family("margin gradient", "L2", distance / 4, descent, apply),
    )


def margin_gradient(
    subject: Subject, inputs: Tensor, pairs: Pairs | None = None, batch: int = 256
) -> tuple[Tensor, Tensor]:
    """The margin at raw inputs and its gradient with respect to them.

    Args:
        inputs: (M, *input).  pairs: the two classes of each margin; by default the two largest logits.

    Returns:
        Margin (M,) in logits and gradient (M, *input), on the CPU.

    Raises:
        NotFiniteError: where the gradient is not finite.
    """
    device = next(subject.model.parameters()).device
    margins, gradients = [inputs.new_zeros(0)], [inputs[:0]]
    for start in range(0, len(inputs), batch):
        rows = slice(start, start + batch)
        x = inputs[rows].detach().to(device).requires_grad_()
        logits = subject.class_logits(subject.model, x)
        margin = (Pairs.of(logits.detach().cpu()) if pairs is None else pairs[rows]).margin(logits)
        margins.append(margin.detach().cpu())
        gradients.append(torch.autograd.grad(margin.sum(), x)[0].cpu())
    gradient = torch.cat(gradients)
    if not gradient.isfinite().all():
        bad = int((~gradient.isfinite()).flatten(1).any(1).sum())
        raise NotFiniteError(
            f"input gradients must be finite, found NaN or infinity at {bad} inputs of {len(inputs)}; "
            "look for a root or a norm of zero in the model"
        )
    return torch.cat(margins), gradient


def class_distance(subject: Subject, generator: torch.Generator, sample: int = 200) -> float:
    """Median L2 distance from `sample` training examples to the nearest one of another class.

    Examples that coincide with one of another class are left out.

    Raises:
        DataError: where nothing is left.
    """
    train = subject.train
    flat = train.inputs.flatten(1)  # shape: (N, D)
    ids = torch.randperm(len(train), generator=generator)[:sample]
    nearest = [_nearest_other(flat, train.targets, part) for part in ids.split(50)]
    distance = (flat[ids] - flat[torch.cat(nearest)]).norm(dim=1)
    if not (distance > 0).any():
        raise DataError("training data must hold different inputs of at least two classes, found none; check targets")
    return distance[distance > 0].median().item()


def _nearest_other(flat: Tensor, targets: Tensor, ids: Tensor) -> Tensor:
    """The training example nearest to each of `ids` among those of another class; itself where there is none."""
    distance = torch.cdist(flat[ids], flat)  # shape: (ids, N)
    distance.masked_fill_(targets == targets[ids][:, None], torch.inf)
    best = distance.min(1)
    return torch.where(best.values.isinf(), ids, best.indices)


def _feasible(direction: Tensor, inputs: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """The unit vector along `direction` without what leaves the bounds at once; 0 where nothing is left."""
    leaves = ((inputs <= low) & (direction < 0)) | ((inputs >= high) & (direction > 0))
    flat = torch.where(leaves, 0, direction).flatten(1)
    return F.normalize(flat, dim=1, eps=torch.finfo(flat.dtype).tiny).reshape(inputs.shape)

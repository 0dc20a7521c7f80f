"""The row gradients of a recorded step, tensor by tensor, and the check that they are the step's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from brittle.kernel.factors import Factors, factors_of
from brittle.kernel.gradients import Piece, Scalar, beyond_rounding, check_sum, row_parts, row_pieces
from brittle.kernel.outer import Part
from brittle.kernel.pull import cancelling
from brittle.path.flat import FlatModel
from brittle.path.observed import Batch
from brittle.path.rerun import batch_gradient, training_loss
from brittle.path.walked import WalkedStep
from brittle.subject import Subject

AGREEMENT = {0: 1e-3, 1: 5e-2, 2: 5e-2}
"""Relative distance from plain autograd that row gradients may have, by the precision of the forward pass."""


def step_pieces(
    subject: Subject, flat: FlatModel, step: WalkedStep, batch: Batch
) -> Iterator[tuple[slice, Tensor, Tensor | float]]:
    """Row gradients of one batch of a step, the loss's own weights (1/B for a mean) included.

    Yields (columns, (B, p), which of them count): columns whose rows add up to rounding count 0 where rows see each
    other, all others 1.
    """
    coupled = couples(flat)
    for columns, rows in _pieces(subject, flat, step, batch):
        yield columns, rows, beyond_rounding(rows).to(rows) if coupled else 1.0
        del rows  # before the next tensor's are formed


def check_step(subject: Subject, flat: FlatModel, step: WalkedStep) -> Tensor:
    """Check that a step's row gradients add up to its batches' gradients. Raises `UnsupportedError`.

    Returns the coordinates (k,) of the tensors whose gradient is mostly nothing but rounding, as that of a bias before
    batch normalization.
    """
    hidden, coupled = torch.zeros_like(flat.state, dtype=torch.bool), couples(flat)
    for batch in step.batches:
        found = torch.zeros_like(flat.state)
        for columns, part in step_parts(subject, flat, step, batch):
            found[columns] = total = part.sum(0)
            if coupled:
                hidden[columns.start + cancelling(part, total)] = True
            del part
        flat.load(step.state)
        whole = batch_gradient(subject, flat, batch, step.seen.manner.resting)
        check_sum(flat, found, whole, AGREEMENT[batch.autocast])
    for slot in flat.slots:
        own = hidden[slot.start : slot.stop]
        own.fill_(bool(2 * own.sum() > len(own)))
    return hidden.nonzero()[:, 0]


def step_parts(subject: Subject, flat: FlatModel, step: WalkedStep, batch: Batch) -> Iterator[tuple[slice, Part]]:
    """The row gradients of one batch of a step tensor by tensor, in factors as far as possible."""
    return row_parts(flat, _loss(subject, flat, step, batch), len(batch))


def step_factors(subject: Subject, flat: FlatModel, step: WalkedStep, batch: Batch) -> Factors:
    """The row gradients of one batch in factors, where rows do not see each other."""
    return factors_of(flat, _loss(subject, flat, step, batch), len(batch))


def couples(flat: FlatModel) -> bool:
    """Whether the rows of a batch see each other."""
    return any(isinstance(module, _BatchNorm) for module in flat.model.modules())


def _pieces(subject: Subject, flat: FlatModel, step: WalkedStep, batch: Batch) -> Iterator[Piece]:
    return row_pieces(flat, _loss(subject, flat, step, batch), len(batch))


def _loss(subject: Subject, flat: FlatModel, step: WalkedStep, batch: Batch) -> Scalar:
    """The loss of a batch, to be differentiated at the weights before its step."""
    flat.load(step.state)
    return lambda: training_loss(subject, flat, batch, step.seen.manner.resting)

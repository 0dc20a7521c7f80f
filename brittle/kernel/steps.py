"""The row gradients of a recorded step, tensor by tensor, and the check that they are the step's."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from brittle.kernel.gradients import check_sum, row_pieces, sum_of, without_rounding
from brittle.path.flat import FlatModel
from brittle.path.observed import Batch
from brittle.path.rerun import batch_gradient, training_loss
from brittle.path.walked import WalkedStep
from brittle.subject import Subject

AGREEMENT = {0: 1e-3, 1: 5e-2, 2: 5e-2}
"""Relative distance from plain autograd that row gradients may have, by the precision of the forward pass."""


def step_pieces(subject: Subject, flat: FlatModel, step: WalkedStep, batch: Batch) -> Iterator[tuple[slice, Tensor]]:
    """Row gradients of one batch of a step, the loss's own weights (1/B for a mean) included: (columns, (B, p))."""
    flat.load(step.state)
    coupled = any(isinstance(module, _BatchNorm) for module in flat.model.modules())
    resting = step.seen.manner.resting
    for columns, rows in row_pieces(flat, lambda: training_loss(subject, flat, batch, resting), len(batch)):
        yield columns, without_rounding(rows) if coupled else rows
        del rows  # before the next tensor's are formed


def check_step(subject: Subject, flat: FlatModel, step: WalkedStep) -> None:
    """Check that a step's row gradients add up to its batches' gradients. Raises `UnsupportedError`."""
    for batch in step.batches:
        found = sum_of(flat, step_pieces(subject, flat, step, batch))
        flat.load(step.state)
        whole = batch_gradient(subject, flat, batch, step.seen.manner.resting)
        check_sum(flat, found, whole, AGREEMENT[batch.autocast])

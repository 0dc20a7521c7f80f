"""One recorded batch run forward again, as training ran it: the same inputs, precision, modules at rest, dropout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from brittle.errors import NotFiniteError, PathMismatchError
from brittle.path.flat import FlatModel
from brittle.path.forwards import repeated
from brittle.path.observed import AUTOCAST, Batch
from brittle.subject import Subject


def training_loss(subject: Subject, flat: FlatModel, batch: Batch, resting: Sequence[str] = ()) -> Tensor:
    """The loss of one recorded batch at the flat model's present state, in training mode; a scalar.

    resting: the modules that were in evaluation mode. The loss moves the running statistics, as it did in training.
    """
    device = flat.state.device
    inputs, targets = (t.to(device) for t in (batch_inputs(subject, batch), batch_targets(subject, batch)))
    weights = None if batch.weights is None else batch.weights.to(device)
    model = flat.train()
    for name in resting:
        model.get_submodule(name).training = False
    with repeated(batch.random, device), _precision(batch, device):
        loss = subject.loss_of(subject.run(model, inputs.to(flat.state.dtype)), targets, weights)
    if not loss.isfinite():
        raise NotFiniteError(f"the training loss must be finite, found {loss.item()} while replaying the path")
    return loss


def batch_gradient(subject: Subject, flat: FlatModel, batch: Batch, resting: Sequence[str] = ()) -> Tensor:
    """Gradient of a batch's loss with respect to the state, shape (P,); 0 for buffers."""
    return flat.gradient(lambda: training_loss(subject, flat, batch, resting))


def batch_inputs(subject: Subject, batch: Batch) -> Tensor:
    """The raw inputs that the batch was made from: stored, augmented again, or the training data's own."""
    if batch.inputs is not None:
        return batch.inputs
    plain = subject.train.inputs[batch.rows]
    if subject.augment is None:
        return plain
    augment = subject.augment
    made = [augment(x, i, batch.epoch) for x, i in zip(plain, batch.rows.tolist(), strict=True)]
    if any(x.shape != plain.shape[1:] for x in made):
        raise PathMismatchError(
            f"augment= must return inputs of the training data's shape {tuple(plain.shape[1:])}, found "
            f"{tuple(made[0].shape)}; pass the function that training used, on raw inputs"
        )
    return torch.stack(made)


def batch_targets(subject: Subject, batch: Batch) -> Tensor:
    """The targets that the loss saw."""
    return subject.train.targets[batch.rows] if batch.targets is None else batch.targets


@contextmanager
def _precision(batch: Batch, device: torch.device) -> Iterator[None]:
    dtype = AUTOCAST[batch.autocast]
    with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        yield

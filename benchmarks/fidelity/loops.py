"""The training loop of a case: what it does between two optimizer steps, and what the recorder is told.

The loop is an ordinary one. `Loop` holds what it needs; a *take* makes one optimizer step of one or more batches.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from benchmarks.fidelity.draws import Batch
from benchmarks.fidelity.models import logits_of
from brittle.path.recorder import Recorder

OVERFLOW = 20
"""The step whose scaled loss overflows, so that the scaler skips it."""

Loss = Callable[..., Tensor]
"""(logits, targets), or (logits, targets, weights) -> scalar."""

Clip = Callable[[nn.Module], Any]


@dataclass
class Loop:
    """One training under way."""

    model: nn.Module
    optimizer: Optimizer
    loss: Loss
    clip: Clip
    schedule: LRScheduler | ReduceLROnPlateau | None
    average: AveragedModel | None
    average_after: int
    scaler: GradScaler
    recorder: Recorder | None = None
    taken: int = 0
    last_loss: float = 0.0

    def loss_of(self, batch: Batch) -> Tensor:
        """The batch's loss, by the forward pass of a training loop."""
        logits = logits_of(self.model(batch.inputs))
        more = () if batch.weights is None else (batch.weights,)
        return self.loss(logits, batch.targets, *more)

    def note(self, batch: Batch) -> None:
        """The one line that recording takes."""
        if self.recorder is not None:
            self.recorder.batch(batch.ids, **batch.notes)

    def after(self) -> None:
        """What follows an optimizer step: the schedule, the average."""
        self.taken += 1
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(self.last_loss)
        elif self.schedule is not None:
            self.schedule.step()
        if self.average is not None and self.taken > self.average_after:
            self.average.update_parameters(self.model)

    def state(self) -> dict[str, Any]:
        """A checkpoint, as users write them to a file."""
        held = {name: part.state_dict() for name, part in self._parts().items()}
        held |= {"scaler": self.scaler.state_dict(), "taken": self.taken, "random": torch.get_rng_state()}
        return deepcopy(held)

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.scaler.load_state_dict(state["scaler"])
        self.taken = state["taken"]
        torch.set_rng_state(state["random"])

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule, "average": self.average}
        return {name: part for name, part in parts.items() if part is not None}


Take = Callable[[Loop, list[Batch]], None]
"""Makes one optimizer step of some batches (one, unless gradients are accumulated)."""


def plainly(loop: Loop, batches: list[Batch]) -> None:
    """Backward, clip, step; several batches accumulate, each with its part of the mean."""
    loop.optimizer.zero_grad()
    for batch in batches:
        loss = loop.loss_of(batch) / len(batches)
        loss.backward()
        loop.note(batch)
    loop.last_loss = loss.item()
    loop.clip(loop.model)
    loop.optimizer.step()


def noted_first(loop: Loop, batches: list[Batch]) -> None:
    """The recorder is told before the forward pass."""
    loop.optimizer.zero_grad()
    for batch in batches:
        loop.note(batch)
        (loop.loss_of(batch) / len(batches)).backward()
    loop.clip(loop.model)
    loop.optimizer.step()


def by_closure(loop: Loop, batches: list[Batch]) -> None:
    """The optimizer itself asks for the gradient."""
    (batch,) = batches
    loop.note(batch)

    def closure() -> Tensor:
        loop.optimizer.zero_grad()
        loss = loop.loss_of(batch)
        loss.backward()
        return loss

    loop.optimizer.step(closure)  # type: ignore[arg-type]


def scaled(autocast: bool) -> Take:
    """A gradient scaler, and one step that it skips. autocast: forward passes in bfloat16 where that is faster."""

    def take(loop: Loop, batches: list[Batch]) -> None:
        loop.optimizer.zero_grad()
        overflow = float("inf") if loop.taken == OVERFLOW else 1.0
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = loop.loss_of(batch) / len(batches)
            loop.note(batch)
            (loop.scaler.scale(loss) * overflow).backward()
        if loop.clip is not unclipped:
            loop.scaler.unscale_(loop.optimizer)
            loop.clip(loop.model)
        loop.scaler.step(loop.optimizer)
        loop.scaler.update()

    return take


def unclipped(model: nn.Module) -> None:
    """Gradients as they are."""


def by_norm(limit: float) -> Clip:
    return lambda model: nn.utils.clip_grad_norm_(model.parameters(), limit)


def by_value(limit: float) -> Clip:
    return lambda model: nn.utils.clip_grad_value_(model.parameters(), limit)


def negated(logits: Tensor, targets: Tensor) -> Tensor:
    """What an optimizer with `maximize` is given."""
    return -F.cross_entropy(logits, targets)


def smoothed(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, label_smoothing=0.1)


def by_class(logits: Tensor, targets: Tensor) -> Tensor:
    """Classes weigh 0.5 to 1.4; torch divides by the batch's weight."""
    return F.cross_entropy(logits, targets, weight=torch.linspace(0.5, 1.4, 10).to(logits))


def by_example(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean of losses, each times its example's weight."""
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses if weights is None else losses * weights).mean()


def binary(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of a single logit, as the subject calls it and as the loop does."""
    return F.binary_cross_entropy_with_logits(logits.reshape(-1), targets.reshape(-1).to(logits.dtype))

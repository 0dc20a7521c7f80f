"""A training of which only some checkpoints are left: a path of few, long steps, credited as far as that goes.

Between two checkpoints w_k and w_{k+1} the weights are taken along the straight line, on which the identity
f(w_{k+1}) - f(w_k) = Jbar . D holds whatever happened in between. What the training examples had in D is not known
any more; as TracIn does (Pruthi et al. 2020, arXiv 2002.08484) it is read from their gradients at the checkpoint,

    D  ~  - n_k lr_k grad L(w_k),        n_k = max(0, - <D, grad L> / (lr_k |grad L|^2)),

with the number n_k of full-batch steps that fits best, instead of one that is assumed. What is left of D belongs to
no example: the ledger's row `unexplained`, which is large, and says how far such an account may be trusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brittle.blame import described
from brittle.errors import NotFiniteError, PathMismatchError, UsageError
from brittle.path.flat import FlatModel, layout, state_of
from brittle.path.observed import Batch, Manner, Snapshot, Step
from brittle.path.rerun import batch_gradient
from brittle.path.rules import StepRule
from brittle.path.walked import Interval, WalkedStep
from brittle.subject import Subject

CHUNK = 256
"""Training examples whose gradients are taken at once."""


class Checkpoints:
    """The checkpoints of a subject as a path; `steps` are the intervals between them. As `PathReader`, but coarse.

    Raises:
        UsageError: where a checkpoint cannot be read.
        PathMismatchError: where one belongs to another model.
    """

    optimizer, optimizer_name = "checkpoints", None
    average: Tensor | None = None

    def __init__(self, subject: Subject) -> None:
        assert subject.checkpoints is not None
        slots = layout(subject.model)
        self.sizes = torch.tensor([slot.shape.numel() for slot in slots])
        self.trained = torch.tensor([not slot.buffer for slot in slots])
        self.states = [_state(subject.model, at, k) for k, (at, _) in enumerate(subject.checkpoints)]
        self.lr = [float(lr) for _, lr in subject.checkpoints]
        final = state_of(subject.model).cpu()
        if not torch.allclose(self.states[-1], final, rtol=1e-4, atol=1e-6):
            self.states.append(final)  # the audited weights end the path
        if len(self.states) < 2:
            raise UsageError(
                "checkpoints= needs one checkpoint besides the audited weights, found none; pass earlier ones with "
                "their learning rates, or leave checkpoints= out"
            )
        self.steps = len(self.states) - 1
        self.marks = list(range(self.steps + 1))
        self.visits = self.steps * len(subject.train)
        self.warnings = [
            f"Only {len(self.states)} checkpoints of the training are known: what lies between them is credited by "
            "gradients at the checkpoints, the rest is unexplained."
        ]

    @cached_property
    def behind(self) -> Tensor:
        """Nothing is averaged, (S,)."""
        return torch.zeros(self.steps, dtype=torch.float64)

    def final(self) -> Tensor:
        """The audited weights, (P,)."""
        return self.states[-1]

    def snapshot(self, step: int) -> Snapshot:
        """One of the checkpoints."""
        none = torch.zeros_like(self.sizes)
        return Snapshot(step, self.states[step], {}, none, none.double())

    def interval(self, subject: Subject, flat: FlatModel, start: int) -> Interval:
        """The step between two neighbouring checkpoints: one batch of all examples, in evaluation mode."""
        low, high = (s.to(flat.state.device) for s in self.states[start : start + 2])
        batches = tuple(Batch(ids) for ids in torch.arange(len(subject.train)).split(CHUNK))
        shares = tuple(len(batch) / len(subject.train) for batch in batches)
        resting = tuple(name for name, _ in flat.model.named_modules())
        flat.load(low)
        gradient = torch.zeros_like(low)
        for batch, share in zip(batches, shares, strict=True):
            gradient.add_(batch_gradient(subject, flat, batch, resting), alpha=share)
        moved = (high - low) * (torch.arange(len(low), device=low.device) < flat.parameters)
        gradient = gradient * (moved != 0)
        size = gradient.double().square().sum().clamp_min(1e-300)
        scale = (-(moved.double() @ gradient.double()) / size).clamp_min(0).item()
        rule = StepRule(1.0, 1.0, 0.0, scale * (moved != 0).to(low), 0.0, 1.0, 0.0, 0.0)
        seen = Step(
            batches,
            (self.lr[min(start, len(self.lr) - 1)],),
            Manner((), ({},), resting),
            torch.zeros_like(self.sizes),
            torch.ones(len(self.sizes), dtype=torch.float64),
            torch.full((len(self.sizes),), float("inf"), dtype=torch.float64),
            torch.zeros(len(self.sizes), dtype=torch.float64),
        )
        return Interval([WalkedStep(start, low, seen, rule, shares=shares)], high, 0.0)


def _state(model: nn.Module, checkpoint: Any, k: int) -> Tensor:
    """The state vector of a checkpoint: a file, a state dict, or a module. (P,)."""
    weights = _weights(checkpoint, k)
    parts = []
    for slot in layout(model):
        found = weights.get(slot.name)
        if not isinstance(found, Tensor) or found.shape != slot.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else "nothing"
            raise PathMismatchError(
                f"checkpoint {k} must hold the audited model's weights, {slot.name} has shape {tuple(slot.shape)}, "
                f"found {shape}; pass the state dict of this model"
            )
        parts.append(found.detach().cpu().reshape(-1).to(next(model.parameters()).dtype))
    state = torch.cat(parts)
    if not state.isfinite().all():
        raise NotFiniteError(f"checkpoint {k} must hold finite weights, found NaN or infinity; leave it out")
    return state


def _weights(checkpoint: Any, k: int) -> Mapping[str, Any]:
    if isinstance(checkpoint, (str, Path)):
        try:
            checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UsageError(
                f"checkpoint {k} must be a file that torch.load(weights_only=True) reads, {checkpoint} raised "
                f"{described(error)}; save the model's state_dict() alone"
            ) from error
    if isinstance(checkpoint, nn.Module):
        return checkpoint.state_dict()
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            return checkpoint[key]
    if not isinstance(checkpoint, Mapping):
        raise UsageError(
            f"checkpoint {k} must be a file, a state dict or a module, found {type(checkpoint).__name__}; pass "
            "(model.state_dict(), learning rate)"
        )
    return checkpoint

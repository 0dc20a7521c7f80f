"""Gradients: can the model be taken apart by rows, at its outputs and in a step of its training?"""

from __future__ import annotations

import torch

from brittle.doctor.check import Check, Visit
from brittle.kernel.quadrature import check_outputs
from brittle.kernel.steps import check_step
from brittle.path.checkpoints import Checkpoints
from brittle.path.flat import FlatModel
from brittle.path.forwards import random_state
from brittle.path.observed import Batch, Manner, Step
from brittle.path.rules import StepRule
from brittle.path.walked import WalkedStep

FIRST = 32
"""Training examples in the batch that stands for a training that was not recorded."""


def of_outputs(v: Visit) -> Check:
    """Do output gradients split by rows?"""
    check_outputs(v.subject, FlatModel(v.subject.model, v.device))
    return Check("outputs", "ok", "their gradients split by rows, as plain autograd has them")


def of_step(v: Visit) -> Check:
    """Do the gradients of a training step split by rows?"""
    step = first_step(v)
    check_step(v.subject, FlatModel(v.subject.model, v.device), step)
    recorded = v.path is not None and not isinstance(v.path, Checkpoints)
    where = "of the path's first step" if recorded else f"of a batch of {step.seen.examples} in evaluation mode"
    return Check("step", "ok", f"gradients {where} split by rows, and add up to plain autograd's")


def first_step(v: Visit) -> WalkedStep:
    """The first step of the recorded path; without one, a batch in evaluation mode at the audited weights."""
    if v.path is not None and not isinstance(v.path, Checkpoints):
        return _walked(v, v.path.snapshot(0).state, v.path.step(0))
    return made_step(v, training=False)


def made_step(v: Visit, training: bool) -> WalkedStep:
    """A step on the first training examples at the audited weights, as a recorder would note it."""
    flat = FlatModel(v.subject.model, v.device)
    resting = () if training else tuple(name for name, _ in flat.model.named_modules())
    ids = torch.arange(min(FIRST, len(v.subject.train)))
    nothing = torch.zeros(len(flat.slots), dtype=torch.float64)
    seen = Step(
        batches=(Batch(ids, random=random_state(flat.state.device)),),
        lr=(0.0,),
        manner=Manner((-1,) * len(flat.slots), ({},), resting),
        counts=nothing.long(),
        factors=torch.ones_like(nothing),
        bounds=nothing + torch.inf,
        extra=nothing,
    )
    return _walked(v, flat.state, seen)


def _walked(v: Visit, state: torch.Tensor, seen: Step) -> WalkedStep:
    return WalkedStep(0, state.to(v.device), seen, StepRule(1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0))

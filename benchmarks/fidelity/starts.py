"""Fine-tuning: what happens to a model, in training mode, before the recorded training begins."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Adam

from benchmarks.fidelity.models import logits_of
from benchmarks.fidelity.problem import BATCH, problem


def pretrained(model: nn.Module) -> None:
    """Weights that were trained on other digits, and a fresh last layer."""
    other = problem().other
    optimizer = Adam(model.parameters(), lr=3e-3)
    for ids in torch.arange(len(other)).repeat(8).split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(logits_of(model(other.inputs[ids])), other.targets[ids]).backward()
        optimizer.step()
    optimizer.zero_grad()
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    last.reset_parameters()


def frozen_trunk(model: nn.Module) -> None:
    """The same, and only the last layer learns; normalization before it keeps its statistics."""
    pretrained(model)
    for module in list(model.children())[:-1]:
        module.eval().requires_grad_(False)

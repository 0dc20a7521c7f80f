"""How an optimizer spends gradients: every supported step is linear in them, its observed scales given.

With the gradient g_j, its factor c_j between backward and step, L2 decay l_j and the buffer b_j, step j is

    b_j = beta_j b_{j-1} + gain_j (c_j g_j + l_j w_j)
    D_j = - scale_j (direct_j (c_j g_j + l_j w_j) + held_j b_j) - decoupled_j w_j.

`optimizers` gives the coefficients of each of torch's optimizers: numbers, or one value a coordinate. This module
is what follows from the two lines above: the step forward, and its transpose for the walk back.

Source: Domingos 2020 (arXiv 2012.00152) for the identity that needs it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Coefficient = Tensor | float
"""A number, or one value a coordinate: shape (P,)."""


@dataclass(frozen=True)
class StepRule:
    """The coefficients of one step; see the module's equations."""

    clip: Coefficient
    gain: Coefficient
    beta: Coefficient
    scale: Coefficient
    direct: Coefficient
    held: Coefficient
    l2: Coefficient
    decoupled: Coefficient


def advance(rule: StepRule, buffer: Tensor, gradient: Tensor, decayed: Tensor | None) -> tuple[Tensor, Tensor]:
    """One step: the new buffer and the displacement, both of `gradient`'s shape (..., P).

    `gradient` is not yet clipped; `decayed` are the weights that decay acts on, or None for the share of a
    group of examples, to which no decay is credited. Linear in (buffer, gradient, decayed): the
    displacements of the groups and of the decay add up to the step's.
    """
    spent = scaled(rule.clip, gradient)
    if decayed is not None:
        spent = spent + rule.l2 * decayed
    buffer = scaled(rule.beta, buffer) + scaled(rule.gain, spent)
    moved = scaled(rule.held, buffer)
    if not absent(rule.direct):
        moved = moved + rule.direct * spent
    moved = -rule.scale * moved
    if decayed is not None:
        moved = moved - rule.decoupled * decayed
    return buffer, moved


def pull_back(rule: StepRule, later: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the walk backwards: the transpose of `advance`.

    later: (M, P), the sensitivity of the output to this step's buffer through all later steps; jacobian: (M, P),
    the output's gradient over this step. Returns (credit, earlier): a gradient g_j changed the output by
    -<credit, clip g_j + l2 w_j>, and `earlier` is the sensitivity to the previous step's buffer.
    """
    buffer = plus(later, rule.scale * rule.held, jacobian)
    credit = scaled(rule.gain, buffer)
    if not absent(rule.direct):
        credit = plus(credit, rule.scale * rule.direct, jacobian)
    return credit, scaled(rule.beta, buffer)


def plus(values: Tensor, by: Coefficient, more: Tensor) -> Tensor:
    """values + by * more, in one pass over them. values, more: (M, P)."""
    return torch.addcmul(values, by, more) if isinstance(by, Tensor) else torch.add(values, more, alpha=by)


def scaled(by: Coefficient, values: Tensor) -> Tensor:
    """`by` times `values`, without a pass over them where that changes nothing."""
    return values if isinstance(by, float) and by == 1 else by * values


def absent(coefficient: Coefficient) -> bool:
    """Whether a coefficient is zero everywhere."""
    return isinstance(coefficient, float) and coefficient == 0

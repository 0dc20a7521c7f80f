"""What a gradient spent at a step did to the outputs through all later steps, walked back step by step.

The transpose of the optimizer (`path.rules.pull_back`) takes the averaged output gradient J of the segment in hand and
what later steps held. Where its coefficients are numbers (SGD), large linear weights stay of low rank: within a segment
their credit is c_0 J + c_1 E, with E what was held when the segment was entered; only c moves from step to step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from brittle.kernel.gradients import Span
from brittle.kernel.lowrank import LowRank, added
from brittle.kernel.mixed import Layout, Mixed
from brittle.path.rules import StepRule, pull_back

IN_HAND = torch.tensor([1.0, 0.0])
"""J itself, as coefficients of J and E."""


class Credit:
    """The credit of M outputs. Its `layout` becomes plain where terms are too many, or a rule is not plain.

    left_out: share of a matrix's norm that may be left out for fewer terms.
    """

    def __init__(self, layout: Layout, rows: int, like: Tensor, left_out: float) -> None:
        self._left_out = left_out
        self._held = Mixed(layout, like.new_zeros(rows, layout.width), {})
        self._jacobian, self._coefficients = self._held, torch.zeros(2)
        self._terms: Mapping[Span, LowRank] = {}

    @property
    def layout(self) -> Layout:
        return self._held.layout

    def enter(self, jacobian: Mixed) -> None:
        """Begin a segment, later ones being done. jacobian: J of the segment."""
        held = replace(self._held, low=self._weighed()).shortened(self._left_out)
        jacobian = jacobian.shortened(self._left_out)
        self._begin(jacobian, held)
        if any(terms.dear for terms in self._terms.values()):
            self._begin(jacobian.multiplied_out(), held.multiplied_out())

    def back(self, rule: StepRule, jacobian: Mixed | None = None) -> Mixed:
        """Walk back over one step of the segment: a gradient g spent there changed the outputs by -<credit, clip g>.

        jacobian: in place of the segment's.
        """
        if self._terms and not plain(rule):
            held = replace(self._held, low=self._weighed())
            self._begin(self._jacobian.multiplied_out(), held.multiplied_out())
        dense, later = pull_back(rule, self._held.dense, (jacobian or self._jacobian).dense)
        self._held = replace(self._held, dense=later)
        if not self._terms:
            return Mixed(self.layout, dense, {})
        coefficients, self._coefficients = pull_back(rule, self._coefficients, IN_HAND)
        return Mixed(self.layout, dense, self._weighed(coefficients))

    def _begin(self, jacobian: Mixed, held: Mixed) -> None:
        self._jacobian, self._held, self._coefficients = jacobian, held, torch.tensor([0.0, 1.0])
        self._terms = {
            span: added([part, held.low[span]]) if span in held.low else part for span, part in jacobian.low.items()
        }

    def _weighed(self, coefficients: Tensor | None = None) -> dict[Span, LowRank]:
        """c_0 J + c_1 E, with the coefficients of what is held by default."""
        in_hand, held = (self._coefficients if coefficients is None else coefficients).tolist()
        out = {}
        for span, terms in self._terms.items():
            factors = terms.g.new_full((terms.rank, 1), held)
            factors[: self._jacobian.low[span].rank] = in_hand
            out[span] = LowRank(terms.g * factors, terms.a)
        return out


def plain(rule: StepRule) -> bool:
    """Whether all coefficients are numbers."""
    return not any(isinstance(value, Tensor) for value in vars(rule).values())

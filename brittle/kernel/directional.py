"""How far outputs move with the weights: <J(x), U_k> for R inputs and K displacements of the weights, one of two ways.

    backward    one pass forward and one back give J in factors, which are multiplied with every U_k (`factors`)
    forward     one pass forward that carries K tangents U_k along: what comes in changes, and so do the weights

With F multiplications in a plain pass of one input and P weights, an input takes about

    backward    6 F + K P            forward    (3 + 2.5 K) F

(the small numbers were measured on a CNN). So forward mode is the cheaper way for a single displacement, and where most
weights rest most of the time: tables of embeddings, P >> F. It is taken only where it finds what the other way finds:
batch normalization, for one, is not differentiated in its running statistics.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from brittle.errors import SubjectError
from brittle.kernel.factors import against, factors_of
from brittle.kernel.gradients import AGREEMENT
from brittle.kernel.quadrature import CHECKED
from brittle.path.flat import FlatModel
from brittle.records import Pairs
from brittle.subject import Subject

BACKWARD = 6.0
FORWARD, TANGENT = 3.0, 2.5
"""Plain passes that a pass back with its products takes, and a pass forward with each of its tangents."""


class Directional:
    """<J(x), U_k> along displacements of a subject's weights."""

    def __init__(self, subject: Subject, device: str = "cpu") -> None:
        self._subject, self.flat = subject, FlatModel(subject.model, device)
        self._whole = Margin(subject, self.flat.eval())

    def __call__(self, state: Tensor, moved: Tensor, inputs: Tensor, pairs: Pairs) -> Tensor:
        """The margins' change along displacements, to first order.

        Args:
            state: where on the path, (P,).
            moved: displacements, (K, P); those that are zero cost nothing.
            inputs: raw inputs, (R, *input).

        Returns:
            <J, U>, logits, (R, K).
        """
        live = (moved != 0).any(1)
        out = moved.new_zeros(len(inputs), len(moved))
        if live.any():
            moved = moved if live.all() else moved[live]
            way = self.forward if self._forward_pays(len(moved)) else self.backward
            out[:, live] = way(state, moved, inputs, pairs)
        return out

    def backward(self, state: Tensor, moved: Tensor, inputs: Tensor, pairs: Pairs) -> Tensor:
        """By one pass back."""
        self.flat.load(state)
        x, sign = inputs.to(self.flat.state), signs(pairs, self._subject.classes).to(self.flat.state)
        factors = factors_of(self.flat, lambda: self._whole(x, sign).sum(), len(x))
        return against(self.flat, moved, factors).T

    @torch.no_grad()
    def forward(self, state: Tensor, moved: Tensor, inputs: Tensor, pairs: Pairs) -> Tensor:
        """By one pass forward with as many tangents as displacements."""
        x, sign = inputs.to(self.flat.state), signs(pairs, self._subject.classes).to(self.flat.state)
        at = named(self.flat, state.to(x))

        def change(tangents: dict[str, Tensor]) -> Tensor:
            run = lambda values: torch.func.functional_call(self._whole, values, (x, sign))  # noqa: E731
            return torch.func.jvp(run, (at,), (tangents,))[1]

        with sdpa_kernel(SDPBackend.MATH):  # attention's others have no forward mode
            return torch.func.vmap(change)(named(self.flat, moved)).T

    def _forward_pays(self, k: int) -> bool:
        f = self.multiplications
        return (FORWARD + TANGENT * k) * f < BACKWARD * f + k * len(self.flat) and self.forward_agrees

    @cached_property
    def multiplications(self) -> float:
        """F: of one input in a plain pass forward; those of matrices and convolutions, at least one a weight's use."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self._subject.class_logits(self.flat.eval(), self._subject.train.inputs[:1].to(self.flat.state))
        return max(counter.get_total_flops() / 2, 1.0)

    @cached_property
    def forward_agrees(self) -> bool:
        """Whether both ways find the same on a few training examples: along the weights and running statistics."""
        x = self._subject.train.inputs[:CHECKED]
        state = self.flat.state.clone()
        pairs = Pairs.of(self._subject.class_logits(self.flat.eval(), x.to(state)).detach().cpu())
        expected = self.backward(state, state[None], x, pairs)
        try:
            found = self.forward(state, state[None], x, pairs)
        except (RuntimeError, SubjectError):  # a module without forward mode
            return False
        return bool((found - expected).norm() <= AGREEMENT * expected.norm())


class Margin(nn.Module):
    """Logits times `sign`, summed, row by row; with the model as a child, whose tensors can be replaced by name."""

    def __init__(self, subject: Subject, model: nn.Module) -> None:
        super().__init__()
        self.model, self._subject = model, subject

    def forward(self, x: Tensor, sign: Tensor) -> Tensor:
        return (self._subject.class_logits(self.model, x) * sign).sum(1)


def signs(pairs: Pairs, classes: int) -> Tensor:
    """1 at each pair's predicted class and -1 at its rival, (R, C)."""
    return F.one_hot(pairs.predicted, classes) - F.one_hot(pairs.rival, classes)


def named(flat: FlatModel, state: Tensor, parameters: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of `Margin` by name, views of a state (..., P); of `parameters`, where these are given apart."""
    own = lambda slot: state if slot.buffer or parameters is None else parameters  # noqa: E731
    shaped = lambda v, slot: v[..., slot.start : slot.stop].reshape(*v.shape[:-1], *slot.shape)  # noqa: E731
    return {f"model.{slot.name}": shaped(own(slot), slot) for slot in flat.slots}

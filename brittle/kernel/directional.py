"""How far outputs move with the weights: <J(x), U_k> for R inputs and K displacements of the weights.

J is the average over a short line, by its middle and by its `kinks`; the products are taken in one of two ways:

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
from brittle.kernel.kinks import Averaged, kinks_of
from brittle.kernel.quadrature import CHECKED
from brittle.path.flat import FlatModel
from brittle.records import Pairs
from brittle.subject import Subject

BACKWARD = 6.0
FORWARD, TANGENT = 3.0, 2.5
"""Plain passes that a pass back with its products takes, and a pass forward with each of its tangents."""


class Directional:
    """<J(x), U_k> on average over lines of a subject's path; `flat` is the model that moves along it."""

    def __init__(self, subject: Subject, device: str = "cpu") -> None:
        self.subject, self.flat = subject, FlatModel(subject.model, device)
        self.whole = Margin(subject, self.flat.eval())

    def at(self, inputs: Tensor, pairs: Pairs) -> Carried:
        """Some inputs (R, *input) with their outputs, to be carried along the path."""
        x = inputs.to(self.flat.state)
        return Carried(self, x, signs(pairs, self.subject.classes).to(x))

    def forward_pays(self, k: int) -> bool:
        """Whether k displacements take less work forward than backward, and can be taken so."""
        f = self.multiplications
        return (FORWARD + TANGENT * k) * f < BACKWARD * f + k * len(self.flat) and self.forward_agrees

    @cached_property
    def multiplications(self) -> float:
        """F: of one input in a plain pass forward; those of matrices and convolutions, at least one."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.subject.class_logits(self.flat.model, self.subject.train.inputs[:1].to(self.flat.state))
        return max(counter.get_total_flops() / 2, 1.0)

    @cached_property
    def forward_agrees(self) -> bool:
        """Whether both ways find the same on a few training examples: along the weights and running statistics."""
        x, state = self.subject.train.inputs[:CHECKED], self.flat.state.clone()
        pairs = Pairs.of(self.subject.class_logits(self.flat.model, x.to(state)).detach().cpu())
        carried = self.at(x, pairs)
        expected = carried.backward(state, state, state[None])
        try:
            found = carried.forward(state, state, state[None])
        except (RuntimeError, SubjectError):  # a module without forward mode
            return False
        return bool((found - expected).norm() <= AGREEMENT * expected.norm())


class Carried:
    """Some inputs that are carried along the path, line after line."""

    def __init__(self, along: Directional, x: Tensor, sign: Tensor) -> None:
        self._along, self._x, self._sign = along, x, sign
        self._last: tuple[Tensor, list[Tensor]] | None = None  # a state, and what goes into each ReLU there

    def __call__(self, low: Tensor, high: Tensor, moved: Tensor) -> Tensor:
        """The margins' change along displacements, to first order, on average over a short line.

        Args:
            low, high: the states at its ends, (P,); a line that begins with the tensor at which the last one ended
                saves a pass.
            moved: displacements, (K, P); those that are zero cost nothing.

        Returns:
            <J, U>, logits, (R, K).
        """
        live = (moved != 0).any(1)
        out = moved.new_zeros(len(self._x), len(moved))
        if live.any():
            moved = moved if live.all() else moved[live]
            way = self.forward if self._along.forward_pays(len(moved)) else self.backward
            out[:, live] = way(low, high, moved)
        return out

    def backward(self, low: Tensor, high: Tensor, moved: Tensor) -> Tensor:
        """By one pass back."""
        ends = self._kinks(low), self._kinks(high)
        flat = self._along.flat
        flat.load(torch.lerp(low, high, 0.5))

        def margins() -> Tensor:
            with Averaged(*ends):
                return self._along.whole(self._x, self._sign).sum()

        return against(flat, moved, factors_of(flat, margins, len(self._x))).T

    @torch.no_grad()
    def forward(self, low: Tensor, high: Tensor, moved: Tensor) -> Tensor:
        """By one pass forward with as many tangents as displacements."""
        ends = self._kinks(low), self._kinks(high)
        flat, whole = self._along.flat, self._along.whole

        def margins(values: dict[str, Tensor]) -> Tensor:
            with Averaged(*ends):
                return torch.func.functional_call(whole, values, (self._x, self._sign))

        def change(tangents: dict[str, Tensor]) -> Tensor:
            return torch.func.jvp(margins, (named(flat, torch.lerp(low, high, 0.5).to(self._x)),), (tangents,))[1]

        with sdpa_kernel(SDPBackend.MATH):  # attention's others have no forward mode
            return torch.func.vmap(change)(named(flat, moved)).T

    def _kinks(self, state: Tensor) -> list[Tensor]:
        if self._last is None or self._last[0] is not state:
            self._along.flat.load(state)
            self._last = state, kinks_of(lambda: self._along.whole(self._x, self._sign))
        return self._last[1]


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

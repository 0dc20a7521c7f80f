"""The kernel machine that a network is approximately, fitted anew: a second opinion on every prediction.

A network learned by gradient descent predicts by its path kernel (Domingos 2020, arXiv 2012.00152). Training stops long
before the data are used up, and spends most of itself on the kernel's largest directions. The ridge regression of the
training labels in the same kernel weighs all its directions alike, down to a floor: it is the path kernel, whitened.
Where it disagrees with the network, the network's prediction does not rest on what its own kernel says of the data.

    k(x, y) = mean over states s of  sum over weights l of  < d_l(x), d_l(y) > / mean_i |d_l(x_i)|^2

with d_l(x) the gradient of u . logits(x) in weight l at state s, u one fixed random direction in the outputs, so that
no label and no predicted class enters. Every tensor of at least two dimensions has the same weight: whitening begins
with the layers.

For N training examples m landmarks among them span the regression (Nystroem): with K_Nm, K_mm centred, and labels Y,

    B = argmin |K_Nm B - Y|^2 + c tr(B' K_mm B),        opinion at x:  k(x, landmarks) B,   shape (C,)

Sources: Neural Tangent Kernel, A. Jacot, F. Gabriel, C. Hongler, 2018, arXiv 1806.07572; Using the Nystroem Method to
Speed Up Kernel Machines, C. Williams, M. Seeger, NIPS 2000.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.kernel.factors import Factors, factors_of, inner, ready
from brittle.kernel.gradients import Span
from brittle.kernel.outer import Outer, Part, formed
from brittle.kernel.quadrature import blocks, check_outputs
from brittle.path.flat import FlatModel
from brittle.records import Progress
from brittle.subject import Subject

LANDMARKS, BLOCK = 1_500, 250
FLOOR = 1e-4
"""c over the trace of the kernel of the training examples."""

ROUNDING = 1e-7
"""Share of the landmarks' largest eigenvalue below which a direction is rounding."""


@dataclass(frozen=True)
class Point:
    """The landmarks' gradients at one state, and the mean square of each tensor's."""

    state: Tensor  # shape: (P,)
    factors: Factors
    size: dict[Span, float]


class Machine:
    """The kernel between any inputs and m landmarks among the training examples, and regressions in it.

    Args:
        states: of the path, (P,) each, in the order of `FlatModel`.
        generator: draws the landmarks and the direction u.

    Raises `UnsupportedError` where the model cannot be taken apart by examples.
    """

    def __init__(
        self,
        subject: Subject,
        states: Sequence[Tensor],
        generator: torch.Generator,
        landmarks: int = LANDMARKS,
        device: str = "cpu",
    ) -> None:
        self._subject, self._flat = subject, FlatModel(subject.model, device)
        check_outputs(subject, self._flat)
        wide = [slot for slot in self._flat.slots if not slot.buffer and len(slot.shape) > 1]
        self._tensors = {(slot.start, slot.stop) for slot in wide}
        self._direction = torch.randn(subject.classes, generator=generator).to(self._flat.state)
        self.landmarks = torch.randperm(len(subject.train), generator=generator)[:landmarks]
        inputs = subject.train.inputs[self.landmarks]
        self._points = [self._point(state, inputs) for state in states]

    def kernel(self, inputs: Tensor, progress: Progress | None = None) -> Tensor:
        """k(x, landmarks): (R, *input) -> (R, m).

        Cost: a forward and a backward pass an input and state, and R m products of row gradients, in factors.
        """
        out = self._flat.state.new_zeros(len(inputs), len(self.landmarks))
        for k, point in enumerate(self._points):
            for rows in blocks(len(inputs), BLOCK):
                own = self._factors(point.state, inputs[rows])
                for span, size in point.size.items():
                    out[rows] += inner(own.parts[span], point.factors.parts[span]) / (size * len(self._points))
                if progress:
                    progress(k * len(inputs) + rows.stop, len(self._points) * len(inputs))
        return out.cpu()

    def _point(self, state: Tensor, inputs: Tensor) -> Point:
        parts = [self._factors(state, inputs[rows]) for rows in blocks(len(inputs), BLOCK)]
        found = Factors(len(inputs), {span: _joined([part.parts[span] for part in parts]) for span in parts[0].parts})
        square = {span: _mean_square(part) for span, part in found.parts.items() if span in self._tensors}
        made = ready(found, BLOCK, -(-len(self._subject.train) // BLOCK))
        return Point(state, made, {span: size for span, size in square.items() if size > 0})

    def _factors(self, state: Tensor, inputs: Tensor) -> Factors:
        self._flat.load(state)
        model, x = self._flat.eval(), inputs.to(self._flat.state)
        return factors_of(self._flat, lambda: (self._subject.class_logits(model, x) @ self._direction).sum(), len(x))


@dataclass(frozen=True)
class Axes:
    """The principal directions of the training examples in the span of the landmarks.

    A place is (k(x, landmarks) - centre) @ axes, (D,); over the training examples its mean is 0, and its mean squares
    are the `spectrum`.
    """

    axes: Tensor  # shape: (m, D)
    centre: Tensor  # shape: (m,)
    spectrum: Tensor  # shape: (D,), falling

    def places(self, kernel: Tensor) -> Tensor:
        """kernel: (R, m) -> (R, D), float64."""
        return (kernel.double() - self.centre) @ self.axes

    def regression(self, places: Tensor, targets: Tensor, floor: float = FLOOR) -> Tensor:
        """Ridge coefficients of targets (N, K) whose mean is taken out: (D, K). c = floor x trace."""
        pulled = places.T @ (targets.double() - targets.double().mean(0)) / len(places)
        return pulled / (self.spectrum + floor * self.spectrum.sum())[:, None]

    def novelty(self, places: Tensor, floor: float = FLOOR) -> Tensor:
        """Squared distance from the training examples' centre, every direction measured by its spectrum: (R,)."""
        return (places**2 / (self.spectrum + floor * self.spectrum.sum())).sum(1)


def principal(kernel: Tensor, landmarks: Tensor) -> Axes:
    """kernel: of the training examples, (N, m); landmarks: their rows in it, (m,)."""
    among = kernel[landmarks].double()
    values, vectors = torch.linalg.eigh((among + among.T) / 2)
    kept = values > ROUNDING * values[-1]
    root = vectors[:, kept] / values[kept].sqrt()  # among @ root @ root.T is the identity on what is kept
    centre = kernel.double().mean(0)
    spread = (kernel.double() - centre) @ root
    spectrum, turn = torch.linalg.eigh(spread.T @ spread / len(kernel))
    return Axes(root @ turn.flip(1), centre, spectrum.clamp_min(0).flip(0))


def _joined(parts: Sequence[Part]) -> Part:
    """The rows of several batches, one after the other."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    outer = [part for part in parts if isinstance(part, Outer)]
    return Outer(torch.cat([p.g for p in outer]), torch.cat([p.inputs for p in outer]), first.window)


def _mean_square(part: Part) -> float:
    rows = blocks(len(part), BLOCK)
    total = sum(formed(part[r]).double().pow(2).sum().item() for r in rows)
    return total / len(part)

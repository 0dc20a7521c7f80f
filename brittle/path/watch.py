"""By how much gradients shrink between backward and step: one factor for all, or it is refused.

Clipping by norm multiplies every gradient by one factor c, which the path kernel takes as observed. Clipping by
value, accumulation over several backward passes, and gradients that were written by hand are no such factor. With
two norms of every parameter's gradient g, as it came out of backward, and of the gradient g' that the optimizer gets,

    |g'|_2 / |g|_2 = |g'|_inf / |g|_inf = c        for every parameter, or the step is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from brittle.errors import NotFiniteError, UnsupportedError

TOLERANCE = 1e-4
"""Relative spread of the factors up to which they count as one."""

NEGLIGIBLE = 1e-7
"""Share of the largest norm below which a gradient's own factor is rounding."""


class GradientWatch:
    """Notes the gradients of named parameters as backward delivers them; `factor` reads and forgets them."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._raw: dict[str, Tensor] = {}
        self._hooks = [p.register_hook(self._note(name)) for name, p in parameters.items()]

    def factor(self) -> float:
        """The one factor between backward and step.

        Raises:
            UnsupportedError: where a gradient is missing or sparse, or was changed by more than one factor.
            NotFiniteError: where a gradient is not finite.
        """
        pairs = [(self._raw_norms(name), _norms(self._given(name, p))) for name, p in self._parameters.items()]
        self._raw.clear()
        if not pairs:
            return 1.0
        raw, given = (torch.stack(side).double().cpu() for side in zip(*pairs, strict=True))  # shape: (tensors, 2)
        if not (raw.isfinite().all() and given.isfinite().all()):
            raise NotFiniteError("gradients must be finite, found NaN or infinity; the training diverged")
        counts = raw > NEGLIGIBLE * raw.amax(0)
        if not counts.any():
            return 1.0
        factors = (given[counts] / raw[counts]).sort().values
        middle = factors[len(factors) // 2].item()
        if (factors[-1] - factors[0]).item() > TOLERANCE * middle:
            raise UnsupportedError(
                "gradients may only be scaled by one factor between backward and step (clipping by norm), found "
                f"factors from {factors[0]:.4g} to {factors[-1]:.4g}; clipping by value and gradient accumulation "
                "cannot be accounted for yet"
            )
        return 1.0 if abs(middle - 1) < 1e-6 else middle

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    def _note(self, name: str) -> Callable[[Tensor], None]:
        def note(gradient: Tensor) -> None:
            if not gradient.is_sparse:
                self._raw[name] = _norms(gradient)

        return note

    def _given(self, name: str, parameter: nn.Parameter) -> Tensor:
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise UnsupportedError(f"sparse gradients cannot be accounted for, found one in {name}; use sparse=False")
        if parameter.grad is None or name not in self._raw:
            raise UnsupportedError(
                f"every trained parameter needs a gradient from backward() in every step, {name} has none; freeze it "
                "with requires_grad_(False) before the Recorder is made, or keep it out of the optimizer"
            )
        return parameter.grad

    def _raw_norms(self, name: str) -> Tensor:
        return self._raw.get(name, torch.zeros(2))


@torch.no_grad()
def _norms(gradient: Tensor) -> Tensor:
    """Euclidean and largest norm, shape (2,)."""
    exact = torch.promote_types(gradient.dtype, torch.float32)
    norms = [torch.linalg.vector_norm(gradient.detach(), order, dtype=exact) for order in (2, float("inf"))]
    return torch.stack(norms)

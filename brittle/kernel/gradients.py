"""Gradients row by row: how each row of a batch pulls on the weights, from one backward pass.

For a scalar L of a batch, row i's gradient is the part of dL/dw that passes through its own activations (the
*row split*): the rows add up to dL/dw, with batch statistics included. For a linear layer it is the outer
product of the row's output gradient and its input, and so on (`layers`). Nothing is kept but (B, P) numbers.

The row split differs from the gradient of each row's own loss term only where rows see each other (batch
normalization in training mode). It takes the model apart at its modules, which it cannot see through: a weight that
is used outside its module's own call, or a module whose first axis is not the batch. `check_rows` and `check_sum`
hold the rows against plain autograd, so that such a model is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from brittle.errors import UnsupportedError
from brittle.kernel.layers import Call, units, weight_gradients
from brittle.path.flat import FlatModel

Scalar = Callable[[], Tensor]
"""Runs the flat model and returns the scalar whose gradient is wanted."""

AGREEMENT = 1e-3
"""Relative distance from plain autograd up to which a parameter's rows count as equal."""

ROUNDING = 100
"""Units in the last place below which the sum of a batch's row gradients is rounding."""


def row_gradients(flat: FlatModel, scalar: Scalar, rows: int) -> Tensor:
    """Gradient of `scalar()` through each row of the batch, with respect to the state.

    Args:
        flat: the model at the point of the path where gradients are wanted.
        scalar: computes the scalar from a batch of `rows` rows through `flat.model`.
        rows: B.

    Returns:
        (B, P). Columns of buffers hold the gradient with respect to running statistics (evaluation mode).

    Raises:
        UnsupportedError: where a module with parameters mixes rows in a way that cannot be split.
    """
    out = flat.state.new_zeros(rows, len(flat))
    for call in _record(flat.model, scalar):
        if any(g.shape[:1] != (rows,) for g in call.upstream.values()):
            found = next(tuple(g.shape) for g in call.upstream.values() if g.shape[:1] != (rows,))
            raise UnsupportedError(
                f"every module with parameters must return one row an example, {call} returned shape {found} for "
                f"{rows} inputs; keep the batch as the first axis of what goes in and out of it"
            )
        if call.upstream:
            for leaf, gradient in weight_gradients(call).items():
                out[:, flat.columns[call.column(leaf)]] += gradient.reshape(rows, -1)
    return out


def without_rounding(rows: Tensor) -> Tensor:
    """Row gradients (B, P) with 0 where they cancel to rounding: there the batch has no gradient to share out.

    So it is with a bias before batch normalization, which takes the mean away. Left alone, the rows' large and
    opposite shares would be blown up by Adam, whose preconditioner is as small as their sum.
    """
    rounding = ROUNDING * torch.finfo(rows.dtype).eps * rows.abs().sum(0)
    return rows * (rows.sum(0).abs() > rounding)


def check_rows(flat: FlatModel, values: Scalar) -> None:
    """Hold the row gradients of `values()` (B,), each a function of its own row, against plain autograd.

    Raises `UnsupportedError` that names the first parameter that differs.
    """
    count = len(values())
    rows = row_gradients(flat, lambda: values().sum(), count)
    plain = [flat.gradient(lambda row=row: values()[row]) for row in range(count)]  # type: ignore[misc]
    _compare(flat, rows, torch.stack(plain))


def check_sum(flat: FlatModel, rows: Tensor, whole: Tensor) -> None:
    """Hold the sum of row gradients (B, P) against the batch's gradient (P,). Raises `UnsupportedError`."""
    _compare(flat, rows.sum(0, keepdim=True), whole[None])


def _compare(flat: FlatModel, found: Tensor, expected: Tensor) -> None:
    total = expected[:, : flat.parameters].norm()
    for slot in flat.slots:
        off, size = ((t[:, slot.start : slot.stop]).norm() for t in (found - expected, expected))
        if not slot.buffer and not off <= AGREEMENT * size + AGREEMENT**2 * total:
            raise UnsupportedError(
                f"gradients must split by examples, those of {slot.name} do not add up to plain autograd's; use the "
                "weight only inside its own module's forward, and keep the batch as the first axis"
            )


def _record(model: nn.Module, scalar: Scalar) -> list[Call]:
    """Run `scalar` and its backward pass; note each call of a module with parameters of its own."""
    calls: list[Call] = []

    def forward_hook(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not torch.is_grad_enabled():  # a trunk that the model itself keeps from learning
                return output
            calls.append(Call(name, module, args, kwargs))
            leaves, spec = pytree.tree_flatten(output)
            return pytree.tree_unflatten([_watched(leaf, calls[-1], k) for k, leaf in enumerate(leaves)], spec)

        return hook

    with torch.enable_grad():
        hooks = [m.register_forward_hook(forward_hook(n), with_kwargs=True) for n, m in units(model)]
        try:
            scalar().backward()
        finally:
            for hook in hooks:
                hook.remove()
    return calls


def _watched(leaf: Any, call: Call, k: int) -> Any:
    """Output number k of a call, its gradient being noted as soon as backward reaches it."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    if not leaf.requires_grad:  # the weights ask for no gradient: the first module begins the graph
        leaf = leaf.detach().requires_grad_(True).clone()
    leaf.register_hook(lambda g: call.upstream.update({k: g.detach()}))
    return leaf

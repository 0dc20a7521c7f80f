"""Gradients row by row: how each row of a batch pulls on the weights, from one backward pass.

For a scalar L of a batch, row i's gradient is the part of dL/dw that passes through its own activations (the
*row split*): the rows add up to dL/dw, with batch statistics included. For a linear layer it is the outer
product of the row's output gradient and its input; for a convolution the same over unfolded positions; any
other module that owns parameters is differentiated row by row. Nothing is kept but (B, P) numbers.

The row split differs from the gradient of each row's own loss term only where rows see each other (batch
normalization in training mode).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brittle.errors import UnsupportedError
from brittle.path.flat import FlatModel

Scalar = Callable[[], Tensor]
"""Runs the flat model and returns the scalar whose gradient is wanted."""


@dataclass
class Call:
    """One call of a module that owns parameters: what went in, and the gradient at what came out."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    upstream: Tensor | None = None  # shape: (B, *output)


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
    calls = _record(flat.model, scalar)
    out = flat.state.new_zeros(rows, len(flat))
    columns = {slot.name: slice(slot.start, slot.stop) for slot in flat.slots}
    for call in calls:
        if call.upstream is None:
            continue
        if call.upstream.shape[0] != rows:
            raise UnsupportedError(
                f"every module with parameters must keep one row an example: {call.name or 'the model'} returned "
                f"{call.upstream.shape[0]} rows for {rows} inputs"
            )
        for leaf, gradient in _rule_for(call.module)(call).items():
            out[:, columns[f"{call.name}.{leaf}" if call.name else leaf]] += gradient.reshape(rows, -1)
    return out


def _record(model: nn.Module, scalar: Scalar) -> list[Call]:
    """Run `scalar` and its backward pass; note each call of a module with parameters of its own."""
    calls: list[Call] = []

    def forward_hook(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            call = Call(name, module, args, kwargs)
            calls.append(call)
            if not first.requires_grad:  # the weights ask for no gradient: the first module begins the graph
                first = first.detach().requires_grad_(True).clone()
            first.register_hook(lambda g: setattr(call, "upstream", g.detach()))
            return (first, *output[1:]) if isinstance(output, tuple) else first

        return hook

    with torch.enable_grad():
        hooks = [m.register_forward_hook(forward_hook(n), with_kwargs=True) for n, m in units(model)]
        try:
            scalar().backward()
        finally:
            for hook in hooks:
                hook.remove()
    return calls


def units(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that own parameters themselves; one inside another such module belongs to that one's call."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) or next(module.parameters(recurse=False), None) is not None:
            found.append((name, module))
    whole = [name for name, module in found if isinstance(module, nn.MultiheadAttention)]
    return [(n, m) for n, m in found if not any(n != w and n.startswith(w + ".") for w in whole)]


def _rule_for(module: nn.Module) -> Callable[[Call], dict[str, Tensor]]:
    kind = type(module)
    if kind is nn.Linear:
        return _linear
    if kind in (nn.Conv1d, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return _convolution
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return _batch_norm
    return _any_module


def _linear(call: Call) -> dict[str, Tensor]:
    """W: sum over positions t of g_t a_t^T."""
    g, a = _upstream(call), call.args[0].detach()
    if g.dim() == 2:
        out = {"weight": g[:, :, None] * a[:, None, :]}
    else:
        out = {"weight": torch.einsum("b...o,b...i->boi", g, a)}
    if call.module.bias is not None:
        out["bias"] = g.flatten(1, -2).sum(1) if g.dim() > 2 else g
    return out


def _convolution(call: Call) -> dict[str, Tensor]:
    """W: sum over positions of g times the unfolded input, group by group."""
    conv, g, a = call.module, _upstream(call), call.args[0].detach()
    assert isinstance(conv, (nn.Conv1d, nn.Conv2d))
    kernel, stride, padding, dilation = (_two(v) for v in (conv.kernel_size, conv.stride, conv.padding, conv.dilation))
    if isinstance(conv, nn.Conv1d):
        g, a = g[:, :, None], a[:, :, None]
        padding = (0, padding[1])
        stride, dilation, kernel = (1, stride[1]), (1, dilation[1]), (1, kernel[1])
    b, k = len(a), conv.groups
    unfolded = F.unfold(a, kernel, dilation, padding, stride)  # shape: (B, d, positions)
    d = unfolded.shape[1] // k
    left = g.reshape(b * k, -1, unfolded.shape[2])
    right = unfolded.reshape(b * k, d, -1)
    out = {"weight": torch.bmm(left, right.transpose(1, 2))}
    if conv.bias is not None:
        out["bias"] = g.flatten(2).sum(2)
    return out


def _batch_norm(call: Call) -> dict[str, Tensor]:
    """gamma: sum of g x_hat, beta: sum of g; running mean and variance in evaluation mode."""
    norm, g, a = call.module, _upstream(call), call.args[0].detach()
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    over = tuple(range(2, g.dim()))
    total = lambda t: t.sum(over) if over else t  # noqa: E731
    frozen = not norm.training and norm.running_mean is not None
    mean, variance = (norm.running_mean, norm.running_var) if frozen else (None, None)
    x_hat = F.batch_norm(a, mean, variance, training=not frozen, eps=norm.eps)
    out = {"weight": total(g * x_hat), "bias": total(g)} if norm.affine else {}
    if frozen:
        assert norm.running_var is not None
        root = (norm.running_var + norm.eps).sqrt()
        gamma = norm.weight if norm.affine else torch.ones_like(root)
        out["running_mean"] = -total(g) * gamma / root
        out["running_var"] = -0.5 * total(g * x_hat) * gamma / root**2
    return out


def _any_module(call: Call) -> dict[str, Tensor]:
    """Any module whose rows do not see each other: its own vector-Jacobian product, row by row."""
    module, g = call.module, _upstream(call)
    deep = isinstance(module, nn.MultiheadAttention)
    parameters = {n: p.detach() for n, p in module.named_parameters(recurse=deep)}
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in module.modules()):
        raise UnsupportedError(
            f"{call.name or 'the model'} owns parameters and contains batch normalization in training mode; "
            "move its own parameters into a module of their own"
        )
    flags = [isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == len(g) for v in call.args]
    tensors = [v.detach() for v, f in zip(call.args, flags, strict=True) if f]
    keyed = {k: v.detach() for k, v in call.kwargs.items() if isinstance(v, Tensor) and v.shape[:1] == g.shape[:1]}

    def pull(row: list[Tensor], keyed_row: dict[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
        def run(p: dict[str, Tensor]) -> Tensor:
            rows = iter(row)
            args = tuple(next(rows)[None] if f else v for v, f in zip(call.args, flags, strict=True))
            kwargs = call.kwargs | {k: v[None] for k, v in keyed_row.items()}
            output = torch.func.functional_call(module, p, args, kwargs)
            return output[0] if isinstance(output, tuple) else output

        return torch.func.vjp(run, parameters)[1](upstream[None])[0]

    return torch.func.vmap(pull)(tensors, keyed, g)


def _upstream(call: Call) -> Tensor:
    assert call.upstream is not None
    return call.upstream


def _two(value: Any) -> tuple[int, int]:
    value = value if isinstance(value, tuple) else (value,)
    return (value[0], value[-1])

"""Layer by layer: the gradient of each row of a batch with respect to a module's own weights.

From what went into a call and the gradient g at what came out of it: for a linear layer the outer product of g and
its input, for a convolution the same over unfolded positions, for normalization products with the normalized input;
any other module runs again (`modules`). Products are formed in the state's dtype, whatever the pass ran in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from brittle.kernel.calls import Call
from brittle.kernel.modules import is_whole, run_again


def units(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that own parameters or running statistics; one inside another such whole belongs to its call."""
    wholes = [name for name, module in model.named_modules() if is_whole(module)]
    found = [(name, module) for name, module in model.named_modules() if name in wholes or _owns(module)]
    return [(n, m) for n, m in found if not any(n != w and n.startswith(f"{w}." if w else "") for w in wholes)]


def own_tensors(call: Call) -> list[str]:
    """Full names of the tensors that a call may have gradients for."""
    module, whole = call.module, is_whole(call.module)
    leaves = [n for n, _ in module.named_parameters()] if whole else [*module._parameters, *module._buffers]
    return [call.column(leaf) for leaf in leaves]


def weight_gradients(call: Call) -> dict[str, Tensor]:
    """Gradients by name of the module's own tensors, each (B, *shape), running statistics in evaluation mode included.

    They have the dtype of `call.upstream`. Raises `UnsupportedError` for a module that cannot be run again.
    """
    g = next(iter(call.upstream.values()))
    with torch.autocast(g.device.type, enabled=False):
        return _rule_for(call)(call)


def _owns(module: nn.Module) -> bool:
    statistics = isinstance(module, _NormBase) and module.running_mean is not None
    return statistics or next(module.parameters(recurse=False), None) is not None


def _rule_for(call: Call) -> Callable[[Call], dict[str, Tensor]]:
    module, kind = call.module, type(call.module)
    if len(call.args) != 1 or call.kwargs or "weight" not in module._parameters:
        return run_again
    if kind is nn.Linear:
        return _linear
    if kind in (nn.Conv1d, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return _convolution
    return _normalization if isinstance(module, _BatchNorm) or _frozen(call) else run_again


def _frozen(call: Call) -> bool:
    """Whether a call normalized by running statistics."""
    return isinstance(call.module, _NormBase) and not call.training and call.module.running_mean is not None


def _linear(call: Call) -> dict[str, Tensor]:
    """W: sum over positions t of g_t a_t^T."""
    g, a = _factors(call)
    if g.dim() == 2:
        out = {"weight": g[:, :, None] * a[:, None, :]}
    else:
        out = {"weight": torch.einsum("b...o,b...i->boi", g, a)}
    if call.module.bias is not None:
        out["bias"] = g.flatten(1, -2).sum(1) if g.dim() > 2 else g
    return out


def _convolution(call: Call) -> dict[str, Tensor]:
    """W: sum over positions of g times the unfolded input, group by group."""
    conv, (g, a) = call.module, _factors(call)
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


def _normalization(call: Call) -> dict[str, Tensor]:
    """gamma: sum of g x_hat, beta: sum of g; running mean and variance in evaluation mode."""
    norm, (g, a) = call.module, _factors(call)
    assert isinstance(norm, _NormBase)
    over = tuple(range(2, g.dim()))
    total = lambda t: t.sum(over) if over else t  # noqa: E731
    frozen = _frozen(call)
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


def _factors(call: Call) -> tuple[Tensor, Tensor]:
    """The gradient g at the output and the input a."""
    g = call.upstream[0]
    return g, call.args[0].to(g.dtype)


def _two(value: Any) -> tuple[int, int]:
    value = value if isinstance(value, tuple) else (value,)
    return (value[0], value[-1])

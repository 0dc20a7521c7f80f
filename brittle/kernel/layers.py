"""Layer by layer: the gradient of each row of a batch with respect to a module's own weights.

From what went into a call and the gradient g at what came out of it: for linear layers and convolutions outer products
of g and the input (`outer`), for normalization products with the normalized input; any other module runs again
(`modules`). Products are formed in the state's dtype, whatever the pass ran in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from brittle.kernel.calls import Call
from brittle.kernel.modules import is_whole, run_again
from brittle.kernel.outer import Outer, Part, Window


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


def weight_parts(call: Call) -> dict[str, Part]:
    """Gradients by name of the module's own tensors, running statistics in evaluation mode included.

    Those of a linear layer's or a convolution's weight come in factors, all others formed, (B, p); in the dtype of
    `call.upstream`. Raises `UnsupportedError` for a module that cannot be run again.
    """
    g = next(iter(call.upstream.values()))
    with torch.autocast(g.device.type, enabled=False):
        if outer := outer_of(call):
            bias = {} if call.module.bias is None else {"bias": outer.bias_rows()}
            return {"weight": outer, **bias}
        found = _rule_for(call)(call)
        return {leaf: t.flatten(1) if t.dim() > 1 else t[:, None] for leaf, t in found.items()}


def outer_of(call: Call) -> Outer | None:
    """The weight's gradients in factors, in the dtype of `call.upstream`; None for what is no sum of outer products."""
    if not _is_plain(call) or not _is_outer(call.module):
        return None
    module, (g, a) = call.module, _factors(call)
    if isinstance(module, nn.Linear):
        g, a = (t.flatten(1, -2).transpose(1, 2) if t.dim() > 2 else t[:, :, None] for t in (g, a))
        return Outer(g[:, None], a[:, None])
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    assert not isinstance(module.padding, str)
    kernel, dilation, padding, stride = module.kernel_size, module.dilation, module.padding, module.stride
    if isinstance(module, nn.Conv1d):  # one row of an image
        a, kernel, dilation, padding, stride = a[:, :, None], (1, *kernel), (1, *dilation), (0, *padding), (1, *stride)
    g = g.reshape(len(g), module.groups, -1, g.shape[2:].numel())
    return Outer(g, a, Window(kernel, dilation, padding, stride))


def _owns(module: nn.Module) -> bool:
    statistics = isinstance(module, _NormBase) and module.running_mean is not None
    return statistics or next(module.parameters(recurse=False), None) is not None


def _rule_for(call: Call) -> Callable[[Call], dict[str, Tensor]]:
    if not _is_plain(call):
        return run_again
    return _normalization if isinstance(call.module, _BatchNorm) or _frozen(call) else run_again


def _is_plain(call: Call) -> bool:
    """Whether the module took one input and uses a weight of its own."""
    return len(call.args) == 1 and not call.kwargs and "weight" in call.module._parameters


def _is_outer(module: nn.Module) -> bool:
    if type(module) in (nn.Conv1d, nn.Conv2d):
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def _frozen(call: Call) -> bool:
    """Whether a call normalized by running statistics."""
    return isinstance(call.module, _NormBase) and not call.training and call.module.running_mean is not None


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

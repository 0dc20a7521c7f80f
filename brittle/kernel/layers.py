"""Layer by layer: the gradient of each row of a batch with respect to a module's own weights.

From what went into a call and the gradient g at what came out of it: for a linear layer the outer product of g and
its input, for a convolution the same over unfolded positions, for batch normalization products with the normalized
input; any other module is differentiated one row at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from brittle.blame import described
from brittle.errors import UnsupportedError


@dataclass
class Call:
    """One call of a module that owns parameters: what went in, and the gradient at each tensor that came out."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    upstream: dict[int, Tensor] = field(default_factory=dict)  # each of shape (B, *output)

    def column(self, leaf: str) -> str:
        """The full name of one of the module's tensors."""
        return f"{self.name}.{leaf}" if self.name else leaf

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({type(self.module).__name__})"


def units(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that own parameters or running statistics; one inside another such whole belongs to its call."""
    found = [(name, module) for name, module in model.named_modules() if _whole(module) or _owns(module)]
    wholes = [name for name, module in found if _whole(module)]
    return [(n, m) for n, m in found if not any(n != w and n.startswith(f"{w}." if w else "") for w in wholes)]


def weight_gradients(call: Call) -> dict[str, Tensor]:
    """Gradients by name of the module's own tensors, each (B, *shape), running statistics in evaluation mode included.

    Raises `UnsupportedError` for a module that cannot run on one example at a time.
    """
    return _rule_for(call)(call)


def _owns(module: nn.Module) -> bool:
    statistics = isinstance(module, _BatchNorm) and module.running_mean is not None
    return statistics or next(module.parameters(recurse=False), None) is not None


def _whole(module: nn.Module) -> bool:
    """Whether a module computes with the parameters of its children by itself."""
    return isinstance(module, nn.MultiheadAttention) or parametrize.is_parametrized(module)


def _rule_for(call: Call) -> Callable[[Call], dict[str, Tensor]]:
    module, kind = call.module, type(call.module)
    if len(call.args) != 1 or call.kwargs or "weight" not in module._parameters:
        return _any_module
    if kind is nn.Linear:
        return _linear
    if kind in (nn.Conv1d, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return _convolution
    return _batch_norm if isinstance(module, _BatchNorm) else _any_module


def _linear(call: Call) -> dict[str, Tensor]:
    """W: sum over positions t of g_t a_t^T."""
    g, a = call.upstream[0], call.args[0].detach()
    if g.dim() == 2:
        out = {"weight": g[:, :, None] * a[:, None, :]}
    else:
        out = {"weight": torch.einsum("b...o,b...i->boi", g, a)}
    if call.module.bias is not None:
        out["bias"] = g.flatten(1, -2).sum(1) if g.dim() > 2 else g
    return out


def _convolution(call: Call) -> dict[str, Tensor]:
    """W: sum over positions of g times the unfolded input, group by group."""
    conv, g, a = call.module, call.upstream[0], call.args[0].detach()
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
    norm, g, a = call.module, call.upstream[0], call.args[0].detach()
    assert isinstance(norm, _BatchNorm)
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
    module, rows = call.module, len(next(iter(call.upstream.values())))
    if any(isinstance(m, _BatchNorm) and m.training for m in module.modules()):
        raise UnsupportedError(
            f"a module with parameters of its own may not contain batch normalization in training mode, {call} does; "
            "move its own parameters into a module of their own"
        )
    parameters = {n: p.detach() for n, p in module.named_parameters(recurse=_whole(module))}
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    split = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.shape[:1] == (rows,)]

    def pull(own: list[Tensor], upstream: list[Tensor]) -> dict[str, Tensor]:
        def run(p: dict[str, Tensor]) -> list[Tensor]:
            at = leaves.copy()
            for k, leaf in zip(split, own, strict=True):
                at[k] = leaf[None]
            args, kwargs = pytree.tree_unflatten(at, spec)
            outputs = pytree.tree_leaves(torch.func.functional_call(module, p, args, kwargs))
            return [outputs[k] for k in call.upstream]

        return torch.func.vjp(run, parameters)[1]([g[None] for g in upstream])[0]

    own, upstream = [leaves[k] for k in split], list(call.upstream.values())
    with sdpa_kernel(SDPBackend.MATH):
        try:
            return torch.func.vmap(pull)(own, upstream)
        except Exception:  # what cannot be batched (recurrent layers, values asked for) runs one by one
            return _one_by_one(call, pull, own, upstream)


def _one_by_one(
    call: Call, pull: Callable[..., dict[str, Tensor]], own: list[Tensor], upstream: list[Tensor]
) -> dict[str, Tensor]:
    try:
        rows = [pull([leaf[i] for leaf in own], [g[i] for g in upstream]) for i in range(len(upstream[0]))]
    except Exception as error:
        raise UnsupportedError(
            f"every module with parameters must run on one example at a time, {call} raised {described(error)}; write "
            "it so that it does"
        ) from error
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _two(value: Any) -> tuple[int, int]:
    value = value if isinstance(value, tuple) else (value,)
    return (value[0], value[-1])

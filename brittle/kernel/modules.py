"""Any module, run again: the gradient of each row of a batch with respect to the module's own weights.

The module's own vector-Jacobian product, by the first of three routes that works, in the state's dtype:

    row by row, vectorized    rows must not see each other
    row by row, in a loop     the same, for what cannot be vectorized (recurrent layers, values asked for)
    together                  the whole batch once, then one row's upstream gradient at a time: B times the backward
                              work, for modules that cannot run on one row

A module that drew random numbers draws the same ones again. Vectorized, it draws for all rows at once, in the order of
the batch where the batch is the first axis in memory; whether they were the same shows in the outputs. If not, the
module runs together, where nothing about it differs from the first time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from brittle.blame import described
from brittle.errors import UnsupportedError
from brittle.kernel.calls import Call

TOGETHER = 16
"""Rows that are pulled back at once through a batch that ran together; each costs the memory of a backward pass."""

Tensors = dict[str, Tensor]
Pull = Callable[[list[Tensor], list[Tensor]], tuple[Tensors, list[Tensor]]]
"""(a row of each input, a row of each upstream gradient) -> gradients by name, and the row of each output."""


def run_again(call: Call) -> Tensors:
    """Gradients by name of the module's own parameters, each (B, *shape).

    Raises `UnsupportedError` for a module that cannot run again, and for batch normalization inside.
    """
    if any(isinstance(m, _BatchNorm) and mode for m, mode in zip(call.module.modules(), call.modes, strict=True)):
        raise UnsupportedError(
            f"a module with parameters of its own may not contain batch normalization in training mode, {call} does; "
            "move its own parameters into a module of their own"
        )
    found, cause = "", None
    for route in (_vectorized, _together) if call.drawn else (_vectorized, _one_by_one, _together):
        try:
            with call.again(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")
                rows, outputs = route(call)
            if call.same_draws(outputs):
                return rows
            found, cause = "drew other random numbers", None
        except Exception as error:  # whatever a module raises that was not written for this
            found, cause = f"raised {described(error)}", error
    raise UnsupportedError(
        f"every module with parameters must run a second time as it ran in the model, {call} {found}; write it so that "
        "it does, with torch's global random numbers only"
    ) from cause


def is_whole(module: nn.Module) -> bool:
    """Whether a module computes with the parameters of its children by itself."""
    return isinstance(module, nn.MultiheadAttention) or parametrize.is_parametrized(module)


def _vectorized(call: Call) -> tuple[Tensors, list[Tensor]]:
    inputs, upstream, pull = _by_rows(call)
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.vmap(pull, randomness="different")(inputs, upstream)


def _one_by_one(call: Call) -> tuple[Tensors, list[Tensor]]:
    inputs, upstream, pull = _by_rows(call)
    with sdpa_kernel(SDPBackend.MATH):
        found = [pull([leaf[i] for leaf in inputs], [g[i] for g in upstream]) for i in range(len(upstream[0]))]
    rows = {name: torch.stack([gradients[name] for gradients, _ in found]) for name in found[0][0]}
    return rows, [torch.stack([outputs[k] for _, outputs in found]) for k in range(len(upstream))]


def _by_rows(call: Call) -> tuple[list[Tensor], list[Tensor], Pull]:
    """What has one row an example: inputs, upstream gradients; and how a row is pulled back."""
    upstream = list(call.upstream.values())
    dtype, count = upstream[0].dtype, len(upstream[0])
    parameters, buffers = _own(call), _buffers(call)
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    leaves = [leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf for leaf in leaves]
    split = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.shape[:1] == (count,)]

    def pull(inputs: list[Tensor], gradients: list[Tensor]) -> tuple[Tensors, list[Tensor]]:
        def run(p: Tensors) -> list[Tensor]:
            at = leaves.copy()
            for k, leaf in zip(split, inputs, strict=True):
                at[k] = leaf[None]
            args, kwargs = pytree.tree_unflatten(at, spec)
            outputs = pytree.tree_leaves(functional_call(call.module, (p, buffers), args, kwargs))
            return [outputs[k][0].to(dtype) for k in call.upstream]

        outputs, back = torch.func.vjp(run, parameters)[:2]
        return back(gradients)[0], outputs

    return [leaves[k] for k in split], upstream, pull


def _together(call: Call) -> tuple[Tensors, list[Tensor]]:
    parameters = {n: p.requires_grad_(True) for n, p in _own(call).items()}
    device = next(iter(call.upstream.values())).device
    autocast = torch.autocast(device.type, call.autocast, enabled=call.autocast is not None, cache_enabled=False)
    with torch.enable_grad(), autocast:
        returned = functional_call(call.module, (parameters, _buffers(call)), call.args, call.kwargs)
    found = pytree.tree_leaves(returned)
    outputs = {k: found[k] for k in call.upstream}
    depend = {k: output for k, output in outputs.items() if output.requires_grad}
    upstream = [call.upstream[k].to(output.dtype) for k, output in depend.items()]
    index = torch.arange(len(upstream[0]), device=device)

    def pull(row: Tensor) -> tuple[Tensor, ...]:
        own = [torch.where((index == row).view(-1, *[1] * (g.dim() - 1)), g, 0) for g in upstream]
        weights = list(parameters.values())
        return torch.autograd.grad(list(depend.values()), weights, own, retain_graph=True, materialize_grads=True)

    try:
        rows = torch.func.vmap(pull, chunk_size=TOGETHER)(index)
    except Exception:  # a backward pass that cannot be vectorized
        rows = tuple(torch.stack(one) for one in zip(*map(pull, index), strict=True))
    return dict(zip(parameters, rows, strict=True)), list(outputs.values())


def _own(call: Call) -> Tensors:
    return {n: p.detach() for n, p in call.module.named_parameters(recurse=is_whole(call.module))}


def _buffers(call: Call) -> Tensors:
    """Copies, which a module may move as it runs."""
    return {name: buffer.clone() for name, buffer in call.module.named_buffers()}

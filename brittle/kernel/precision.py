"""Products of gradients in less than float32, where the user asks for it.

    float32     as they are
    tf32        an accelerator's tensor cores take 11 bits of every operand, and sum in float32
    bfloat16    8 bits of every operand; two such numbers multiply exactly in float32, which is where they are summed

`asked_for` says which for a whole run, `lowered` surrounds the products that it is meant for: those of queries'
gradients with examples' in the ledger and in the kernel matrix. Everything else stays as it is: replay and the user's
own training step and model, displacements and the group memory's masses (whose shifts are small differences of large
sums), states, sums over examples.

A run in bfloat16 is as fast as one in TF32, not faster, and on a CPU no faster than in float32: rounded operands keep
the room of float32, so that one code path serves every device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from brittle.errors import UsageError

Precision = Literal["float32", "tf32", "bfloat16"]
PRECISIONS = ("float32", "tf32", "bfloat16")

_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, torch.einsum}
_PRODUCTS |= {torch.conv2d}  # credit that is carried forward through a layer

_asked: ContextVar[str] = ContextVar("precision", default="float32")


def check_precision(precision: str, model: nn.Module, device: str) -> None:
    """Raises `UsageError` for a precision that is none, or that makes no sense for the model or on the device."""
    if precision not in PRECISIONS:
        raise UsageError(f"--precision must be one of {', '.join(PRECISIONS)}, found {precision!r}")
    if precision == "float32":
        return
    dtype = next(model.parameters()).dtype
    if dtype != torch.float32:
        kind = str(dtype).removeprefix("torch.")
        raise UsageError(f"--precision {precision} is for models in float32, this one is in {kind}; leave it out")
    if precision == "tf32" and torch.device(device).type != "cuda":
        raise UsageError(f"--precision tf32 needs an accelerator's tensor cores, found --device {device}; leave it out")


@contextmanager
def asked_for(precision: str) -> Iterator[None]:
    """In this block, the products in `lowered` are made in this precision."""
    token = _asked.set(precision)
    try:
        yield
    finally:
        _asked.reset(token)


@contextmanager
def lowered() -> Iterator[None]:
    """Matrix products of float32 tensors in this block are made in the precision that was asked for."""
    precision = _asked.get()
    if precision == "float32":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with _Rounding() if precision == "bfloat16" else nullcontext():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class _Rounding(TorchFunctionMode):
    """Operands of matrix products are rounded to bfloat16."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            args = pytree.tree_map(_rounded, args)
        return func(*args, **(kwargs or {}))


def _rounded(operand: Any) -> Any:
    if isinstance(operand, Tensor) and operand.dtype == torch.float32:
        return operand.bfloat16().float()
    return operand

"""The mass of an input as a function that can be differentiated in the input, for attacks that follow the map.

    mass_g(x) = sum_t <J_t(x), U[t, g]>        needs d/dx of J_t(x) . U, a second derivative of the network.

Where torch's vmap can take it for all rows at once it does; where a layer has no second derivative there, or a wrong
one, rows are taken one after the other. For networks with kinks (ReLU) J jumps, and the derivative says what happens
between the jumps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from brittle.errors import SubjectError
from brittle.kernel.directional import Margin, named, signs
from brittle.kernel.gradients import AGREEMENT
from brittle.kernel.memory import Memory
from brittle.path.flat import FlatModel
from brittle.records import Pairs
from brittle.subject import Subject

Route = Callable[[nn.Module, FlatModel, Tensor, Tensor, Tensor, Tensor], Tensor]
"""How J . U is differentiated: (margins, model, state (P,), U (G, P), inputs (R, *input), signs (R, C)) -> (R, G)."""


def differentiable_mass(memory: Memory, subject: Subject, device: str = "cpu") -> Callable[[Tensor, Pairs], Tensor]:
    """The mass of any input as a function that can be differentiated in the input; decay is left out.

    Returns a function (inputs (R, *input), pairs) -> (R, G) in the weights' precision. One call costs
    `memory.evaluations` gradient passes an input, its backward pass about as much again (R times as much for
    models whose layers vmap cannot differentiate twice); attacks call it on a `merged` memory.
    """
    flat = FlatModel(subject.model, device)
    whole = Margin(subject, flat.eval())

    def mass_by(route: Route, points: Iterable[tuple[Tensor, Tensor]], inputs: Tensor, pairs: Pairs) -> Tensor:
        x = inputs.to(flat.state)
        sign = signs(pairs, subject.classes).to(x)
        with sdpa_kernel(SDPBackend.MATH), _LayerNormWrittenOut():  # attention's others have no second derivative
            masses = [route(whole, flat, state.to(x), moved[:-1].to(x), x, sign) for state, moved in points]
        return torch.stack(masses).sum(0)

    def slope(route: Route) -> Tensor:
        """The gradient of some masses at the first training examples."""
        x = subject.train.inputs[:2].to(flat.state).requires_grad_(True)
        found = mass_by(
            route, [next(memory.points())], x, Pairs.of(subject.class_logits(whole.model, x).detach().cpu())
        )
        weighted = (found * torch.linspace(1, 2, found.shape[1]).to(found)).sum()
        return torch.autograd.grad(weighted, x, allow_unused=True, materialize_grads=True)[0]

    route, exact = _row_after_row, slope(_row_after_row)
    try:  # a layer may have no second derivative under vmap, or a wrong one
        if (slope(_all_rows) - exact).norm() <= AGREEMENT * exact.norm():
            route = _all_rows
    except (RuntimeError, SubjectError):
        pass
    return lambda inputs, pairs: mass_by(route, memory.points(), inputs, pairs)


def _all_rows(whole: nn.Module, flat: FlatModel, state: Tensor, moved: Tensor, x: Tensor, sign: Tensor) -> Tensor:
    """J of every row under vmap, then J . U: one gradient pass and one more to differentiate it."""

    def margin(parameters: Tensor, row: Tensor, sign: Tensor) -> Tensor:
        return torch.func.functional_call(whole, named(flat, state, parameters), (row[None], sign[None]))[0]

    gradients = torch.func.vmap(torch.func.grad(margin), in_dims=(None, 0, 0))
    return gradients(state[: flat.parameters], x, sign) @ moved[:, : flat.parameters].T


def _row_after_row(whole: nn.Module, flat: FlatModel, state: Tensor, moved: Tensor, x: Tensor, sign: Tensor) -> Tensor:
    """The same by plain autograd: right for every layer, and as many passes as rows."""
    parameters = state[: flat.parameters].clone().requires_grad_(True)
    rows = []
    for r in range(len(x)):
        at = named(flat, state, parameters)
        margin = torch.func.functional_call(whole, at, (x[r : r + 1], sign[r : r + 1]))[0]
        rows.append(torch.autograd.grad(margin, parameters, create_graph=True)[0])
    return torch.stack(rows) @ moved[:, : flat.parameters].T


class _LayerNormWrittenOut(TorchFunctionMode):
    """Layer normalization in elementary operations: torch's own has a wrong second derivative under vmap."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_layer_norm if func is F.layer_norm else func)(*args, **(kwargs or {}))


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    over = tuple(range(-len(shape), 0))
    x = (x - x.mean(over, keepdim=True)) / (x.var(over, correction=0, keepdim=True) + eps).sqrt()
    x = x if weight is None else x * weight
    return x if bias is None else x + bias

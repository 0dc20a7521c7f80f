"""The group memory: what each group of examples did to the weights, summed up once.

For segments t of the path and groups g of training examples, U[t, g] (P,) is the displacement credited to the
group, so that sum_g U[t, g] + decay = w_b - w_a for every segment. Afterwards

    mass of g at any input x = sum_t <Jbar_t(x), U[t, g]>

without a visit to the training data, at a cost that does not depend on N: a superposition of the examples, as in
Domingos 2020 (arXiv 2012.00152). How U is found: `displacement`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from brittle.errors import SubjectError
from brittle.kernel.displacement import displaced, even_cuts
from brittle.kernel.gradients import AGREEMENT
from brittle.kernel.quadrature import BLOCK, blocks, check_outputs, midpoints, output_gradients
from brittle.path.flat import FlatModel
from brittle.path.store import PathReader
from brittle.records import Groups, Pairs
from brittle.subject import Subject

Progress = Callable[[int, int], None]

Route = Callable[[nn.Module, FlatModel, Tensor, Tensor, Tensor, Tensor], Tensor]
"""How J . U is differentiated: (margins, model, state (P,), U (G, P), inputs (R, *input), signs (R, C)) -> (R, G)."""


@dataclass(frozen=True)
class Memory:
    """Displacements by segment and group; the last row of each segment is what decay and the buffers did.

    `ends[t]` and `ends[t + 1]` are the states at both ends of segment t, `nodes` the midpoints taken in each.
    """

    ends: Tensor  # shape: (T + 1, P)
    displacements: Tensor  # shape: (T, G + 1, P)
    nodes: int

    @property
    def segments(self) -> int:
        return len(self.displacements)

    @property
    def evaluations(self) -> int:
        """Gradient passes that the mass of one input costs."""
        return self.segments * self.nodes

    def points(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every node: the state there (P,), and the displacements (G + 1, P) weighted for it."""
        for t in range(self.segments):
            for share in midpoints(self.nodes):
                yield torch.lerp(self.ends[t], self.ends[t + 1], share), self.displacements[t] / self.nodes

    def by_class(self, groups: Groups, classes: int) -> Memory:
        """The same memory with the groups of each class summed up."""
        t, _, p = self.displacements.shape
        sums = self.displacements.new_zeros(t, classes + 1, p)
        sums.index_add_(1, groups.classes, self.displacements[:, :-1])
        sums[:, -1] = self.displacements[:, -1]
        return Memory(self.ends, sums, self.nodes)

    def merged(self, segments: int, nodes: int = 1) -> Memory:
        """The same memory in fewer, longer segments: cheaper, less exact."""
        cuts = torch.linspace(0, self.segments, min(segments, self.segments) + 1).round().long().tolist()
        sums = [self.displacements[a:b].sum(0) for a, b in pairwise(cuts)]
        return Memory(self.ends[cuts], torch.stack(sums), nodes)


def build(
    path: PathReader,
    subject: Subject,
    groups: Groups,
    segments: int = 100,
    nodes: int = 2,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Memory:
    """The memory of a recorded path in `segments` stretches of equal length along the path.

    Raises `UnsupportedError` where the model cannot be taken apart by examples.
    Cost: one walk along the path with row gradients; (T + 1) x P and T x (G + 1) x P numbers.
    """
    check_outputs(subject, FlatModel(subject.model, device))
    cuts = even_cuts(path.steps, segments)
    first = path.snapshot(0).state
    ends = first.new_empty(len(cuts), len(first))
    moved = first.new_empty(len(cuts) - 1, len(groups) + 1, len(first))
    for t, part in enumerate(displaced(path, subject, groups, cuts, device, progress)):
        ends[t], ends[t + 1], moved[t] = part.low, part.high, part.moved
    return Memory(ends, moved, nodes)


def mass(
    memory: Memory,
    subject: Subject,
    inputs: Tensor,
    pairs: Pairs,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Tensor:
    """Mass by group and, in the last column, what decay and buffers did: (R, G + 1), logits, float64.

    Cost: `memory.evaluations` gradient passes an input, whatever the size of the training set.
    """
    total = torch.zeros(len(inputs), memory.displacements.shape[1], dtype=torch.float64)
    return _add_mass(total, memory, subject, FlatModel(subject.model, device), inputs, pairs, progress)


def differentiable_mass(memory: Memory, subject: Subject, device: str = "cpu") -> Callable[[Tensor, Pairs], Tensor]:
    """The mass of any input as a function that can be differentiated in the input; decay is left out.

    Returns a function (inputs (R, *input), pairs) -> (R, G) in the weights' precision. One call costs
    `memory.evaluations` gradient passes an input, its backward pass about as much again (R times as much for
    models whose layers vmap cannot differentiate twice); attacks call it on a `merged` memory.
    """
    flat = FlatModel(subject.model, device)
    whole = _Margin(subject, flat.eval())

    def mass_by(route: Route, points: Iterable[tuple[Tensor, Tensor]], inputs: Tensor, pairs: Pairs) -> Tensor:
        x = inputs.to(flat.state)
        sign = (F.one_hot(pairs.predicted, subject.classes) - F.one_hot(pairs.rival, subject.classes)).to(x)
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


def fine_mass(
    path: PathReader,
    subject: Subject,
    groups: Groups,
    inputs: Tensor,
    pairs: Pairs,
    segments: int,
    nodes: int,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Tensor:
    """The same mass from a finer account that is used up as it is walked and never stored: (R, G + 1)."""
    total = torch.zeros(len(inputs), len(groups) + 1, dtype=torch.float64)
    flat = FlatModel(subject.model, device)
    for part in displaced(path, subject, groups, even_cuts(path.steps, segments), device, progress):
        piece = Memory(torch.stack([part.low, part.high]), part.moved[None], nodes)
        _add_mass(total, piece, subject, flat, inputs, pairs, None)
    return total


class _Margin(nn.Module):
    """The logits of a batch times `sign`, with the model as a child: so that its tensors can be replaced by name."""

    def __init__(self, subject: Subject, model: nn.Module) -> None:
        super().__init__()
        self.model, self._subject = model, subject

    def forward(self, x: Tensor, sign: Tensor) -> Tensor:
        return (self._subject.class_logits(self.model, x) * sign).sum(1)


def _all_rows(whole: nn.Module, flat: FlatModel, state: Tensor, moved: Tensor, x: Tensor, sign: Tensor) -> Tensor:
    """J of every row under vmap, then J . U: one gradient pass and one more to differentiate it."""

    def margin(parameters: Tensor, row: Tensor, sign: Tensor) -> Tensor:
        return torch.func.functional_call(whole, _named(flat, parameters, state), (row[None], sign[None]))[0]

    gradients = torch.func.vmap(torch.func.grad(margin), in_dims=(None, 0, 0))
    return gradients(state[: flat.parameters], x, sign) @ moved[:, : flat.parameters].T


def _row_after_row(whole: nn.Module, flat: FlatModel, state: Tensor, moved: Tensor, x: Tensor, sign: Tensor) -> Tensor:
    """The same by plain autograd: right for every layer, and as many passes as rows."""
    parameters = state[: flat.parameters].clone().requires_grad_(True)
    rows = []
    for r in range(len(x)):
        named = _named(flat, parameters, state)
        margin = torch.func.functional_call(whole, named, (x[r : r + 1], sign[r : r + 1]))[0]
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


def _named(flat: FlatModel, parameters: Tensor, state: Tensor) -> dict[str, Tensor]:
    """The model's tensors by name: views of the parameters, and of the state for its running statistics."""
    own = lambda slot: (state if slot.buffer else parameters)[slot.start : slot.stop].view(slot.shape)  # noqa: E731
    return {f"model.{slot.name}": own(slot) for slot in flat.slots}


def _add_mass(
    total: Tensor,
    memory: Memory,
    subject: Subject,
    flat: FlatModel,
    inputs: Tensor,
    pairs: Pairs,
    progress: Progress | None,
) -> Tensor:
    """Add the mass of R inputs, node by node, to `total` (R, G + 1)."""
    for k, (state, moved) in enumerate(memory.points()):
        moved = moved.to(flat.state)
        for rows in blocks(len(inputs), BLOCK):
            gradients = output_gradients(subject, flat, state, inputs[rows], pairs[rows])
            total[rows] += (gradients @ moved.T).double().cpu()
        if progress:
            progress(k + 1, memory.evaluations)
    return total

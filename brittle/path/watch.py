"""What happens to gradients between backward and step, tensor by tensor.

Two norms of each gradient are compared: g as it came out of backward (added up over the batches of a step) and g'
as the optimizer gets it. Clipping by norm, or a scaler, multiplies: |g'|_2 / |g|_2 = |g'|_inf / |g|_inf = c. Clipping
by value cuts: |g'|_inf = v for every tensor that it reached, and c for the others. Then g' = clamp(c g, -v, v).
Anything else (noise, gradients written by hand) is no such rule, and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from brittle.errors import NotFiniteError, UnsupportedError
from brittle.path.forwards import ForwardPass, depth
from brittle.path.processes import length_of, world

TOLERANCE = 1e-4
"""Relative spread of the factors up to which they count as one."""

NEGLIGIBLE = 1e-7
"""Share of the largest norm below which a gradient's own factor is rounding."""

OTHERWISE = (
    "gradients may be multiplied or clipped between backward and step, found one that was changed otherwise (noise, "
    "projection, hand-written gradients); take it out, or audit the trained model without a path"
)

WITHIN = (
    "a backward pass may not run within another, as it does under reentrant activation checkpointing: it cannot be "
    "repeated; use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
)

Ends = tuple[Tensor, Tensor]
"""The least and the largest entry of a tensor, two scalars."""

Norms = tuple[Tensor, Ends]
"""Euclidean norm of a tensor, a scalar, and what its largest norm is found from."""

NOTHING = (torch.zeros(()), (torch.zeros(()), torch.zeros(())))
"""The norms of a gradient that is not there."""


@dataclass
class BackwardPass:
    """One backward pass: the norm of each tensor's own gradient, and whether it began from nothing.

    late: the tensors whose sums are measured when the pass is over.
    """

    forward: ForwardPass | None
    norms: dict[str, Tensor] = field(default_factory=dict)
    fresh: bool = True
    noted: set[str] = field(default_factory=set)
    late: list[str] = field(default_factory=list)

    def norm(self, names: Collection[str]) -> float:
        """Euclidean norm of the pass's gradient over some tensors."""
        parts = [size for name, size in self.norms.items() if name in names]
        return float(torch.linalg.vector_norm(_numbers(parts))) if parts else 0.0


@dataclass(frozen=True)
class Changes:
    """What happened to gradients by name: g' = clamp(c g, -v, v), factors c and bounds v of those that were cut.

    length: the norm of all g' together, where every tensor was cut, so that their common c is not seen; else 0.
    """

    factors: Mapping[str, float]
    bounds: Mapping[str, float]
    length: float = 0.0


class GradientWatch:
    """Notes the gradients of named parameters as backward delivers them.

    They are measured all at once when a pass is over; where the user's own hooks could change them before that, one by
    one as they come. Under several processes they are the processes' mean when the pass is over: what is measured then
    is that mean, and the pass's own norms as they come.

    `passes` are the backward passes since `forget`; one that finds no gradients has had those before it thrown away
    (a skipped step). latest: says which forward pass came last; trained: which tensors the optimizer moves.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        latest: Callable[[], ForwardPass | None],
        trained: Callable[[], Collection[str]],
    ) -> None:
        self.passes: list[BackwardPass] = []
        self._parameters, self._latest, self._trained = parameters, latest, trained
        self._raw: dict[str, tuple[int, Norms]] = {}  # the pass that came last, and norms of the sum
        self._kept: dict[str, bool] = {}
        self._own: dict[str, Ends] = {}  # ends of single gradients, until they are added up
        self._processes = world()[1] > 1
        self._task = -1  # the run of backward that came last
        self._hooks: dict[str, list[RemovableHandle]] = {}
        self.follow()

    def follow(self) -> None:
        """Watch what is trained by now: parameters may be frozen and unfrozen."""
        self._counting = self._trained()
        for name, p in self._parameters.items():
            if p.requires_grad and name not in self._hooks:
                after = p.register_post_accumulate_grad_hook(self._add(name))
                self._hooks[name] = [p.register_hook(self._note(name, p)), after]

    def alive(self) -> list[BackwardPass]:
        """The passes that the present gradients were added up from."""
        fresh = [k for k, one in enumerate(self.passes) if one.fresh]
        return self.passes[fresh[-1] :] if fresh else []

    def taken(self) -> dict[str, Tensor]:
        """The gradients that the optimizer takes now, by name. Raises `UnsupportedError` for a sparse one."""
        trained = self._trained()
        found = {n: p.grad for n, p in self._parameters.items() if n in trained and p.grad is not None}
        for name, gradient in found.items():
            if gradient.is_sparse:
                raise UnsupportedError(
                    f"sparse gradients cannot be accounted for, found one in {name}; use sparse=False"
                )
        return found

    def forget(self) -> None:
        """Begin anew."""
        self.passes.clear()
        self._raw.clear()

    def changes(self) -> Changes:
        """What happened to the gradients of the trained tensors that have one.

        Raises:
            UnsupportedError: where a gradient is sparse, or was changed in another way.
            NotFiniteError: where a gradient is not finite.
        """
        gradients = self.taken()
        if not gradients:
            return Changes({}, {})
        dead = len(self.passes) - len(self.alive())
        noted = [self._raw.get(name, (0, NOTHING)) for name in gradients]
        before = [norms if k > dead else NOTHING for k, norms in noted]
        sizes = _numbers([*(size for size, _ in before), *_sizes(gradients.values())]).reshape(2, -1)
        was, now = sizes.tolist()
        if was == now and all(map(math.isfinite, now)):
            taken = [float(size > 0) for size in now]
            return Changes(dict(zip(gradients, taken, strict=True)), {})  # untouched: the same bits by the same sum
        ends = [*(ends for _, ends in before), *_ends(gradients.values())]
        peaks = _numbers([end for pair in ends for end in pair]).reshape(2, -1, 2).abs().amax(2)
        raw, given = torch.stack([sizes, peaks], dim=2)  # shapes: (n, 2)
        if not (raw.isfinite().all() and given.isfinite().all()):
            raise NotFiniteError("gradients must be finite, found NaN or infinity; the training diverged")
        return explained(gradients, raw, given)

    def averaged(self) -> Changes:
        """The same where gradients were averaged over processes, with a factor in it known by the length of the result.

        Bounds are seen where the mean was there when backward was over (DistributedDataParallel), not where it is
        taken by hand later.
        """
        taken = self.taken()
        try:
            bounds = self.changes().bounds
        except UnsupportedError:
            bounds = {}
        return Changes(dict.fromkeys(taken, 1.0), bounds, length_of(list(taken.values())))

    def close(self) -> None:
        """Stop watching."""
        for hooks in self._hooks.values():
            for hook in hooks:
                hook.remove()

    def _note(self, name: str, parameter: nn.Parameter) -> Callable[[Tensor], None]:
        def note(gradient: Tensor) -> None:
            if gradient.is_sparse:
                return
            forward = self._latest()
            self._look_where(forward)
            if not self.passes or name in self.passes[-1].noted or self.passes[-1].forward is not forward:
                self.passes.append(BackwardPass(forward))
            one = self.passes[-1]
            one.noted.add(name)
            self._kept[name] = parameter.grad is not None and bool(parameter.grad.any())
            one.fresh &= not (self._kept[name] and name in self._counting)
            alone = self._alone(parameter)
            if self._kept[name] or self._processes or not alone:
                one.norms[name] = _sizes([gradient])[0]
            if not alone:
                self._own[name] = _ends([gradient])[0]

        return note

    def _look_where(self, forward: ForwardPass | None) -> None:
        """Refuse gradients that come from within another backward pass than the forward pass was in."""
        task = torch._C._current_graph_task_id()
        if task != self._task and depth() > (forward.depth if forward else 0):
            raise UnsupportedError(WITHIN)
        self._task = task

    def _add(self, name: str) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            if name not in self._kept:
                return
            place, one, own = len(self.passes), self.passes[-1], self._own.pop(name, None)
            if own is None:
                if not one.late:
                    _when_over(lambda: self._measure(one, place), late=self._processes)
                one.late.append(name)
            elif self._kept[name] and parameter.grad is not None:
                self._raw[name] = (place, (_sizes([parameter.grad])[0], _ends([parameter.grad])[0]))
            else:
                self._raw[name] = (place, (one.norms[name], own))

        return add

    def _alone(self, parameter: Tensor) -> bool:
        """Whether no user's hook can change the parameter's gradient before the pass is over."""
        on_gradient, on_sum = parameter._backward_hooks or (), parameter._post_accumulate_grad_hooks or ()
        return self._processes or len(on_gradient) == len(on_sum) == 1

    def _measure(self, one: BackwardPass, place: int) -> None:
        """The pass is over: measure what it left behind."""
        names = [*self._parameters] if self._processes else one.late  # another process may have had more of them
        left = {name: g for name in names if (g := self._parameters[name].grad) is not None}
        one.late.clear()
        for name, size, ends in zip(left, _sizes(left.values()), _ends(left.values()), strict=True):
            self._raw[name] = (place, (size, ends))
            if not (self._processes or self._kept[name]):
                one.norms[name] = size


def _when_over(do: Callable[[], None], late: bool) -> None:
    """Do something when the present backward pass is over; late: after all that is to be done then by others."""
    queue = torch.autograd.Variable._execution_engine.queue_callback
    queue((lambda: queue(do)) if late else do)


def explained(gradients: Mapping[str, Tensor], raw: Tensor, given: Tensor) -> Changes:
    """One factor a tensor, and the bound of those that were clipped by value.

    gradients: as the optimizer gets them; raw, given: (n, 2), two norms of each before and now.
    """
    counts = raw[:, 0] > NEGLIGIBLE * raw[:, 0].max()
    if bool((~counts & (given[:, 0] > given[:, 0].max() * NEGLIGIBLE * 100)).any()):
        raise UnsupportedError(OTHERWISE)
    size, peak = (given / raw.clamp_min(1e-300)).unbind(1)
    cut = ((size - peak).abs() > TOLERANCE * peak) & counts
    bound = given[cut, 1].max().item() if bool(cut.any()) else math.inf
    if bool((given[cut, 1] < bound * (1 - TOLERANCE)).any()) or bool((peak > size)[cut].any()):
        raise UnsupportedError(OTHERWISE)
    alone = torch.tensor([g.numel() == 1 for g in gradients.values()])  # one entry: its two norms cannot differ
    cut |= alone & counts & ((given[:, 1] - bound).abs() <= TOLERANCE * bound)
    votes = counts & ~cut & (given[:, 0] > 0)
    common = size[votes].median().item() if bool(votes.any()) else 1.0
    factors = torch.where(counts & ~cut & ((size - common).abs() > TOLERANCE * common), size, common)
    factors[(factors - 1).abs() < 1e-6] = 1.0
    factors[given[:, 0] == 0] = 0.0
    bounds = {name: bound for name, is_cut in zip(gradients, cut.tolist(), strict=True) if is_cut}
    length = 0.0
    if bounds and bool(votes.any()):
        _check_cut([gradients[name] for name in bounds], raw[cut], given[cut], common)
    elif bounds:
        length = given[:, 0].square().sum().sqrt().item()
    return Changes(dict(zip(gradients, factors.tolist(), strict=True)), bounds, length)


def _check_cut(gradients: Sequence[Tensor], raw: Tensor, given: Tensor, factor: float) -> None:
    """Where one entry alone lies at the bound v, clipping leaves |g'|^2 = c^2 (|g|^2 - max^2) + v^2; else refuse."""
    for g, (size, peak), (length, bound) in zip(gradients, raw.tolist(), given.tolist(), strict=True):
        alone = int((g.abs() >= bound * (1 - 1e-6)).sum()) == 1
        expected = max(factor**2 * (size**2 - peak**2), 0.0) + bound**2
        if alone and abs(length**2 - expected) > TOLERANCE * expected:
            raise UnsupportedError(OTHERWISE)


def _sizes(gradients: Iterable[Tensor]) -> list[Tensor]:
    """The Euclidean norm of each, a scalar."""
    return list(torch._foreach_norm(plain)) if (plain := _plain(gradients)) else []


def _ends(gradients: Iterable[Tensor]) -> list[Ends]:
    """The least and the largest entry of each: in one pass, many times as fast as the largest norm on a CPU."""
    return [torch.aminmax(g) for g in _plain(gradients)]


def _plain(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Without their history, and no shorter than single precision: the squares of half precision overflow."""
    found = [g.detach() for g in gradients]
    return [g.float() if g.element_size() < 4 else g for g in found]


def _numbers(values: list[Tensor]) -> Tensor:
    """Scalars from any devices, (n,) in double precision."""
    device = values[0].device
    if any(value.device != device for value in values):
        values = [value.to(device) for value in values]
    return torch.stack(values).double().cpu()

"""The norms of gradients as backward delivers them, tensor by tensor, and as the optimizer gets them.

`changes` tells from them what happened to the gradients between backward and step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from brittle.errors import NotFiniteError, UnsupportedError
from brittle.path.changes import Changes, explained
from brittle.path.forwards import ForwardPass, depth
from brittle.path.processes import length_of, world

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
        return math.hypot(*_numbers(parts)) if parts else 0.0


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
        sizes = _numbers([*(size for size, _ in before), *_sizes(_plain(gradients.values()))])
        was, now = sizes[: len(before)], sizes[len(before) :]
        if was == now and all(map(math.isfinite, now)):
            taken = [float(size > 0) for size in now]
            return Changes(dict(zip(gradients, taken, strict=True)), {})  # untouched: the same bits by the same sum
        ends = [*(ends for _, ends in before), *_ends(_plain(gradients.values()))]
        peaks = torch.tensor(_numbers([end for pair in ends for end in pair]), dtype=torch.float64)
        peaks = peaks.reshape(2, -1, 2).abs().amax(2)
        raw, given = torch.stack([torch.tensor([was, now], dtype=torch.float64), peaks], dim=2)  # shapes: (n, 2)
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
                one.norms[name] = _sizes(_plain([gradient]))[0]
            if not alone:
                self._own[name] = _ends(_plain([gradient]))[0]

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
                self._raw[name] = (place, _norms([parameter.grad])[0])
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
        for name, norms in zip(left, _norms(left.values()), strict=True):
            self._raw[name] = (place, norms)
            if not (self._processes or self._kept[name]):
                one.norms[name] = norms[0]


def _when_over(do: Callable[[], None], late: bool) -> None:
    """Do something when the present backward pass is over; late: after all that is to be done then by others."""
    queue = torch.autograd.Variable._execution_engine.queue_callback
    queue((lambda: queue(do)) if late else do)


def _norms(gradients: Iterable[Tensor]) -> list[Norms]:
    """Both norms of each."""
    plain = _plain(gradients)
    return list(zip(_sizes(plain), _ends(plain), strict=True))


def _sizes(gradients: list[Tensor]) -> list[Tensor]:
    """The Euclidean norm of each, a scalar."""
    return list(torch._foreach_norm(gradients)) if gradients else []


def _ends(gradients: list[Tensor]) -> list[Ends]:
    """The least and the largest entry of each: in one pass, many times as fast as the largest norm on a CPU."""
    return [torch.aminmax(g) for g in gradients]


def _plain(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Without their history, and no shorter than single precision: the squares of half precision overflow."""
    found = [g.detach() if g.requires_grad else g for g in gradients]
    return [g.float() if g.element_size() < 4 else g for g in found]


def _numbers(values: list[Tensor]) -> list[float]:
    """Scalars from any devices, one transfer for all."""
    device = values[0].device
    if any(value.device != device for value in values):
        values = [value.to(device) for value in values]
    return torch.stack(values).tolist()

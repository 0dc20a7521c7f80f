"""How fast this machine is with this subject: a few seconds of each thing that an audit does many times."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from brittle.agreement.baselines.neighbours import trust_score
from brittle.attacks.apgd import auto_pgd
from brittle.attacks.plan import default_epsilon
from brittle.attacks.problem import Problem
from brittle.attacks.suite import BLOCK
from brittle.data import Examples
from brittle.doctor.check import Visit
from brittle.doctor.gradients import first_step
from brittle.kernel.differentiable import differentiable_mass
from brittle.kernel.gradients import sum_of
from brittle.kernel.memory import Memory, mass
from brittle.kernel.quadrature import row_blocks
from brittle.kernel.steps import step_pieces
from brittle.path.flat import FlatModel
from brittle.path.rerun import batch_gradient
from brittle.records import Pairs
from brittle.subject import Subject

LONG = 1.0
"""Seconds from which a call is not timed again."""

CLIMB, GUIDED, NEIGHBOURS = 5, 64, 2_000
"""Evaluations of the attack, inputs that ask the mass map, and training examples among which neighbours are sought."""


@dataclass(frozen=True)
class Speed:
    """Seconds that one of each takes."""

    forward: float  # an input through the model
    attack: float  # an evaluation of an attack, of one input
    gradient: float  # an output's gradient at one node, with its mass
    guide: float  # an input's mass at one node of the map that leads attacks, with its gradient
    rows: float  # the row gradients of one batch
    plain: float  # its plain gradient
    multiply: float  # one multiplication and addition in a product of matrices
    touch: float  # one number, read and written
    neighbours: float  # a search for the nearest training examples, over those of `NEIGHBOURS`, squared


def measured(v: Visit, groups: int) -> Speed:
    """The speed of a subject on a device. groups: of the memory."""
    s, flat = v.subject, FlatModel(v.subject.model, v.device)
    timed = partial(_timed, device=v.device)
    block = next(row_blocks(len(s.test), flat))
    x = s.test.inputs[block]
    logits = s.predict(x)
    pairs, some = Pairs.of(logits), x[:GUIDED]
    grouped, by_class = (_one_segment(flat, rows) for rows in (groups, s.classes))
    guide = differentiable_mass(by_class, s, v.device)
    step = first_step(v)
    forward = timed(lambda: s.predict(s.test.inputs[:BLOCK])) / min(len(s.test), BLOCK)
    attacked = s.test[: max(8, min(BLOCK, int(LONG / (3 * CLIMB * forward))))]
    return Speed(
        forward=forward,
        attack=timed(lambda: _attack(s, attacked)) / CLIMB / len(attacked),
        gradient=timed(lambda: mass(grouped, s, x, pairs, v.device)) / len(x),
        guide=timed(lambda: _differentiated(guide, some, pairs[: len(some)])) / len(some),
        rows=timed(lambda: sum_of(flat, ((at, rows) for at, rows, _ in step_pieces(s, flat, step, step.batches[0])))),
        plain=timed(lambda: batch_gradient(s, flat, step.batches[0], step.seen.manner.resting)),
        multiply=_product(flat, timed),
        touch=_addition(flat, timed),
        neighbours=timed(lambda: trust_score(s.train[:NEIGHBOURS], x, pairs.predicted)),
    )


def _timed(call: Callable[[], object], device: str) -> float:
    """Seconds of a call: of the first one where it is long, of those after it where it is short."""

    def once() -> float:
        began = time.perf_counter()
        call()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    first = once()
    return first if first > LONG else median(once() for _ in range(3))


def _one_segment(flat: FlatModel, rows: int) -> Memory:
    """A memory of one node, of the right size."""
    ends = flat.state.cpu().expand(2, -1)
    return Memory(ends, torch.zeros(1, rows + 1, len(flat), dtype=ends.dtype), nodes=1)


def _attack(subject: Subject, examples: Examples) -> None:
    device = next(subject.model.parameters()).device
    inputs, labels = examples.inputs.to(device), examples.targets.to(device)
    problem = Problem(partial(subject.class_logits, subject.model), inputs, labels, "linf", subject.bounds)
    auto_pgd(problem, default_epsilon("linf", subject), generator=torch.Generator().manual_seed(0), steps=CLIMB)


def _differentiated(
    guide: Callable[[torch.Tensor, Pairs], torch.Tensor], inputs: torch.Tensor, pairs: Pairs
) -> torch.Tensor:
    inputs = inputs.clone().requires_grad_()
    return torch.autograd.grad(guide(inputs, pairs).sum(), inputs, allow_unused=True, materialize_grads=True)[0]


def _product(flat: FlatModel, timed: Callable[[Callable[[], object]], float]) -> float:
    a, b = flat.state.new_ones(128, 1 << 14), flat.state.new_ones(32, 1 << 14)
    return timed(lambda: (a @ b.T).sum().item()) / (len(a) * b.numel())


def _addition(flat: FlatModel, timed: Callable[[Callable[[], object]], float]) -> float:
    a = flat.state.new_ones(1 << 22)
    return timed(lambda: torch.add(a, a, alpha=0.5)[0].item()) / len(a)

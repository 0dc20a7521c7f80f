"""A little training that a test drives itself, one call a step, so that anything can happen in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from brittle.kernel.sweep import Quadrature, sweep
from brittle.path.flat import FlatModel, state_of
from brittle.path.match import check_path
from brittle.path.recorder import Recorder
from brittle.path.replay import retrace
from brittle.path.store import PathReader
from brittle.records import Ledger, Pairs
from brittle.subject import Subject

COUNT, BATCH = 10, 4

Between = Callable[[], object]
Make = Callable[..., Optimizer]


def data(count: int = COUNT, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs (count, 4) in [0, 1] and labels of three classes."""
    inputs = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed))
    return inputs, (inputs @ torch.tensor([3.0, 5.0, 7.0, 9.0])).long() % 3


def tanh() -> nn.Sequential:
    """A small smooth network, always the same."""
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def normalized() -> nn.Sequential:
    """The same with batch normalization."""
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)))


def seeded(build: Callable[[], nn.Sequential]) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def sgd(lr: float = 0.1, **settings: Any) -> Make:
    return lambda parameters: SGD(parameters, lr, **settings)


class ByHand:
    """A model, its data, its optimizer, and its recorder; `states` are those before each step so far."""

    def __init__(
        self,
        root: Path,
        make: Make | None = None,
        model: nn.Module | None = None,
        budget: int = 1 << 30,
        optimizer: Optimizer | None = None,
        **asked: Any,
    ) -> None:
        self.root = root
        self.model = tanh() if model is None else model
        self.inputs, self.targets = data()
        self.optimizer = optimizer or (make or sgd(momentum=0.9))(self.model.parameters())
        self.recorder = Recorder(self.model, self.optimizer, root, budget, **asked)
        self.order = torch.Generator().manual_seed(0)
        self.states: list[Tensor] = []

    def draw(self, size: int = BATCH) -> Tensor:
        """The ids of the next batch."""
        return torch.randperm(COUNT, generator=self.order)[:size]

    def loss(self, ids: Tensor | Sequence[int], part: float = 1.0) -> Tensor:
        ids = torch.as_tensor(ids)
        return part * F.cross_entropy(self.model(self.inputs[ids]), self.targets[ids])

    def backward(self, ids: Tensor | Sequence[int] | None = None, part: float = 1.0) -> Tensor:
        """One forward and backward pass that the recorder is told of; returns its ids."""
        ids = self.draw() if ids is None else torch.as_tensor(ids)
        self.loss(ids, part).backward()
        self.recorder.batch(ids)
        return ids

    def spend(self) -> None:
        """The optimizer's step."""
        self.spend_by(self.optimizer.step)

    def spend_by(self, step: Between) -> None:
        """The optimizer's step by another caller; nothing is noted where it is skipped."""
        before = state_of(self.model)
        taken = self.recorder.steps
        step()
        self.states += [before] * (self.recorder.steps - taken)

    def step(self, ids: Tensor | Sequence[int] | None = None, between: Between = lambda: None) -> None:
        """Gradients anew, something in between, and the optimizer's step."""
        self.optimizer.zero_grad()
        self.backward(ids)
        between()
        self.spend()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def close(self) -> PathReader:
        """Finish the path; `states` then ends with the last one."""
        self.recorder.close()
        self.states.append(state_of(self.model))
        return PathReader(self.root)

    def subject(self, **more: Any) -> Subject:
        return Subject(more.pop("model", self.model).eval(), (self.inputs, self.targets), data(seed=9), **more)


def assert_recorded(loop: ByHand, atol: float = 1e-11, residual: float = 1e-5, **more: Any) -> PathReader:
    """The finished path is the training: replayed from its first state it passes through all others, and it adds up."""
    path, subject = loop.close(), loop.subject(**more)
    check_path(path, subject)
    assert_replays(path, subject, loop.states, atol)
    assert_adds_up(account(path, subject), 100 * atol, residual)
    return path


def assert_replays(path: PathReader, subject: Subject, states: Sequence[Tensor], atol: float = 1e-12) -> None:
    """From the first state to the last without help from those between."""
    assert path.steps == len(states) - 1
    parameters = sum(size for size, (_, _, buffer) in zip(path.sizes.tolist(), path.slots, strict=True) if not buffer)
    steps, drift = retrace(path, subject, FlatModel(subject.model), path.snapshot(0), path.snapshot(path.steps))
    for step, state in zip(steps, states, strict=False):
        assert torch.allclose(step.state[:parameters], state[:parameters], rtol=0, atol=atol), step.index
    assert drift < 1e-9


def account(path: PathReader, subject: Subject, nodes: int = 6) -> Ledger:
    """The ledger of three queries, step by step."""
    inputs = data(3, seed=50)[0]
    pairs = Pairs.of(subject.predict(inputs))
    return sweep(path, subject, inputs, pairs, Quadrature(segment=1, nodes=nodes, gauss=True)).ledger


def assert_adds_up(ledger: Ledger, unexplained: float = 1e-9, residual: float = 1e-5) -> None:
    """Of what was learned, nothing is left unexplained, and quadrature missed next to nothing."""
    learned = (ledger.output - ledger.start).abs().mean()
    assert learned > 1e-6
    assert torch.allclose(ledger.total(), ledger.output, atol=1e-12)
    assert ledger.unexplained.abs().max() <= unexplained * learned
    assert ledger.relative_residual <= residual

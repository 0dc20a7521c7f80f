"""Models whose nearest adversarial is known, in float64, and slow references for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from brittle.attacks.problem import Problem
from brittle.attacks.route import Guide
from brittle.data import Examples
from brittle.records import Norm, Pairs, Queries
from brittle.subject import Subject

CLASSES, FEATURES, COUNT = 5, 12, 20


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass
class Counter:
    """A logits function that counts its own rows, apart from any meter: by the input they stand for."""

    logits: Callable[[Tensor], Tensor]
    passes: int = field(default=0)

    def __call__(self, inputs: Tensor) -> Tensor:
        self.passes += len(inputs)
        return self.logits(inputs)


@dataclass(frozen=True)
class Linear:
    """Logits W x + b on a box."""

    weight: Tensor  # shape: (C, D)
    bias: Tensor  # shape: (C,)

    def __call__(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(1) @ self.weight.T + self.bias


def linear_problem(norm: Norm, at_bounds: bool, targeted: bool = False, seed: int = 0, count: int = COUNT) -> Problem:
    """Inputs in [-1, 3] of a random linear model; at the bounds, half of the coordinates lie on them."""
    g = generator(seed)
    model = Linear(
        torch.randn(CLASSES, FEATURES, generator=g, dtype=torch.float64),
        torch.randn(CLASSES, generator=g, dtype=torch.float64),
    )
    bounds = (-1.0, 3.0)
    inputs = 1 + torch.rand(count, FEATURES, generator=g, dtype=torch.float64) - 0.5
    if at_bounds:
        sides = torch.where(torch.rand(inputs.shape, generator=g) < 0.5, *bounds)
        inputs = torch.where(torch.rand(inputs.shape, generator=g) < 0.5, sides.double(), inputs)
    labels = model(inputs).argmax(1)
    targets = (labels + 1 + torch.arange(count) % (CLASSES - 1)) % CLASSES if targeted else None
    return Problem(model, inputs, labels, norm, bounds, targets)


def linear_distance(problem: Problem) -> Tensor:
    """The true distance of a linear model, (B,): for each rival the multiplier of the box is found by bisection.

    min |d| such that g . d <= -m within the box is solved by d = clip(-t g) in L2 and clip(-t sign g) in Linf. With
    one target every other class must fall behind it, which for targets this is a lower bound only.
    """
    model = problem.logits
    assert isinstance(model, Linear)
    best = torch.full((len(problem),), torch.inf, dtype=torch.float64)
    for b in range(len(problem)):
        x, y = problem.inputs[b], int(problem.labels[b])
        for rival in range(CLASSES):
            if rival == y or (problem.targets is not None and rival != problem.targets[b]):
                continue
            g = model.weight[y] - model.weight[rival]
            margin = g @ x + model.bias[y] - model.bias[rival]
            best[b] = min(best[b], _to_plane(x, g, margin, problem))
    return best


def _to_plane(x: Tensor, g: Tensor, margin: Tensor, problem: Problem) -> Tensor:
    way = g if problem.norm == "l2" else g.sign()
    moved = lambda t: (x - t * way).clamp(*problem.bounds) - x  # noqa: E731
    low, high = 0.0, 1e4
    if g @ moved(high) > -margin:
        return torch.tensor(torch.inf, dtype=torch.float64)
    for _ in range(80):
        half = (low + high) / 2
        low, high = (low, half) if g @ moved(half) <= -margin else (half, high)
    return moved(high).norm() if problem.norm == "l2" else moved(high).abs().max()


def linear_worst_margin(problem: Problem, epsilon: float) -> Tensor:
    """The smallest margin that a linear model has within `epsilon` of each input, (B,), by the same multiplier."""
    model = problem.logits
    assert isinstance(model, Linear)
    worst = torch.full((len(problem),), torch.inf, dtype=torch.float64)
    for b in range(len(problem)):
        x, y = problem.inputs[b], int(problem.labels[b])
        for rival in set(range(CLASSES)) - {y}:
            g = model.weight[y] - model.weight[rival]
            step = _within(x, g, epsilon, problem)
            worst[b] = min(worst[b], g @ (x + step) + model.bias[y] - model.bias[rival])
    return worst


def _within(x: Tensor, g: Tensor, epsilon: float, problem: Problem) -> Tensor:
    moved = lambda t, way: (x - t * way).clamp(*problem.bounds) - x  # noqa: E731
    if problem.norm == "linf":
        return moved(epsilon, g.sign())
    low, high = 0.0, 1e4
    for _ in range(80):
        half = (low + high) / 2
        low, high = (half, high) if moved(half, g).norm() <= epsilon else (low, half)
    return moved(low, g)


def ring_problem(norm: Norm) -> Problem:
    """Two classes in the plane: a ring from radius 1 to 2, and everything else. Inputs lie in the ring."""

    def logits(inputs: Tensor) -> Tensor:
        square = inputs.square().sum(1)
        return torch.stack([torch.zeros_like(square), (square - 1) * (4 - square)], dim=1)

    radius = torch.linspace(1.1, 1.9, COUNT, dtype=torch.float64)
    angle = torch.linspace(0.1, 6.0, COUNT, dtype=torch.float64)
    inputs = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    return Problem(logits, inputs, torch.ones(COUNT, dtype=torch.int64), norm, (-3.0, 3.0))


def ring_distance(problem: Problem) -> Tensor:
    """To the nearer of the two circles, (B,). In Linf a move of d takes |x| to at most |(|x1| + d, |x2| + d)|."""
    radius = problem.inputs.norm(dim=1)
    if problem.norm == "l2":
        return torch.minimum(radius - 1, 2 - radius)
    outward = lambda d: (problem.inputs.abs() + d[:, None]).norm(dim=1) >= 2  # noqa: E731
    inward = lambda d: (problem.inputs.abs() - d[:, None]).clamp_min(0).norm(dim=1) <= 1  # noqa: E731
    low, high = torch.zeros_like(radius), torch.full_like(radius, 2.0)
    for _ in range(60):
        half = (low + high) / 2
        out = outward(half) | inward(half)
        low, high = torch.where(out, low, half), torch.where(out, half, high)
    return high


def linear_guide(problem: Problem, groups: int = 6, evaluations: int = 7) -> Guide:
    """A mass map of a linear model: its weights as a sum of groups' weights, large parts that mostly cancel."""
    model = problem.logits
    assert isinstance(model, Linear)
    parts = 3 * torch.randn(groups, CLASSES, FEATURES, generator=generator(1), dtype=torch.float64)
    parts[-1] += model.weight - parts.sum(0)  # shape: (G, C, D)

    def mass(inputs: Tensor, pairs: Pairs) -> Tensor:
        between = parts[:, pairs.predicted] - parts[:, pairs.rival]  # shape: (G, R, D)
        return torch.einsum("grd,rd->rg", between, inputs.flatten(1))

    return Guide(mass, groups, evaluations)


class Blobs(nn.Module):
    """A small two-layer network on 1 x 4 x 4 pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


def blob_data(count: int, seed: int) -> Examples:
    """Three bright corners, noisy, in [0, 1]."""
    g = generator(seed)
    targets = torch.arange(count) % 3
    inputs = torch.rand(count, 1, 4, 4, generator=g) * 0.5
    for c, (row, column) in enumerate([(0, 0), (0, 2), (2, 0)]):
        inputs[targets == c, :, row : row + 2, column : column + 2] += 0.35
    return Examples(inputs, targets)


def blob_subject() -> Subject:
    """A trained network with its data."""
    torch.manual_seed(0)
    model, train = Blobs(), blob_data(240, 0)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train.inputs), train.targets).backward()
        optimizer.step()
    return Subject(model.eval(), train, blob_data(60, 1), bounds=(0.0, 1.0))


def right_queries(subject: Subject, count: int) -> Queries:
    """The first test inputs that the subject gets right."""
    test, logits = subject.test, subject.predict(subject.test.inputs)
    rows = (logits.argmax(1) == test.targets).nonzero()[:count, 0]
    return Queries(rows, test.inputs[rows], test.targets[rows], logits[rows], Pairs.of(logits[rows]))


def blob_problem(subject: Subject, queries: Queries, norm: Norm) -> Problem:
    logits = lambda inputs: subject.class_logits(subject.model, inputs)  # noqa: E731
    return Problem(logits, queries.inputs, queries.targets, norm, subject.bounds)

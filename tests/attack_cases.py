"""Models whose nearest adversarial is known, in float64, and slow references for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, linprog, milp, minimize
from torch import Tensor, nn

from brittle.attacks.problem import Problem
from brittle.attacks.route import Guide
from brittle.attacks.vicinity import Vicinity
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


def linear_problem(norm: Norm, at_bounds: bool, targeted: bool = False, classes: int = CLASSES) -> Problem:
    """Inputs in [-1, 3] of a random linear model; at the bounds, half of the coordinates lie on them."""
    g = generator()
    model = Linear(
        torch.randn(classes, FEATURES, generator=g, dtype=torch.float64),
        torch.randn(classes, generator=g, dtype=torch.float64),
    )
    bounds = (-1.0, 3.0)
    inputs = 1 + torch.rand(COUNT, FEATURES, generator=g, dtype=torch.float64) - 0.5
    if at_bounds:
        sides = torch.where(torch.rand(inputs.shape, generator=g) < 0.5, *bounds)
        inputs = torch.where(torch.rand(inputs.shape, generator=g) < 0.5, sides.double(), inputs)
    labels = model(inputs).argmax(1)
    targets = (labels + 1 + torch.arange(COUNT) % (classes - 1)) % classes if targeted else None
    return Problem(model, inputs, labels, norm, bounds, targets)


def linear_model(problem: Problem) -> Linear:
    """The model behind a linear problem."""
    assert isinstance(problem.logits, Linear)
    return problem.logits


def linear_vicinity(problem: Problem) -> Vicinity:
    """Networks around a linear problem's model."""
    model = linear_model(problem)
    layer = nn.Linear(*reversed(model.weight.shape), dtype=model.weight.dtype)
    layer.load_state_dict({"weight": model.weight, "bias": model.bias})
    return Vicinity(layer, lambda network, inputs: network(inputs.flatten(1)))


def linear_distance(problem: Problem) -> Tensor:
    """The true distance of a linear model, (B,): a linear or a quadratic program for each rival, solved by scipy.

    min |d| such that the rival's logit reaches that of the label (of every other class, if it is a target), within
    the box.
    """
    every = range(len(problem))
    return torch.tensor([_linear_distance(problem[slice(b, b + 1)]) for b in every], dtype=torch.float64)


def _linear_distance(problem: Problem) -> float:
    y, classes = int(problem.labels), range(len(linear_model(problem).bias))
    if problem.targets is not None:
        t = int(problem.targets)
        return _to_planes(problem, t, [c for c in classes if c != t])
    return min(_to_planes(problem, rival, [y]) for rival in classes if rival != y)


def _to_planes(problem: Problem, winner: int, losers: list[int]) -> float:
    """Distance of one input to where `winner` is level with or above all `losers`."""
    model = linear_model(problem)
    x = problem.inputs[0].numpy()
    normals = (model.weight[losers] - model.weight[winner]).numpy()  # normals . (x + d) + offsets <= 0
    offsets = normals @ x + (model.bias[losers] - model.bias[winner]).numpy()
    low, high = problem.bounds[0] - x, problem.bounds[1] - x
    if problem.norm == "linf":
        return _smallest_cube(normals, offsets, low, high)
    if problem.norm in ("l1", "l0"):
        return _fewest_or_shortest(normals, offsets, low, high, whole=problem.norm == "l0")
    found = minimize(
        lambda d: 0.5 * d @ d,
        np.zeros_like(x),
        jac=lambda d: d,
        bounds=list(zip(low, high, strict=True)),
        constraints=[{"type": "ineq", "fun": lambda d: -normals @ d - offsets, "jac": lambda d: -normals}],
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 300},
    )
    return float(np.linalg.norm(found.x)) if found.success else math.inf


def _smallest_cube(normals: np.ndarray, offsets: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """min r such that -r <= d <= r."""
    size, ones = len(low), np.ones((len(low), 1))
    rows = [
        np.hstack([normals, np.zeros((len(normals), 1))]),
        np.hstack([np.eye(size), -ones]),
        np.hstack([-np.eye(size), -ones]),
    ]
    bounds = [*zip(low, high, strict=True), (0, None)]
    sides = np.concatenate([-offsets, np.zeros(2 * size)])
    found = linprog(np.r_[np.zeros(size), 1.0], A_ub=np.vstack(rows), b_ub=sides, bounds=bounds)
    return float(found.fun) if found.success else math.inf


def _fewest_or_shortest(
    normals: np.ndarray, offsets: np.ndarray, low: np.ndarray, high: np.ndarray, whole: bool
) -> float:
    """min sum s over d such that |d| <= s; in L0 such that room s takes d in, with s whole."""
    size = len(low)
    up, down = (np.maximum(high, -low), np.maximum(high, -low)) if whole else (np.ones(size), np.ones(size))
    eye = np.eye(size)
    sides = [
        np.hstack([normals, np.zeros((len(normals), size))]),
        np.hstack([eye, -np.diag(up)]),
        np.hstack([-eye, -np.diag(down)]),
    ]
    found = milp(
        np.r_[np.zeros(size), np.ones(size)],
        constraints=LinearConstraint(np.vstack(sides), ub=np.r_[-offsets, np.zeros(2 * size)]),
        integrality=np.r_[np.zeros(size), np.full(size, int(whole))],
        bounds=Bounds(np.r_[low, np.zeros(size)], np.r_[high, np.full(size, 1 if whole else np.inf)]),
    )
    return float(found.fun) if found.success else math.inf


def linear_worst_margin(problem: Problem, epsilon: float) -> Tensor:
    """The smallest margin that a linear model has within `epsilon` of each input, (B,).

    Against one rival with normal g it lies at clip(x - t g), in Linf at clip(x - epsilon sign g).
    """
    model = linear_model(problem)
    worst = torch.full((len(problem),), torch.inf, dtype=torch.float64)
    for b in range(len(problem)):
        x, y = problem.inputs[b], int(problem.labels[b])
        for rival in set(range(len(model.bias))) - {y}:
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
    model = linear_model(problem)
    parts = 3 * torch.randn(groups, *model.weight.shape, generator=generator(1), dtype=torch.float64)
    parts[-1] += model.weight - parts.sum(0)  # shape: (G, C, D)

    def mass(inputs: Tensor, pairs: Pairs) -> Tensor:
        between = parts[:, pairs.predicted] - parts[:, pairs.rival]  # shape: (G, R, D)
        return torch.einsum("grd,rd->rg", between, inputs.flatten(1))

    return Guide(mass, torch.arange(groups) % len(model.bias), evaluations)


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

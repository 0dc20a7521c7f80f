"""What is measured: envelopes, the hole-seeking attack alone, the gain of its map, robust accuracy, and overhead."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attacks import peers
from brittle.accounts import open_path
from brittle.attacks import (
    Guide,
    Problem,
    auto_pgd,
    auto_pgd_minimal,
    ddn,
    fab,
    fmn,
    seek_holes,
    suite,
)
from brittle.attacks.envelope import envelope
from brittle.attacks.geometry import reached
from brittle.kernel.differentiable import differentiable_mass
from brittle.kernel.memory import build
from brittle.kernel.tangent import tangent_memory
from brittle.mass import class_groups
from brittle.records import AttackRows, Norm, Pairs, Queries
from brittle.subject import Subject

BUDGETS, BOOTSTRAPS, ROUNDS = (100, 1000), 2000, 5
NORMS: tuple[Norm, ...] = ("l2", "linf")
EPSILON = 0.3
"""Linf, at which robust accuracy is compared."""


def right_queries(subject: Subject, count: int) -> Queries:
    """The first test images that the network gets right."""
    test = subject.test[:1000]
    logits = subject.predict(test.inputs)
    rows = (logits.argmax(1) == test.targets).nonzero()[:count, 0]
    return Queries(rows, test.inputs[rows], test.targets[rows], logits[rows], Pairs.of(logits[rows]))


def problem_of(subject: Subject, queries: Queries, norm: Norm, cap: int | None = None) -> Problem:
    return replace(suite.problem_of(subject, queries, norm), cap=cap)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def envelopes(subject: Subject, queries: Queries, norm: Norm, preset: str) -> dict[str, Any]:
    """Our envelope over that of foolbox's attacks, with what both cost."""
    ours = suite.run(subject, queries, mass=None, groups=None, generator=generator(), preset=preset, norms=(norm,))
    best = envelope(ours, norm)
    theirs = peers.peers(subject.model, queries.inputs, queries.targets, norm, long=preset != "quick")
    nearest = torch.stack([found.distance for found in theirs]).amin(0)
    spent = best.evaluations.double().mean().item()
    allowed = sum(found.evaluations for found in theirs)
    singles = [(r.attack, r.distance, r.evaluations.double().mean().item()) for r in ours]
    for name, far, cost in singles + [(f"foolbox {f.name}", f.distance, f.evaluations) for f in theirs]:
        print(f"  {name:<22} median {_median(far):.4f}   {cost:7.0f} evaluations", flush=True)
    print(
        f"  envelopes: ours {_median(best.distance):.4f} ({spent:.0f}), theirs {_median(nearest):.4f} ({allowed:.0f})"
    )
    ratio = _median(best.distance) / _median(nearest)
    return {"ratio": ratio, "evaluations": spent, "peers_evaluations": allowed, "within_budget": spent <= allowed}


def alone(subject: Subject, queries: Queries, norm: Norm, budget: int, guide: Guide) -> dict[str, Any]:
    """The hole-seeking attack against the best single peer at the same evaluations, those of the map among them."""
    problem = problem_of(subject, queries, norm, cap=budget)
    ours = hole_seeking(problem, guide, budget)
    table: dict[str, Callable[[], AttackRows]] = {
        "FAB": lambda: fab(problem, generator=generator(), steps=budget - 12),
        "FMN": lambda: fmn(problem, generator=generator(), steps=budget - 14),
        "APGD bisection": lambda: auto_pgd_minimal(problem, generator=generator(), steps=(budget - 12) // 8),
    }
    if norm == "l2":
        table["DDN"] = lambda: ddn(problem, generator=generator(), steps=budget - 14)
    far = {name: run().distance for name, run in table.items()}
    outside = peers.ddn if norm == "l2" else peers.fmn
    found = outside(subject.model, queries.inputs, queries.targets, budget)
    far[found.name] = found.distance
    medians = {name: _median(distance) for name, distance in far.items()}
    best = min(medians, key=medians.__getitem__)
    nearest = torch.stack([distance.double() for distance in far.values()]).amin(0)
    share = (ours.distance < nearest).double().mean().item()
    print(
        f"  {budget} evaluations: hole-seeking {_median(ours.distance):.4f}, {best} {medians[best]:.4f}, {medians}",
        flush=True,
    )
    return {"ratio": _median(ours.distance) / medians[best], "best_peer": best, "smallest_share": share}


def map_gain(subject: Subject, queries: Queries, norm: Norm, budget: int, guide: Guide) -> dict[str, Any]:
    """Log distance without the map minus with it, at the same evaluations, the map's own among them.

    Without it rivals and start are random; `over_gradient` is against those that the margin's own gradient gives.
    """
    problem = problem_of(subject, queries, norm, cap=budget)
    led, unled, sloped = (hole_seeking(problem, g, budget) for g in (guide, "random", Guide.margin(problem)))
    gain, over = paired(unled, led), paired(sloped, led)
    cost = min(_rivals(budget), subject.classes - 1) * guide.evaluations
    print(f"  map, {budget} evaluations, {cost} of them its own: {_told(gain)}; over the gradient: {_told(over)}")
    spent = int(led.evaluations.max())
    return {**gain, "over_gradient": over, "evaluations": spent, "map_evaluations": cost}


def hole_seeking(problem: Problem, guide: Guide | Literal["random"], budget: int) -> AttackRows:
    """The attack at `budget` evaluations in all: what the guide does not cost goes into the descents."""
    rivals = _rivals(budget)
    asked = min(rivals, problem.logits(problem.inputs[:1]).shape[1] - 1)
    cost = 0 if guide == "random" else asked * guide.evaluations
    rows, _ = seek_holes(
        problem,
        guide,
        generator=generator(),
        steps=budget - cost,
        tracks=3 if budget < 300 else rivals,
        candidates=rivals,
        traced=False,
    )
    assert int(rows.evaluations.max()) <= budget
    return rows


def _rivals(budget: int) -> int:
    """Classes that the attack ranks."""
    return 5 if budget < 1000 else 9


def paired(others: AttackRows, ours: AttackRows) -> dict[str, float]:
    """Mean of log distance, theirs minus ours, over the inputs where both succeeded, with its 95 % interval."""
    both = ours.success & others.success
    gain = (others.distance.double().log() - ours.distance.double().log())[both]
    draws = torch.randint(len(gain), (BOOTSTRAPS, len(gain)), generator=generator())
    spread = gain[draws].mean(1)
    return {
        "gain": gain.mean().item(),
        "low": spread.quantile(0.025).item(),
        "high": spread.quantile(0.975).item(),
    }


def _told(found: dict[str, float]) -> str:
    return "{gain:+.4f} [{low:+.4f}, {high:+.4f}]".format(**found)


def guide_of(subject: Subject) -> Guide:
    """The path's map, the whole path as one segment with one node; that of one more training step where none is known.

    Built once for all inputs, at the cost of one walk along the path.
    """
    path, groups = open_path(subject), class_groups(subject)
    memory = tangent_memory(subject, groups) if path is None else build(path, subject, groups, 1, 1)
    return Guide(differentiable_mass(memory, subject), groups.classes, 2 * memory.evaluations)


def against_auto_attack(subject: Subject, queries: Queries, preset: str) -> dict[str, float] | None:
    """Robust accuracy among the images, ours minus theirs, in points; None without pyautoattack."""
    theirs = peers.auto_attack(subject.model, queries.inputs, queries.targets, EPSILON, quick=preset == "quick")
    if theirs is None:
        return None
    held, allowed = theirs
    ours = suite.run(
        subject,
        queries,
        mass=None,
        groups=None,
        generator=generator(),
        preset=preset,
        norms=("linf",),
        epsilons={"linf": EPSILON},
        enough={"linf": EPSILON},
    )
    best = envelope(ours, "linf")
    kept = (best.distance > reached(EPSILON, subject.bounds)).double().mean().item()
    spent = best.evaluations.double().mean().item()
    print(
        f"  hold within {EPSILON}: ours {kept:.1%} ({spent:.0f}), AutoAttack {held.double().mean():.1%} ({allowed:.0f})"
    )
    return {"gap": 100 * (kept - held.double().mean().item()), "evaluations_ratio": spent / allowed}


def overhead(subject: Subject, queries: Queries) -> dict[str, float]:
    """Seconds of an evaluation over those of a bare forward and backward pass of the same batch, alternating."""
    model, x, y = subject.model, queries.inputs, queries.targets
    steps = 50

    def bare() -> int:
        for _ in range(steps):
            points = x.clone().requires_grad_()
            torch.autograd.grad(F.cross_entropy(model(points), y, reduction="sum"), points)
        return steps

    def of(attack: Callable[[Problem], AttackRows], norm: Norm) -> Callable[[], int]:
        return lambda: int(attack(problem_of(subject, queries, norm)).evaluations.max())

    table = {
        "bare": bare,
        "APGD": of(lambda p: auto_pgd(p, 0.1, generator=generator(), steps=steps), "linf"),
        "DDN": of(lambda p: ddn(p, generator=generator(), steps=steps), "l2"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in table}
    for _ in range(ROUNDS + 1):
        for name, run in table.items():
            began = time.perf_counter()
            count = run()
            seconds[name].append((time.perf_counter() - began) / count)
    each = {name: median(taken[1:]) for name, taken in seconds.items()}  # the first round warms up
    return {name: each[name] / each["bare"] for name in ("APGD", "DDN")}


def _median(values: Tensor) -> float:
    return values.double().median().item()

"""What attacks returned, looked at once more: the distances, the classes predicted there, and what 8 bits keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from brittle.attacks.geometry import distance
from brittle.attacks.problem import Problem
from brittle.records import AttackRows

Verdict = Literal["pass", "warn", "fail"]

SAME = 1e-9
"""Relative difference up to which two float64 distances are the same."""

LEVELS = 255
"""Steps of an 8-bit value."""


@dataclass(frozen=True)
class Check:
    """What one check says."""

    name: str
    verdict: Verdict
    value: float  # the figure that was looked at
    sentence: str
    cost: int = 0  # evaluations


def graded(value: float, warn: float, fail: float) -> Verdict:
    """Pass up to `warn`, fail beyond `fail`. What is not a number fails."""
    if not value <= fail:
        return "fail"
    return "warn" if value > warn else "pass"


def distances(problem: Problem, rows: Sequence[AttackRows]) -> Check:
    """Reported distances against those of the tensors, in float64."""
    worst = 0.0
    for r in rows:
        far = distance(problem.inputs.cpu(), r.adversarials.cpu(), r.norm)
        off = ((r.distance.double() - far).abs() / far.clamp_min(torch.finfo(torch.float64).tiny))[r.success]
        worst = max(worst, off.max().item() if len(off) else 0.0)
    sentence = f"distances computed again in float64 differ by at most {worst:.1g}"
    return Check("distances", graded(worst, SAME, 1e-5), worst, sentence)


def labels(problem: Problem, rows: Sequence[AttackRows]) -> Check:
    """Successes that are none when the returned tensors are predicted again."""
    wrong, total = 0, 0
    for r in rows:
        truth = _succeeds(problem, r.adversarials)
        wrong, total = wrong + int((r.success.cpu() & ~truth).sum()), total + int(r.success.sum())
    share = wrong / max(total, 1)
    sentence = f"{wrong} of {total} successes are none when their tensors are predicted again"
    return Check("labels", graded(share, 0.0, 0.0), share, sentence, len(rows) * len(problem))


def eight_bits(problem: Problem, rows: Sequence[AttackRows]) -> Check:
    """Successes that a picture of 8 bits a value keeps. No failure of an attack: a warning below a half."""
    kept, total = 0, 0
    low, high = (torch.as_tensor(b) for b in problem.bounds)
    for r in rows:
        levels = ((r.adversarials.cpu() - low.cpu()) / (high - low).cpu() * LEVELS).round() / LEVELS
        truth = _succeeds(problem, (low.cpu() + levels * (high - low).cpu()).to(r.adversarials))
        kept, total = kept + int((r.success.cpu() & truth).sum()), total + int(r.success.sum())
    share = kept / max(total, 1)
    sentence = f"{share:.0%} of {total} successes survive rounding to 8 bits"
    verdict: Verdict = "pass" if share >= 0.5 or not total else "warn"
    return Check("8 bits", verdict, share, sentence, len(rows) * len(problem))


@torch.no_grad()
def _succeeds(problem: Problem, inputs: Tensor) -> Tensor:
    """Whether inputs are successes by the class predicted there, by the mean of the draws; (B,) bool on the CPU."""
    points = inputs.to(problem.inputs)
    found = torch.stack([problem.logits(points) for _ in range(problem.draws)]).mean(0).argmax(1).cpu()
    return problem.labels.cpu() != found if problem.targets is None else problem.targets.cpu() == found

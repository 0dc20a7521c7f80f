"""Can the attacks be believed? A panel of checks, each pass, warn or fail; a failed one makes the run inconclusive.

    gradients       how many inputs have a loss gradient of exactly 0, or one that is not finite or explodes
    outputs         whether the model returns probabilities in place of logits
    randomness      whether the same input gives the same logits twice
    black box       inputs that Square fooled and no attack with gradients did within the same distance
    unbounded       inputs that not even the whole box yields
    convergence     inputs that more steps fool at a distance at which no attack did
    distances       float64 distances of the returned tensors against the reported ones
    labels          predictions of the returned tensors, made again
    8 bits          successes that survive rounding to 256 levels

Sources: Carlini et al. 2019, "On evaluating adversarial robustness" (arXiv 1902.06705); Pintor et al. 2022,
"Indicators of attack failure" (arXiv 2106.09947); Croce, Hein 2020 (arXiv 2003.01690) for outputs and randomness.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from brittle.attacks.apgd import Climb, climb
from brittle.attacks.geometry import reached, room, spread
from brittle.attacks.problem import Problem
from brittle.attacks.returned import Check, distances, eight_bits, graded, labels
from brittle.attacks.search import Search
from brittle.bounds import within
from brittle.records import AttackRows

SAMPLE = 50
"""Inputs on which checks attack anew."""

STEPS = 10
"""Of each of the two losses of these attacks."""

EXPLODES = 1e8
"""Times the median gradient at which one counts as exploding."""


def examine(
    problem: Problem, rows: Sequence[AttackRows], *, generator: torch.Generator, sample: int = SAMPLE
) -> list[Check]:
    """All checks of the attacks in one norm.

    Args:
        problem: the inputs that were attacked, right when clean.
        rows: what the attacks in the problem's norm returned, on these inputs.
        sample: inputs on which checks attack anew, the first ones.

    Cost: about 4 `STEPS` evaluations for each input of the sample, 2 for each other.
    """
    rows = [r for r in rows if r.norm == problem.norm]
    some = problem[slice(0, sample)]
    checks: list[Callable[[], Check]] = [
        lambda: gradients(some, generator),
        lambda: outputs(some),
        lambda: randomness(some),
        lambda: black_box(problem, rows),
        lambda: unbounded(some, generator),
        lambda: convergence(some, rows, generator),
        lambda: distances(problem, rows),
        lambda: labels(problem, rows),
        lambda: eight_bits(problem, rows),
    ]
    return [check() for check in checks]


def verdict(checks: Sequence[Check]) -> Literal["pass", "inconclusive"]:
    """Inconclusive where a check failed."""
    return "inconclusive" if any(check.verdict == "fail" for check in checks) else "pass"


def gradients(problem: Problem, generator: torch.Generator) -> Check:
    """Zero or exploding gradients of the cross entropy, at the inputs and at a point nearby."""
    search = Search(problem)
    noise = torch.randn(problem.inputs.shape, generator=generator).to(problem.inputs)
    nearby = within(
        problem.inputs + 0.01 * spread(room(problem.inputs, problem.bounds, "linf"), noise) * noise, problem.bounds
    )
    sizes = []
    for points in (problem.inputs, nearby):
        _, _, slope = search.gradient(points, partial(_margin_loss, problem))
        sizes.append(slope.flatten(1).norm(dim=1))
    size = torch.stack(sizes)
    lost = (size == 0) | ~size.isfinite()
    finite = size[~lost]
    wild = size > EXPLODES * (finite.median() if len(finite) else 0)
    bad = (lost | wild).all(0).double().mean().item()
    return Check(
        "gradients",
        graded(bad, 0.0, 0.1),
        bad,
        f"{bad:.0%} of the inputs have a gradient that is 0, not finite, or exploding"
        + ("; attacks that follow gradients cannot see there" if bad else ""),
        int(search.evaluations.sum()),
    )


def outputs(problem: Problem) -> Check:
    """Rows that are probabilities: at least 0, with a sum of 1."""
    search = Search(problem)
    logits = search.look(problem.inputs)
    shares = ((logits >= 0).all(1) & ((logits.sum(1) - 1).abs() < 1e-3)).double().mean().item()
    found = "probabilities" if shares > 0.5 else "logits"
    remedy = "; their gradients vanish where the model is sure, return the logits before the softmax"
    return Check(
        "outputs",
        graded(shares, 0.05, 0.5),
        shares,
        f"the model returns {found}" + (remedy if shares > 0.5 else ""),
        int(search.evaluations.sum()),
    )


def randomness(problem: Problem) -> Check:
    """The same inputs twice, averaged over draws as in the attacks: a random model attacked with EOT is no failure."""
    search = Search(problem)
    first, again = search.look(problem.inputs), search.look(problem.inputs)
    scale = first.abs().amax(1).clamp_min(torch.finfo(first.dtype).tiny)
    change = ((first - again).abs().amax(1) / scale).max().item()
    drawn = problem.draws > 1
    verdict = graded(change, 1e-4, 0.5 if drawn else 1e-2)
    sentence = f"asked twice, logits differ by {change:.1g} of the largest"
    remedy = "; name more draws" if drawn else "; attack a random model with draws=10 or more"
    return Check(
        "randomness", verdict, change, sentence + (remedy if verdict != "pass" else ""), int(search.evaluations.sum())
    )


def black_box(problem: Problem, rows: Sequence[AttackRows]) -> Check:
    """Inputs that Square fooled and no attack with gradients fooled at most as far away as its epsilon."""
    blind = [r for r in rows if r.attack == "Square"]
    seeing = [r for r in rows if r.attack != "Square"]
    if not blind or not seeing:
        return Check("black box", "pass", 0.0, "no black-box attack was run beside one with gradients")
    epsilon = blind[0].epsilon or 0.0
    found = torch.stack([r.success & (r.distance <= reached(epsilon, problem.bounds)) for r in seeing]).any(0)
    ahead = blind[0].success & ~found
    share = ahead.double().mean().item()
    sentence = f"the black-box attack alone fooled {int(ahead.sum())} of {len(ahead)} inputs within {epsilon:.3g}"
    return Check("black box", graded(share, 0.0, 0.02), share, sentence)


def unbounded(problem: Problem, generator: torch.Generator) -> Check:
    """With the whole box to move in every input must yield."""
    problem = replace(problem, norm="linf")  # in which the box is a ball
    farthest = room(problem.inputs, problem.bounds, "linf")
    search = _climbed(problem, farthest, 2 * STEPS, generator)
    held = search.best.isinf().double().mean().item()
    sentence = f"{held:.0%} of the inputs hold even where the whole box is allowed"
    return Check("unbounded", graded(held, 0.0, 0.05), held, sentence, int(search.evaluations.sum()))


def convergence(problem: Problem, rows: Sequence[AttackRows], generator: torch.Generator) -> Check:
    """At the median distance of the envelope: inputs that a further attack fools and the envelope does not."""
    if problem.norm in ("l0", "l1"):
        return Check("convergence", "pass", 0.0, f"no further attack is known in {problem.norm}")
    count = len(problem)
    nearest = torch.stack([r.distance[:count] for r in rows]).amin(0) if rows else torch.full((count,), torch.inf)
    finite = nearest[nearest.isfinite()]
    if not len(finite):
        return Check("convergence", "warn", 0.0, "no attack succeeded, so that nothing says whether more steps would")
    radius = torch.full_like(room(problem.inputs, problem.bounds, problem.norm), finite.median().item())
    search = _climbed(problem, radius, 2 * STEPS, generator)
    known = (nearest <= finite.median()).to(search.best.device)
    more = (search.best.isfinite() & ~known).double().mean().item()
    sentence = (
        f"{more:.0%} of the inputs fall to {2 * STEPS} more steps at a median distance at which no attack fooled them"
    )
    return Check("convergence", graded(more, 0.0, 0.05), more, sentence, int(search.evaluations.sum()))


def _climbed(problem: Problem, radius: Tensor, steps: int, generator: torch.Generator) -> Search:
    """APGD on the cross entropy, then on the DLR where that failed, within each input's radius."""
    search = Search(problem)
    with search:
        for loss in ("ce", "dlr"):
            rows = search.best.isinf().nonzero()[:, 0]
            if len(rows):
                climb(problem, search, Climb(loss, steps // 2, early=True), problem.inputs, radius, rows, generator)
    return search


def _margin_loss(problem: Problem, logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, problem.labels, reduction="none")

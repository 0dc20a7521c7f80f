"""What the suite consists of: its attacks, the norms they work in, and their steps in each preset.

    hole-seeking     minimal   L2, Linf            led by the mass map
    DDN              minimal   L2
    FMN              minimal   L0, L1, L2, Linf
    FAB              minimal   L1, L2, Linf
    APGD bisection   minimal   L2, Linf
    neighbours       minimal   L2, Linf            from training neighbours
    vicinity         minimal   L2, Linf            by way of disturbed weights
    PGD              fixed     L2, Linf
    APGD-CE          fixed     L2, Linf
    APGD-T           fixed     L2, Linf            the DLR towards each rival
    Square           fixed     L2, Linf            black-box

A random model is asked `draws` times at each point, and its mean is attacked (EOT).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from brittle.attacks.apgd import auto_pgd
from brittle.attacks.apgd_targets import auto_pgd_targets
from brittle.attacks.bisection import auto_pgd_minimal
from brittle.attacks.ddn import ddn
from brittle.attacks.fab import fab
from brittle.attacks.fmn import fmn
from brittle.attacks.foolbox_suite import pgd
from brittle.attacks.hole_seeking import seek_holes
from brittle.attacks.isolation import Attack
from brittle.attacks.neighbours import Neighbours, from_neighbours
from brittle.attacks.route import Guide
from brittle.attacks.square import square
from brittle.attacks.vicinity import Vicinity, by_vicinity
from brittle.errors import UsageError
from brittle.records import AttackRows, Norm
from brittle.subject import Subject

ROUNDS = 8
"""Of the bisection."""

RIVALS = 5
"""Classes that APGD-T goes for, of those there are."""

Made = Callable[["Setting", int], Attack]
DENSE: tuple[Norm, ...] = ("l2", "linf")


@dataclass(frozen=True)
class Setting:
    """What the attacks of one norm are made from."""

    norm: Norm
    epsilon: float
    guide: Guide | None
    near: Neighbours
    vicinity: Vicinity
    generator: torch.Generator


@dataclass(frozen=True)
class Member:
    """An attack of the suite: the norms it works in, and how it is made for a number of steps."""

    norms: tuple[Norm, ...]
    make: Made
    fixed: bool = False  # it works within a budget of distance


def _hole_seeking(s: Setting, steps: int) -> Attack:
    tracks = _tracks(steps)
    return lambda problem: seek_holes(
        problem,
        s.guide or "gradient",
        generator=s.generator,
        steps=steps,
        tracks=tracks,
        candidates=tracks,
        traced=False,
    )[0]


def _tracks(steps: int) -> int:
    """Of the hole-seeking attack, and the rivals that it asks about."""
    return 3 if steps < 300 else 5 if steps < 1000 else 9


def _targets(s: Setting, steps: int) -> Attack:
    return partial(
        auto_pgd_targets, epsilon=s.epsilon, generator=s.generator, steps=max(1, steps // RIVALS), targets=RIVALS
    )


def _minimal(attack: Callable[..., AttackRows]) -> Made:
    return lambda s, steps: partial(attack, generator=s.generator, steps=steps)


def _within(attack: Callable[..., AttackRows]) -> Made:
    return lambda s, steps: partial(attack, epsilon=s.epsilon, generator=s.generator, steps=steps)


SUITE: dict[str, Member] = {
    "hole-seeking": Member(DENSE, _hole_seeking),
    "DDN": Member(("l2",), _minimal(ddn)),
    "FMN": Member(("l0", "l1", "l2", "linf"), _minimal(fmn)),
    "FAB": Member(("l1", "l2", "linf"), _minimal(fab)),
    "APGD bisection": Member(
        DENSE, lambda s, steps: partial(auto_pgd_minimal, generator=s.generator, rounds=ROUNDS, steps=steps // ROUNDS)
    ),
    "neighbours": Member(
        DENSE, lambda s, steps: partial(from_neighbours, near=s.near, generator=s.generator, steps=steps)
    ),
    "vicinity": Member(
        DENSE, lambda s, steps: partial(by_vicinity, vicinity=s.vicinity, generator=s.generator, steps=steps)
    ),
    "PGD": Member(DENSE, _within(pgd), fixed=True),
    "APGD-CE": Member(DENSE, _within(auto_pgd), fixed=True),
    "APGD-T": Member(DENSE, _targets, fixed=True),
    "Square": Member(DENSE, _within(square), fixed=True),
}
"""By the name that their rows carry; `brittle attack --attack` takes them in any case."""

BUDGETS: dict[str, dict[str, int]] = {
    "quick": {
        "hole-seeking": 100,
        "DDN": 100,
        "FMN": 60,
        "APGD bisection": 120,
        "vicinity": 100,
        "APGD-CE": 20,
        "Square": 50,
    },
    "standard": {
        "hole-seeking": 300,
        "DDN": 200,
        "FMN": 200,
        "FAB": 150,
        "APGD bisection": 400,
        "neighbours": 60,
        "vicinity": 1150,
        "PGD": 40,
        "APGD-CE": 100,
        "APGD-T": 250,
        "Square": 500,
    },
    "thorough": {
        "hole-seeking": 1000,
        "DDN": 1000,
        "FMN": 500,
        "FAB": 500,
        "APGD bisection": 1200,
        "neighbours": 150,
        "vicinity": 2000,
        "PGD": 200,
        "APGD-CE": 200,
        "APGD-T": 900,
        "Square": 2000,
    },
}
"""Steps of each attack, about its evaluations an input; what the mass map costs comes on top."""

QUICK_NORMS: dict[str, tuple[Norm, ...]] = {"FMN": ("l0", "l1", "linf")}
"""Norms to which the quick preset keeps an attack: in L2 it has DDN."""


def members(preset: str, norm: Norm, attacks: Sequence[str] | None = None) -> dict[str, int]:
    """The attacks of a preset in one norm, or those that are asked for, with their steps.

    Raises `UsageError` where one does not exist, or does not know the norm.
    """
    steps = BUDGETS["standard"] | BUDGETS[preset]
    if attacks is None:
        kept = QUICK_NORMS if preset == "quick" else {}
        return {name: n for name, n in BUDGETS[preset].items() if norm in kept.get(name, SUITE[name].norms)}
    names = {name.lower(): name for name in SUITE}
    chosen = {}
    for asked in attacks:
        name = names.get(asked.lower())
        if name is None:
            raise UsageError(f"attacks are {', '.join(SUITE)}, found {asked!r}; name one of them")
        if norm not in SUITE[name].norms:
            raise UsageError(
                f"{name} works in {', '.join(SUITE[name].norms)}, found {norm}; name another norm or attack"
            )
        chosen[name] = steps[name]
    return chosen


def most_evaluations(preset: str, norms: Sequence[Norm] = DENSE) -> int:
    """About what an input costs in a preset, but for the mass map."""
    return sum(sum(members(preset, norm).values()) for norm in norms)


def candidates(preset: str) -> int:
    """Rivals that the mass map is asked about."""
    return _tracks(BUDGETS[preset]["hole-seeking"])


def default_epsilon(norm: Norm, subject: Subject) -> float:
    """A tenth of the bounds' mean width in Linf; in L2 half of the way to the corner of that cube.

    For 28 x 28 inputs in [0, 1] that is 1.4, for 8 x 8 ones 0.4: about the median distance of a plain network. In L1
    a hundredth of the whole width, in L0 a fiftieth of the numbers.
    """
    low, high = (torch.as_tensor(b, dtype=torch.float64) for b in subject.bounds)
    each, count = 0.1 * (high - low).mean().item(), float(subject.test.inputs[0].numel())
    return {"linf": each, "l2": 0.5 * each * count**0.5, "l1": 0.1 * each * count, "l0": max(1.0, count / 50)}[norm]

"""What is known of an image before it is attacked: the baselines' side, and ours.

The baselines get every score of `brittle.agreement.baselines` in the network's norm, margins after one step and after
as many as ours takes, and the same with *all* passes of ours counted, those through the path's weights too, at a
distance that labels chose (the calibration images' median, which a median first-order distance can miss widely); the
predicted and the rival class, all logits, and probabilities averaged over the late path with their lead.

Ours are two short searches (`brittle.attacks.reach`) that share `FINAL_PASSES` through the final weights: one from the
image, and one from where `PATH_PASSES` through states of the last quarter of the path, taken in turn, have led. Of each
the scores are where the margin would vanish: at the end, at least, and on average over the last passes; the nearer of
both ends stands for itself as well. The path's passes tell the same of themselves, and how far its states disagree. The
search without the path stands beside it, with all of the passes through the final weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from brittle.agreement.baselines import baselines
from brittle.agreement.baselines.gradients import lead_after
from brittle.attacks.problem import Logits
from brittle.attacks.reach import Reach, reach
from brittle.attacks.suite import problem_of
from brittle.path.flat import FlatModel
from brittle.path.replay import Path
from brittle.records import Norm, Queries
from brittle.scores import late_path, late_probabilities
from brittle.subject import Subject

FINAL_PASSES, PATH_PASSES = 10, 48
STATES, LATE = 8, 0.75
"""States of the path that are searched through, from this share of the training on."""

FIRST_STEPS, PATH_STEPS = (1.0, 0.3), (2.0, 0.2)
LAST, LAST_GROWTH = (0.5, 0.1), (0.1, 0.01)
"""First and last length of a step, in units of the radius, and share by which it may change."""


@dataclass(frozen=True)
class Side:
    """Named columns of scores; `marks` are those that only say which class."""

    names: tuple[str, ...]
    values: Tensor  # shape: (M, F) float64
    marks: Tensor  # shape: (F,) bool

    @classmethod
    def of(cls, scores: dict[str, Tensor], marks: dict[str, Tensor] | None = None) -> Side:
        """Columns (M,) and (M, K); the latter are numbered."""
        columns, names, kinds = [], [], []
        for mark, part in ((False, scores), (True, marks or {})):
            for name, value in part.items():
                wide = value[:, None] if value.dim() == 1 else value
                columns.append(wide.double())
                names += [name] if value.dim() == 1 else [f"{name} {k}" for k in range(wide.shape[1])]
                kinds += [mark] * wide.shape[1]
        return cls(tuple(names), torch.cat(columns, 1), torch.tensor(kinds))

    def __add__(self, other: Side) -> Side:
        return Side(
            self.names + other.names,
            torch.cat([self.values, other.values], 1),
            torch.cat([self.marks, other.marks]),
        )

    def __getitem__(self, name: str) -> Tensor:
        return self.values[:, self.names.index(name)]

    @property
    def scores(self) -> tuple[str, ...]:
        """Columns that are a score by themselves: neither a class nor one of a numbered set."""
        return tuple(name for name in self.names if not name[-1].isdigit())


def theirs(
    subject: Subject, path: Path, queries: Queries, norm: Norm, passes: int, every_pass: int, typical: float
) -> Side:
    """All baselines together. passes: through the final weights; every_pass: the path's too; typical: a distance."""
    at = lambda steps: -lead_after(subject, queries, typical, norm, steps)  # noqa: E731
    late = late_probabilities(path, subject, queries.inputs)
    scores = {
        **baselines(subject, queries, norm, passes=passes),
        "margin after one step, typical distance": at(1),
        f"margin after {passes} steps, typical distance": at(passes),
        f"margin after {every_pass} steps, typical distance": at(every_pass),
        "late path": late_path(late, queries.pairs),
        "late log probability": late.clamp_min(torch.finfo(late.dtype).tiny).log(),
        "logit": queries.logits,
    }
    which = {"predicted": queries.pairs.predicted, "rival": queries.pairs.rival}
    return Side.of(scores, {name: F.one_hot(value, subject.classes) for name, value in which.items()})


def alone(subject: Subject, queries: Queries, norm: Norm, typical: float) -> Side:
    """The search from the image with all passes through the final weights, and no path."""
    found = reach(problem_of(subject, queries, norm), FINAL_PASSES, radius=_level(queries, typical), length=FIRST_STEPS)
    return Side.of({f"search alone: {name}": value for name, value in _told(found).items()})


def ours(subject: Subject, path: Path, queries: Queries, norm: Norm, typical: float) -> Side:
    """Half of the passes from the image, half from where the path's states have led."""
    problem, level = problem_of(subject, queries, norm), _level(queries, typical)
    here = reach(problem, FINAL_PASSES // 2, radius=level, length=FIRST_STEPS)
    led = reach(problem, PATH_PASSES, through=late_states(subject, path), radius=level, length=PATH_STEPS)
    there = reach(
        problem, FINAL_PASSES - FINAL_PASSES // 2, start=led.points, radius=led.radius, length=LAST, growth=LAST_GROWTH
    )
    parts = {"from the image": here, "from the path": there, "along the path": led}
    told = {f"{part}: {name}": value for part, found in parts.items() for name, value in _told(found).items()}
    spread = led.roots[-STATES:].std(0) / led.radius
    return Side.of(
        {"nearer of both": -torch.minimum(here.radius, there.radius), **told, "along the path: spread": spread}
    )


def late_states(subject: Subject, path: Path) -> list[Logits]:
    """The network at `STATES` stored states of the late path, evenly spaced, the final one left out."""
    marks = torch.tensor([mark for mark in path.marks if LATE * path.steps <= mark < path.steps])
    models = []
    for mark in marks[torch.linspace(0, len(marks) - 1, STATES).round().long()].unique().tolist():
        flat = FlatModel(subject.model)
        flat.load(path.snapshot(mark).state)
        models.append(partial(subject.class_logits, flat.eval()))
    return models


def _level(queries: Queries, typical: float) -> Tensor:
    """The radius that each search begins with, (M,)."""
    return torch.full((len(queries),), typical)


def _told(found: Reach) -> dict[str, Tensor]:
    """Minus distances, so that higher means brittler."""
    roots = found.roots
    return {"radius": -found.radius, "least root": -roots.amin(0), "mean of three roots": -roots[-3:].mean(0)}

"""The hole-seeking attack as an attack of foolbox's: for its models, its criteria and its `epsilons`.

    attack = HoleSeekingAttack(norm="l2", steps=300)
    raw, clipped, success = attack(fmodel, images, labels, epsilons=[0.5, 1.0, None])
    attack.rows, attack.route          what the last run found, cost, and which way it went

As in every minimal-norm attack of foolbox's, `epsilons` without None let an input go once it is fooled within the
smallest of them. It runs on PyTorch models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from brittle.attacks.foolbox_suite import foolbox
from brittle.attacks.hole_seeking import seek_holes
from brittle.attacks.problem import Problem
from brittle.attacks.route import Guide, Route
from brittle.errors import UsageError
from brittle.records import AttackRows

Base: Any = foolbox().attacks.base.MinimizationAttack


class HoleSeekingAttack(Base):
    """foolbox's interface to `seek_holes`.

    Args:
        norm: l2 or linf.
        guide: the mass map; or what ranks rivals without one.
        steps, tracks, candidates: as in `seek_holes`.
        seed: of what is random; every run draws anew from it.
    """

    def __init__(
        self,
        norm: Literal["l2", "linf"] = "l2",
        *,
        guide: Guide | Literal["gradient", "random"] = "gradient",
        steps: int = 100,
        tracks: int = 3,
        candidates: int = 5,
        seed: int = 0,
    ) -> None:
        if norm not in ("l2", "linf"):
            raise UsageError(f"the hole-seeking attack works in l2 and linf, found {norm!r}; name one of them")
        self.norm, self.guide, self.seed = norm, guide, seed
        self.steps, self.tracks, self.candidates = steps, tracks, candidates
        self.rows: AttackRows | None = None
        self.route: Route | None = None

    @property
    def distance(self) -> Any:
        """foolbox's measure of this norm."""
        return foolbox().distances.l2 if self.norm == "l2" else foolbox().distances.linf

    def run(self, model: Any, inputs: Any, criterion: Any, *, early_stop: float | None = None, **unknown: Any) -> Any:
        """The nearest successes, of the type of `inputs`; the input itself where there is none."""
        if unknown:
            raise TypeError(f"attack got an unexpected keyword argument {next(iter(unknown))!r}")
        eager, restore = _eagerpy().astensor_(inputs)
        images = eager.raw
        if not isinstance(images, Tensor):
            raise UsageError(f"the hole-seeking attack runs on PyTorch models, found {type(images).__name__}")
        labels, targets = _goal(criterion, model, images)
        low, high = model.bounds
        problem = Problem(model, images, labels, self.norm, (low, high), targets, enough=early_stop)
        self.rows, self.route = seek_holes(
            problem,
            self.guide,
            generator=torch.Generator().manual_seed(self.seed),
            steps=self.steps,
            tracks=self.tracks,
            candidates=self.candidates,
        )
        return restore(_eagerpy().astensor(self.rows.adversarials))


def _goal(criterion: Any, model: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Labels and targets. Where a target alone is known, labels are what the model says."""
    criteria = foolbox().criteria
    criterion = criterion if isinstance(criterion, criteria.Criterion) else criteria.Misclassification(criterion)
    if isinstance(criterion, criteria.Misclassification):
        return criterion.labels.raw.long(), None
    if isinstance(criterion, criteria.TargetedMisclassification):
        with torch.no_grad():
            return model(images).argmax(1), criterion.target_classes.raw.long()
    raise UsageError(
        f"the criterion must be Misclassification or TargetedMisclassification, found {type(criterion).__name__}"
    )


def _eagerpy() -> Any:
    import eagerpy

    return eagerpy

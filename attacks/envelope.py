"""The envelope: for each input the smallest distance at which any attack succeeded.

No attack is the best everywhere; on an adversarially trained network a popular one alone overstates the distance by
a factor (Cinà et al. 2024, "AttackBench", arXiv 2404.19460). A success within a fixed budget counts at the distance
where it really lies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from brittle.records import AttackRows, Norm


def envelope(rows: Sequence[AttackRows], norm: Norm) -> AttackRows:
    """The nearest success of each input over all attacks in one norm, and what all of them cost together."""
    every = _of_norm(rows, norm)
    winner = torch.stack([r.distance for r in every]).argmin(0)
    pick = lambda name: torch.stack([getattr(r, name) for r in every])[winner, torch.arange(len(winner))]  # noqa: E731
    return AttackRows(
        attack="envelope",
        norm=norm,
        kind="minimal",
        adversarials=pick("adversarials"),
        distance=pick("distance"),
        success=pick("success"),
        new_class=pick("new_class"),
        evaluations=torch.stack([r.evaluations for r in every]).sum(0),
    )


def smallest(rows: Sequence[AttackRows], norm: Norm) -> dict[str, Tensor]:
    """By attack, the inputs on which it came as near as any: (M,) bool. Nearest together, all of them count."""
    every = _of_norm(rows, norm)
    least = envelope(every, norm).distance
    return {r.attack: r.success & (r.distance <= least) for r in every}


def _of_norm(rows: Sequence[AttackRows], norm: Norm) -> list[AttackRows]:
    return [r for r in rows if r.norm == norm]

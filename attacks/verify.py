"""No attack is believed: what it returned is measured and classified again.

A row stands only if its adversarial lies within the bounds, within epsilon where there is one, and is misclassified
by the audited model. Distances are those of the tensors returned, in float64.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from brittle.attacks.geometry import distance, reached, spread
from brittle.records import OUTCOMES, AttackRows, Queries
from brittle.subject import Subject

FOOLED = OUTCOMES.index("fooled")


def verified(rows: AttackRows, subject: Subject, queries: Queries) -> AttackRows:
    """The same rows with distance, success and new class found anew; what does not stand becomes a failure.

    Cost: one forward pass an input, not counted among the attack's evaluations.
    """
    (low, high), found = subject.bounds, rows.adversarials
    fine = found.isfinite() & (found >= low) & (found <= high)
    wrong, stands = _wrong(rows), rows.success & fine.flatten(1).all(1)
    far = distance(queries.inputs, rows.adversarials, rows.norm)
    if rows.epsilon is not None:
        stands &= far <= reached(rows.epsilon, subject.bounds)
    inputs = torch.where(spread(stands, rows.adversarials), rows.adversarials, queries.inputs)
    classes = subject.predict(inputs).argmax(1)
    stands &= classes != queries.targets
    return replace(
        rows,
        adversarials=torch.where(spread(stands, inputs), inputs, queries.inputs),
        distance=torch.where(stands, far, torch.where(wrong, 0.0, torch.inf)),
        success=stands,
        new_class=torch.where(stands, classes, queries.pairs.predicted),
        outcome=None if rows.outcome is None else torch.where(rows.outcome == FOOLED, stands.long(), rows.outcome),
    )


def _wrong(rows: AttackRows) -> Tensor:
    """Inputs that were wrong before the attack, (M,) bool."""
    if rows.outcome is None:
        return torch.zeros_like(rows.success)
    return rows.outcome == OUTCOMES.index("wrong")

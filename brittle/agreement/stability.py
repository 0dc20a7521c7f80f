"""Whether holes come back: the same regions of the same inputs, found again after another training.

Each training of a subject, with another seed, makes its own path, map and holes; their rules are asked of the same
sealed inputs. For a hole A of one training and the holes B of another,

    best(A) = max_B |A and B| / |A or B|

and the stability is its mean over all holes and all ordered pairs of trainings: 1 where every region comes back whole.
Holes of one class overlap by chance as well, so beside it stands what is left where the inputs of each class are dealt
anew in every other training. Three trainings of the digits' network gave .37 with 200 queries and .34 with 340, .13 by
chance. A retraining must be recorded to have holes, and `Subject.retrain` gives a model without a
path; so this is for those who can train and record again, benchmarks among them, and not part of an audit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.agreement.regions import stand_ins

DRAWS = 100


@dataclass(frozen=True)
class Stability:
    """Mean best overlap of holes over trainings; both None where no training has a hole to look for in another."""

    overlap: float | None
    chance: float | None


def hole_stability(inside: Sequence[Tensor], classes: Tensor, generator: torch.Generator) -> Stability:
    """Mean best Jaccard overlap of holes, and the same by chance.

    Args:
        inside: for each of two or more trainings (H, M) bool, what its holes' rules say of the M inputs. Holes without
            members are left out; a training without holes finds nothing again.
        classes: (M,), within which inputs are dealt anew.
    """
    deals = stand_ins(classes, DRAWS, generator)
    found, by_chance = [], []
    for k, own in enumerate(inside):
        for other in (rows for j, rows in enumerate(inside) if j != k):
            kept = own[own.any(1)]
            found.append(best_overlap(kept, other))
            by_chance.append(torch.stack([best_overlap(kept, other[:, deal]) for deal in deals]).mean(0))
    every = torch.cat(found) if found else torch.zeros(0)
    if not len(every):
        return Stability(None, None)
    return Stability(every.mean().item(), torch.cat(by_chance).mean().item())


def best_overlap(own: Tensor, other: Tensor) -> Tensor:
    """Largest Jaccard overlap of each region of one set with those of another. (H, M), (H', M) bool -> (H,)."""
    a, b = own.double(), other.double()
    common = a @ b.T
    union = a.sum(1)[:, None] + b.sum(1) - common
    return torch.cat([common / union.clamp_min(1), torch.zeros(len(a), 1, dtype=torch.float64)], dim=1).amax(1)

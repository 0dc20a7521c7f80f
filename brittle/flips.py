"""The worst flips: sealed queries whose prediction falls soonest, by attack and by ordinary probes.

Their training examples are accounted for twice, before and after, with the output fixed as the margin of the
clean prediction over what it became: who left and who arrived is read from the difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from brittle.outcomes import LEVELS, Observed
from brittle.probes import Family
from brittle.records import AttackRows, Pairs, Queries

BY_ATTACK, BY_PROBE = (3, 2), 3
"""Flips shown by attack in each norm, and by ordinary probes, one a family."""


@dataclass(frozen=True)
class Flips:
    """Flips by how they came about; the output of each is the margin of `pairs`."""

    rows: Tensor  # shape: (K,) positions among the sealed queries
    before: Tensor  # shape: (K, *input)
    after: Tensor  # shape: (K, *input)
    pairs: Pairs  # the clean prediction, and what it became
    how: tuple[str, ...]
    size: tuple[float, ...]
    unit: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)


def worst_flips(
    sealed: Queries,
    right: Tensor,
    envelopes: Sequence[AttackRows],
    observed: Observed,
    families: Sequence[Family],
    draws: Mapping[str, Tensor],
) -> Flips:
    """Sure predictions that fall soonest: the largest margin lost per unit of distance or severity, each query once.

    Args:
        right: (K',) positions of the attacked queries among the sealed ones.
        envelopes: the smallest adversarials, rows as in `right`.
        observed: of the sealed queries. draws: of the sealed queries.
    """
    found: list[_Flip] = []
    for count, envelope in zip(BY_ATTACK, envelopes, strict=False):
        steepness = sealed.margin[right] / envelope.distance.to(sealed.margin)  # 0 where no attack succeeded
        for row in _steepest(steepness, taken={f.row for f in found}, positions=right)[:count]:
            size, became = envelope.distance[row].item(), int(envelope.new_class[row])
            found.append(_Flip(int(right[row]), envelope.adversarials[row], became, "attack", size, envelope.norm))
    for f in _commonest(sealed, observed, families)[:BY_PROBE]:
        flip = _by_probe(sealed, observed, f, families[f], draws, {f.row for f in found})
        found += [flip] if flip else []
    rows = torch.tensor([f.row for f in found], dtype=torch.int64)
    return Flips(
        rows=rows,
        before=sealed.inputs[rows],
        after=torch.stack([f.after for f in found]) if found else sealed.inputs[:0],
        pairs=Pairs(sealed.pairs.predicted[rows], torch.tensor([f.became for f in found], dtype=torch.int64)),
        how=tuple(f.how for f in found),
        size=tuple(f.size for f in found),
        unit=tuple(f.unit for f in found),
    )


class _Flip(NamedTuple):
    row: int
    after: Tensor
    became: int
    how: str
    size: float
    unit: str


def _steepest(steepness: Tensor, taken: set[int], positions: Tensor) -> list[int]:
    """Rows of positive steepness, steepest first, without those whose position is taken."""
    order = steepness.argsort(descending=True).tolist()
    return [row for row in order if steepness[row] > 0 and int(positions[row]) not in taken]


def _commonest(sealed: Queries, observed: Observed, families: Sequence[Family]) -> list[int]:
    """Ordinary families (directions where there are no others), most failures first."""
    failed = observed.failed(sealed.targets)[sealed.right].sum(0)
    usual = [f for f, family in enumerate(families) if family.unit != "L2"] or list(range(len(families)))
    return sorted(usual, key=lambda f: -int(failed[f]))


def _by_probe(
    sealed: Queries, observed: Observed, f: int, family: Family, draws: Mapping[str, Tensor], taken: set[int]
) -> _Flip | None:
    """The steepest flip of one family; None where none of its failures is left."""
    level = observed.severity(sealed.targets)[:, f]
    steepness = torch.where(sealed.right, sealed.margin / level.to(sealed.margin), 0)
    rows = _steepest(steepness, taken, torch.arange(len(sealed)))
    if not rows:
        return None
    m = rows[0]
    size = level[m].item() * family.reference
    severity = sealed.inputs.new_full((1,), size)
    probe = family.apply(sealed.inputs[m : m + 1], severity, draws[family.name][m : m + 1])[0]
    became = int(observed.classes[m, f, LEVELS.index(level[m].item())])
    return _Flip(m, probe, became, family.name, size, family.unit)

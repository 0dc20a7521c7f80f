"""The worst flips: sealed queries whose prediction falls soonest, by attack and by ordinary probes.

Their training examples are accounted for twice, before and after, with the output fixed as the margin of the
clean prediction over what it became: who left and who arrived is read from the difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.outcomes import LEVELS, Observed
from brittle.probes import Family
from brittle.records import AttackRows, Pairs, Queries

BY_ATTACK, BY_PROBE = 5, 3


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
    """The nearest adversarials in each norm, then ordinary probes that flip at the mildest level.

    Args:
        right: (K',) positions of the attacked queries among the sealed ones.
        envelopes: the smallest adversarials, rows as in `right`.
        observed: of the sealed queries. draws: of the sealed queries.
    """
    found: list[tuple[int, Tensor, int, str, float, str]] = []
    for k, envelope in enumerate(envelopes):
        count = BY_ATTACK - BY_ATTACK // 2 if k == 0 else BY_ATTACK // 2
        for row in envelope.distance.argsort()[:count].tolist():
            if envelope.success[row]:
                size, norm = envelope.distance[row].item(), envelope.norm
                item = (envelope.adversarials[row], int(envelope.new_class[row]), "attack", size, norm)
                found.append((int(right[row]), *item))
    found += _by_probe(sealed, observed, families, draws)
    rows = torch.tensor([f[0] for f in found], dtype=torch.int64)
    after = torch.stack([f[1] for f in found]) if found else sealed.inputs[:0]
    became = torch.tensor([f[2] for f in found], dtype=torch.int64)
    return Flips(
        rows=rows,
        before=sealed.inputs[rows],
        after=after,
        pairs=Pairs(sealed.pairs.predicted[rows], became),
        how=tuple(f[3] for f in found),
        size=tuple(f[4] for f in found),
        unit=tuple(f[5] for f in found),
    )


def _by_probe(
    sealed: Queries, observed: Observed, families: Sequence[Family], draws: Mapping[str, Tensor]
) -> list[tuple[int, Tensor, int, str, float, str]]:
    """For the families with the most failures, the query that was surest and still failed at the mildest level."""
    severity = observed.severity(sealed.targets)
    severity[~sealed.right] = torch.inf
    usual = [f for f, family in enumerate(families) if family.unit != "L2"] or list(range(len(families)))
    ranked = sorted(usual, key=lambda f: -int(severity[:, f].isfinite().sum()))
    found = []
    for f in ranked[:BY_PROBE]:
        level, row = severity[:, f].min(0)
        if not level.isfinite():
            continue
        family, m = families[f], int(row)
        size = level.item() * family.reference
        probe = family.apply(sealed.inputs[m : m + 1], torch.tensor([size]), draws[family.name][m : m + 1])[0]
        became = int(observed.classes[m, f, LEVELS.index(level.item())])
        found.append((m, probe, became, family.name, size, family.unit))
    return found

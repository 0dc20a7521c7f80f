"""Holes: predicted failure regions.

A query is predicted to fail under a family where its margin is predicted to be gone by the family's reference
severity. Queries whose mass then leaks from the same class of training examples to the same class form a *hole*,
over all families at once. A hole has

    a place      its members, and the exemplar whose shift is most like the others'
    a direction  the families that open it, and the flow of mass: from, to
    a size       the predicted severity at which members flip, with its spread
    a rule       `membership`: of any new input it says, without attacking it, whether it lies in the hole

Holes are ranked by predicted failure rate times support. A hole is a prediction; `agreement` tests it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from brittle.records import Groups, ShiftMap
from brittle.shift import Flow, flow, gone_at

MOST = 15
LEAST_SUPPORT = 3
SMALL = 6
"""Members below which flows from one class are taken together, whatever class they go to."""
OVERLAP = 0.5
"""Jaccard overlap of members from which two holes are one."""


@dataclass(frozen=True)
class Leak:
    """How the mass of M queries leaks under F families: what holes are made of, and what their rule reads."""

    share: Tensor  # shape: (M, F), predicted severity as a share of the reference; fails where at most 1
    from_class: Tensor  # shape: (M, F) class of the group that leaves
    to_class: Tensor  # shape: (M, F) class of the group that arrives
    from_group: Tensor  # shape: (M, F)
    to_group: Tensor  # shape: (M, F)
    shift: Tensor  # shape: (M, F, G) at the larger severity


@dataclass(frozen=True)
class Region:
    """A hole before its test. Flows are pairs of classes: one, or several that were merged."""

    flows: tuple[tuple[int, int], ...]
    families: tuple[int, ...]  # those that open it, strongest first
    members: Tensor  # shape: (support,) positions among the queries
    family_of: Tensor  # shape: (support,) family under which each member flips soonest
    share: Tensor  # shape: (support,) predicted severity there, as a share of the reference
    rate: Tensor  # shape: (support,) predicted probability of failure at the reference
    from_group: int
    to_group: int
    exemplar: int

    @property
    def support(self) -> int:
        return len(self.members)

    @property
    def predicted_rate(self) -> float:
        return self.rate.mean().item()


def leak_of(shift: ShiftMap, groups: Groups) -> Leak:
    """Where the mass of each query flows under each family."""
    found: Flow = flow(shift, groups)
    return Leak(
        share=gone_at(shift) / shift.reference,
        from_class=groups.classes[found.leaving],
        to_class=groups.classes[found.arriving],
        from_group=found.leaving,
        to_group=found.arriving,
        shift=shift.shift[:, :, -1],
    )


def find_holes(leak: Leak, families: Sequence[int], rate: Callable[[Tensor], Tensor], most: int = MOST) -> list[Region]:
    """At most `most` holes, ranked by predicted failure rate times support.

    Args:
        leak: of the queries from which holes are made.
        families: the families that count, as columns of `leak`.
        rate: calibrated probability of failure at the reference, from predicted shares: (n,) -> (n,).
    """
    columns = torch.tensor(families)
    fails = leak.share[:, columns] <= 1  # shape: (M, F')
    keys = torch.stack([leak.from_class[:, columns], leak.to_class[:, columns]], dim=-1)[fails]
    flows = [tuple(f) for f in keys.unique(dim=0).tolist()] if len(keys) else []
    members = {f: _inside(leak, [f], families) for f in flows}
    groups_of_flows = _merge_overlapping([(joined, _inside(leak, joined, families)) for joined in _pool_small(members)])
    found = [_region(leak, flows, families, rate) for flows in groups_of_flows]
    kept = [r for r in found if r.support >= LEAST_SUPPORT]
    return sorted(kept, key=lambda r: r.predicted_rate * r.support, reverse=True)[:most]


def membership(region: Region, leak: Leak) -> tuple[Tensor, Tensor]:
    """The rule: which inputs lie in the hole, and the family under which each would flip soonest.

    Reads predictions only. Returns ((M,) bool, (M,) family).
    """
    share = _shares(leak, region.flows, region.families)
    least, which = share.min(1)
    return least <= 1, torch.tensor(region.families)[which]


def _inside(leak: Leak, flows: Sequence[tuple[int, int]], families: Sequence[int]) -> Tensor:
    return (_shares(leak, flows, families) <= 1).any(1)


def _shares(leak: Leak, flows: Sequence[tuple[int, int]], families: Sequence[int]) -> Tensor:
    """Predicted shares where the mass takes one of the flows, infinite elsewhere: (M, F')."""
    columns = torch.tensor(families)
    a, b = leak.from_class[:, columns], leak.to_class[:, columns]
    along = torch.zeros_like(a, dtype=torch.bool)
    for start, end in flows:
        along |= (a == start) & (b == end)
    return torch.where(along, leak.share[:, columns], torch.inf)


def _pool_small(members: dict[tuple[int, int], Tensor]) -> list[tuple[tuple[int, int], ...]]:
    """Flows with few members are joined by the class that they leave, the largest first."""
    size = {f: int(rows.sum()) for f, rows in members.items()}
    pooled: dict[int, list[tuple[int, int]]] = {}
    for f in sorted(members, key=lambda f: -size[f]):
        if size[f] < SMALL:
            pooled.setdefault(f[0], []).append(f)
    return [(f,) for f in members if size[f] >= SMALL] + [tuple(flows) for flows in pooled.values()]


def _merge_overlapping(
    parts: list[tuple[tuple[tuple[int, int], ...], Tensor]],
) -> list[tuple[tuple[int, int], ...]]:
    """Join flows whose members overlap by `OVERLAP` or more, largest first, until no two do."""
    merged: list[tuple[tuple[tuple[int, int], ...], Tensor]] = []
    for flows, members in sorted(parts, key=lambda p: int(p[1].sum()), reverse=True):
        for k, (other_flows, other) in enumerate(merged):
            if (members & other).sum() >= OVERLAP * (members | other).sum():
                merged[k] = (other_flows + flows, members | other)
                break
        else:
            merged.append((flows, members))
    return [flows for flows, _ in merged] if len(merged) == len(parts) else _merge_overlapping(merged)


def _region(
    leak: Leak,
    flows: tuple[tuple[int, int], ...],
    families: Sequence[int],
    rate: Callable[[Tensor], Tensor],
) -> Region:
    shares = _shares(leak, flows, families)
    members = (shares <= 1).any(1).nonzero()[:, 0]
    share, which = shares[members].min(1)
    family_of = torch.tensor(families)[which]
    main = (leak.from_class[members, family_of] == flows[0][0]) & (leak.to_class[members, family_of] == flows[0][1])
    main = main if main.any() else torch.ones_like(main)
    counts = torch.bincount(family_of, minlength=leak.share.shape[1])
    opened = [int(f) for f in counts.argsort(descending=True, stable=True) if counts[f] > 0]
    return Region(
        flows=flows,
        families=tuple(opened),
        members=members,
        family_of=family_of,
        share=share,
        rate=rate(share),
        from_group=int(leak.from_group[members, family_of][main].mode().values),
        to_group=int(leak.to_group[members, family_of][main].mode().values),
        exemplar=int(members[_most_typical(leak.shift[members, family_of])]),
    )


def _most_typical(shifts: Tensor) -> int:
    """The row most like the others: largest mean cosine. shifts: (support, G)."""
    unit = F.normalize(shifts, dim=1)
    return int((unit @ unit.mean(0)).argmax())

"""The shift map: which training mass leaves a prediction, and which arrives, when its input is changed a little.

For a query x and its probe x_s of severity s, with the output pair fixed at the clean query,

    shift_g(s) = mass_g(x_s) - mass_g(x),        margin(x_s) - margin(x) ~ sum_g shift_g(s) + what decay did,

so the loss of margin is laid at the door of the groups that cause it. Of a group that holds the prediction up we
say that mass *leaves*; of one of the rival's class, that mass *arrives* there. The map looks at small
severities only (`probes.MAP_SHARES`); where the margin will be gone is extrapolated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.probes import MAP_SHARES, Family
from brittle.records import Groups, Pairs, Queries, ShiftMap
from brittle.subject import Subject

MassMap = Callable[[Tensor, Pairs], Tensor]
"""(raw inputs (R, *input), pairs) -> mass by group (R, G) in logits."""


@dataclass(frozen=True)
class Flow:
    """The two groups between which the mass of a query flows under a family."""

    leaving: Tensor  # shape: (M, F) group whose mass held the prediction up and falls most
    arriving: Tensor  # shape: (M, F) group of the rival class that turns most against it
    lost: Tensor  # shape: (M, F) logits per unit of severity, at least 0
    gained: Tensor  # shape: (M, F)


def draw_probes(queries: Queries, families: Sequence[Family], generator: torch.Generator) -> dict[str, Tensor]:
    """One draw of every family for every query, kept for all severities."""
    return {family.name: family.draw(queries.inputs, generator) for family in families}


def probe_inputs(inputs: Tensor, family: Family, draws: Tensor, shares: Sequence[float]) -> Tensor:
    """Probes of a family at shares of its reference: (M, K, *input)."""
    severity = lambda share: inputs.new_full((len(inputs),), share * family.reference)  # noqa: E731
    return torch.stack([family.apply(inputs, severity(share), draws) for share in shares], dim=1)


def shift_map(
    subject: Subject,
    queries: Queries,
    families: Sequence[Family],
    draws: Mapping[str, Tensor],
    mass: MassMap,
    shares: Sequence[float] = MAP_SHARES,
) -> ShiftMap:
    """Mass and margin at the queries and at their probes of every family.

    Cost: M (1 + F K) evaluations of `mass`.
    """
    m, f, k = len(queries), len(families), len(shares)
    probes = torch.stack([probe_inputs(queries.inputs, fam, draws[fam.name], shares) for fam in families], dim=1)
    flat = torch.cat([queries.inputs, probes.flatten(0, 2)])  # shape: (M + M F K, *input)
    pairs = Pairs.join(queries.pairs, queries.pairs.repeat_interleave(f * k))
    masses = mass(flat, pairs)
    logits = subject.predict(flat).double()
    margin, lead = pairs.margin(logits), pairs.lead(logits)
    reference = torch.tensor([fam.reference for fam in families], dtype=torch.float64)
    return ShiftMap(
        families=tuple(fam.name for fam in families),
        units=tuple(fam.unit for fam in families),
        severities=reference[:, None] * torch.tensor(shares, dtype=torch.float64),
        reference=reference,
        mass=masses[:m],
        probed=masses[m:].reshape(m, f, k, -1),
        rival=queries.pairs.rival,
        margin=margin[:m],
        probed_margin=margin[m:].reshape(m, f, k),
        probed_lead=lead[m:].reshape(m, f, k),
    )


def flow(shift: ShiftMap, groups: Groups) -> Flow:
    """Who leaves and who arrives, per query and family, at the larger of the map's severities.

    Leaving is the group that falls most among those that hold the prediction up; arriving is the group of the rival
    class that turns most against it. (The group that gains most of all classes names the class that takes over no
    better than chance, the rival in three cases of five: mass of third classes cancels.)
    """
    moved = shift.shift[:, :, -1] / shift.severities[None, :, -1, None]  # shape: (M, F, G), logits per unit
    holding = (shift.mass > 0)[:, None, :].expand_as(moved)
    rivals = (groups.classes == shift.rival[:, None])[:, None, :].expand_as(moved)
    lost, leaving = torch.where(holding, -moved, -torch.inf).max(-1)
    gained, arriving = torch.where(rivals, -moved, -torch.inf).max(-1)
    return Flow(leaving, arriving, lost.clamp_min(0), gained.clamp_min(0))


def gone_at(shift: ShiftMap) -> Tensor:
    """Severity at which the prediction is predicted to flip, (M, F) in each family's unit; infinite where never.

    The straight line through the leads at severity 0 and at the larger severity of the map, followed to 0. A
    parabola through both severities ranked failures worse: its bend is mostly noise.
    """
    slope = (shift.probed_lead[:, :, -1] - shift.margin[:, None]) / shift.severities[:, -1]
    return torch.where(slope < 0, shift.margin[:, None] / -slope, torch.inf)

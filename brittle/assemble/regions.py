"""Holes as findings, each held against the sealed queries that are right when clean."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from brittle.agreement import hole_test
from brittle.assemble.estimates import mean
from brittle.assemble.evidence import Evidence
from brittle.findings import Estimate, Hole
from brittle.holes import Leak, Region, leak_of, membership
from brittle.probes import Family

NAMED_ENDS = 3


def hole_families(families: Sequence[Family]) -> list[int]:
    """The families that holes are made of: ordinary perturbations, or directions where there are no others."""
    usual = [f for f, family in enumerate(families) if family.unit != "L2"]
    return usual or list(range(len(families)))


def hole_findings(e: Evidence) -> list[Hole]:
    """Every hole with its test on the sealed queries that are right when clean."""
    leak, sealed = leak_of(e.shift[e.first :], e.groups), e.split.sealed
    failed = e.observed[e.first :].failed(sealed.targets)  # shape: (M, F)
    return [_hole(e, number, region, leak, failed, sealed.right) for number, region in enumerate(e.holes)]


def holes_of_queries(e: Evidence) -> list[list[int]]:
    """The holes that each query of `split.both` lies in, by their rule."""
    leak = leak_of(e.shift, e.groups)
    inside = [membership(region, leak)[0].tolist() for region in e.holes]
    return [[number for number, rows in enumerate(inside) if rows[m]] for m in range(len(e.split.both))]


def _hole(e: Evidence, number: int, region: Region, leak: Leak, failed: Tensor, right: Tensor) -> Hole:
    names, ids = e.subject.class_names, e.split.predict.ids
    start, end = region.flows[0]
    *first, last = dict.fromkeys(names[b] for _, b in region.flows[:NAMED_ENDS])
    ends = f"{', '.join(first)} or {last}" if first else last
    opened = [e.families[f].name for f in region.families]
    inside, family_of = membership(region, leak)
    inside = inside & right
    hits = failed.gather(1, family_of[:, None])[:, 0] & inside
    rates = failed[right].double().mean(0)  # shape: (F,)
    base = rates[family_of[inside]].mean().item() if inside.any() else rates[list(region.families)].mean().item()
    return Hole(
        id=number,
        title=f"{names[start]} gives way to {ends} under {' and '.join(opened[:2])}",
        families=opened,
        from_class=names[start],
        to_class=names[end],
        from_group=e.groups.names[region.from_group],
        to_group=e.groups.names[region.to_group],
        exemplar=int(ids[region.exemplar]),
        members=ids[region.members].tolist(),
        support=region.support,
        severity=Estimate(
            value=region.share.median().item(),
            low=region.share.quantile(0.05).item(),
            high=region.share.quantile(0.95).item(),
        ),
        predicted_rate=mean(region.rate),
        test=hole_test(int(inside.sum()), int(hits.sum()), base),
    )

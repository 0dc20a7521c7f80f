"""Holes as findings, each held against sealed queries: those that are right when clean, and for natural holes all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from brittle.agreement import Claim, calibrate, hole_tests, peers_of
from brittle.agreement.baselines.outputs import softmax_confidence
from brittle.assemble.estimates import mean
from brittle.assemble.evidence import Evidence
from brittle.assemble.natural import natural_findings
from brittle.findings import Estimate, Hole, HoleTest
from brittle.holes import Leak, Region, leak_of, membership
from brittle.outcomes import Observed
from brittle.probes import Family
from brittle.records import Queries

NAMED_ENDS = 3


def hole_families(families: Sequence[Family]) -> list[int]:
    """The families that holes are made of: ordinary perturbations, or directions where there are no others."""
    usual = [f for f, family in enumerate(families) if family.unit != "L2"]
    return usual or list(range(len(families)))


def failure_rate(leak: Leak, observed: Observed, predict: Queries, families: Sequence[int]) -> Callable[..., Tensor]:
    """From predicted shares to rates of failure by the reference, calibrated on the predicting queries.

    A pair of a query that is right when clean and a family counts once, and has failed where that family makes it
    wrong: what is counted of a hole's members too. leak, observed: of `predict`.
    """
    failed = observed.failed(predict.targets)[predict.right][:, families]
    share = leak.share[predict.right][:, families]
    rate = calibrate(-share.flatten().log(), failed.flatten())
    return lambda shares: rate(-shares.log())


def hole_findings(e: Evidence, generator: torch.Generator) -> list[Hole]:
    """Every hole with its test, by predicted failure rate times support."""
    found = [*_probe_findings(e, generator), *natural_findings(e, generator)]
    return sorted(found, key=lambda hole: (hole.predicted_rate.value or 0.0) * hole.support, reverse=True)


def holes_of_queries(e: Evidence) -> list[list[int]]:
    """The holes that each query of `split.both` lies in, by their rule."""
    leak, natural = leak_of(e.shift, e.groups), _natural_of_queries(e)
    inside = [membership(region, leak)[0].tolist() for region in e.holes]
    inside += [(natural == k).tolist() for k in range(len(e.natural_holes.holes))]
    return [[number for number, rows in enumerate(inside) if rows[m]] for m in range(len(e.split.both))]


def _natural_of_queries(e: Evidence) -> Tensor:
    """The natural hole that each query of `split.both` lies in, -1 for none: those that made it, then by its rule."""
    predict = torch.full((e.first,), -1)
    for k, hole in enumerate(e.natural_holes.holes):
        predict[hole.members] = k
    return torch.cat([predict, e.natural_holes.number[: len(e.split.sealed)]])


def _probe_findings(e: Evidence, generator: torch.Generator) -> list[Hole]:
    """Every hole that probes open, with its test on the sealed queries that are right when clean."""
    sealed, observed = e.split.sealed, e.observed[e.first :]
    right = sealed.right
    rate = failure_rate(
        leak_of(e.shift[: e.first], e.groups), e.observed[: e.first], e.split.predict, hole_families(e.families)
    )
    leak = leak_of(e.shift[e.first :][right], e.groups)
    peers = peers_of(sealed.pairs.predicted[right], -softmax_confidence(sealed.logits[right]), generator)
    tests = hole_tests([_claim(r, leak, rate) for r in e.holes], observed.failed(sealed.targets)[right], peers)
    return [_hole(e, number, *pair) for number, pair in enumerate(zip(e.holes, tests, strict=True))]


def _claim(region: Region, leak: Leak, rate: Callable[..., Tensor]) -> Claim:
    inside, family = membership(region, leak)
    return Claim(inside, family, rate(leak.share.gather(1, family[:, None])[:, 0]))


def _hole(e: Evidence, number: int, region: Region, test: HoleTest) -> Hole:
    names, ids = e.subject.class_names, e.split.predict.ids
    start, end = region.flows[0]
    *first, last = dict.fromkeys(names[b] for _, b in region.flows[:NAMED_ENDS])
    ends = f"{', '.join(first)} or {last}" if first else last
    opened = [e.families[f].name for f in region.families]
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
        test=test,
        status="finding" if test.verdict == "pass" else "hypothesis",
    )

"""Natural holes as findings, each held against the natural errors of sealed queries."""

from __future__ import annotations

import torch

from brittle.agreement import Claim, hole_tests, peers_of
from brittle.agreement.baselines.outputs import softmax_confidence
from brittle.assemble.estimates import mean
from brittle.assemble.evidence import Evidence
from brittle.findings import NOTHING, Hole, HoleTest
from brittle.natural_holes import NaturalHole, ground, held_up_by


def natural_findings(e: Evidence, generator: torch.Generator) -> list[Hole]:
    """Every natural hole with its test on all sealed queries; their numbers follow those of the others."""
    queries, map_ = e.split.natural, e.natural_holes
    clean = torch.zeros_like(map_.number)
    claims = [Claim(map_.number == k, clean, map_.rate) for k in range(len(map_.holes))]
    peers = peers_of(queries.pairs.predicted, -softmax_confidence(queries.logits), generator)
    tests = hole_tests(claims, ~queries.right[:, None], peers)
    return [_hole(e, len(e.holes) + k, *pair) for k, pair in enumerate(zip(map_.holes, tests, strict=True))]


def _hole(e: Evidence, number: int, hole: NaturalHole, test: HoleTest) -> Hole:
    """From the class that most members are of which are wrong, to the one that they are taken for."""
    names, predict, mass = e.subject.class_names, e.split.predict, e.shift[: e.first].mass
    wrong = hole.members[~predict.right[hole.members]]
    truth = int(predict.targets[wrong].mode().values)
    of_truth = (e.groups.classes == truth).nonzero()[:, 0]
    leaving = of_truth[mass[hole.members].mean(0)[of_truth].argmin()]
    on = ground(mass, predict.pairs.predicted, ~predict.right)
    return Hole(
        id=number,
        title=f"{names[truth]} is taken for {names[hole.predicted]} as it is, without a probe",
        opened_by="nothing",
        families=[],
        from_class=names[truth],
        to_class=names[hole.predicted],
        from_group=e.groups.names[int(leaving)],
        to_group=e.groups.names[held_up_by(hole, on, mass)],
        exemplar=int(predict.ids[hole.exemplar]),
        members=predict.ids[hole.members].tolist(),
        support=hole.support,
        severity=NOTHING,
        predicted_rate=mean(hole.rate),
        test=test,
        status="finding" if test.verdict == "pass" else "hypothesis",
    )

"""The attacks' section: each attack and the envelope, in each norm."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from brittle.agreement import wilson
from brittle.assemble.estimates import median
from brittle.assemble.evidence import Evidence
from brittle.attacks.envelope import envelope, smallest
from brittle.attacks.perturbations import Severities
from brittle.findings import AttackResult, Attacks, PerturbationResult
from brittle.records import AttackRows, Norm, Queries
from brittle.subject import Subject


def attacks(e: Evidence) -> Attacks:
    """Every attack's success and distance, and the envelope's, in each norm."""
    sealed = e.split.sealed
    results = []
    for norm in norms_of(e.attacked):
        nearest = smallest(e.attacked, norm)
        results += [_attack(rows, nearest[rows.attack]) for rows in e.attacked if rows.norm == norm]
        results.append(_attack(envelope(e.attacked, norm), None))
    believed = bool(e.health) and not any(check.verdict == "fail" for check in e.health)
    return Attacks(
        inputs=int(sealed.right.sum()),
        wrong_when_clean=int((~sealed.right).sum()),
        results=results,
        verdict="pass" if believed else "inconclusive",
        health=e.health,
        perturbations=[_perturbation(found) for found in e.perturbed],
    )


def norms_of(rows: Sequence[AttackRows]) -> list[Norm]:
    """The norms attacked in, in order."""
    return list(dict.fromkeys(r.norm for r in rows))


def severity_rows(
    subject: Subject, queries: Queries, perturbed: Sequence[Severities], holes: Sequence[Sequence[int]]
) -> Iterator[dict[str, object]]:
    """One row a query and perturbation, with the columns of `outcomes.attack_rows`."""
    names = subject.class_names
    for found in perturbed:
        for m in range(len(queries)):
            severity = found.severity[m].item()
            yield {
                "query": int(queries.ids[m]),
                "part": "sealed",
                "kind": "perturbation",
                "name": found.family,
                "norm": "",
                "unit": found.unit,
                "distance": severity,
                "predicted": "",
                "success": math.isfinite(severity),
                "evaluations": int(found.evaluations[m]),
                "true_class": names[int(queries.targets[m])],
                "clean_class": names[int(queries.pairs.predicted[m])],
                "new_class": names[int(found.new_class[m])],
                "holes": " ".join(map(str, holes[m])),
            }


def _perturbation(found: Severities) -> PerturbationResult:
    count = len(found.severity)
    return PerturbationResult(
        name=found.family,
        unit=found.unit,
        reference=found.reference,
        most=found.most,
        inputs=count,
        failing=wilson(int(found.severity.isfinite().sum()), count),
        median_severity=median(found.severity),
        evaluations=found.evaluations.double().mean().item(),
    )


def _attack(rows: AttackRows, nearest: Tensor | None) -> AttackResult:
    """One attack's figures. nearest: where it came as near as any, (M,); None for the envelope itself."""
    count = len(rows.success)
    return AttackResult(
        name=rows.attack,
        norm=rows.norm,
        kind="envelope" if nearest is None else rows.kind,
        epsilon=rows.epsilon,
        inputs=count,
        success=wilson(int(rows.success.sum()), count),
        median_distance=median(rows.distance.double()),
        smallest_share=nearest.double().mean().item() if nearest is not None and rows.kind == "minimal" else None,
        evaluations=rows.evaluations.double().mean().item(),
    )

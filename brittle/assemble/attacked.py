"""The attacks' section: each attack and the envelope, in each norm."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from brittle.agreement import wilson
from brittle.assemble.estimates import median
from brittle.assemble.evidence import Evidence
from brittle.attacks.envelope import envelope, smallest
from brittle.findings import AttackResult, Attacks
from brittle.records import AttackRows, Norm


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
    )


def norms_of(rows: Sequence[AttackRows]) -> list[Norm]:
    """The norms attacked in, in order."""
    return list(dict.fromkeys(r.norm for r in rows))


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

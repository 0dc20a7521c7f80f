"""The kinds of failure that are predicted, each apart: natural errors, every probe family, the distance in each norm.

Of our scores one is named for each kind before outcomes are seen, and only that one decides:

    natural errors   late path (without a path: lack of support)
    a probe family   late path at the reference (without a path: predicted severity)
    a distance       predicted severity along the margin's gradient

A contest holds the scores and the outcomes of one kind on the same inputs; `settle` compares them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.agreement.baselines import extrapolated_margin
from brittle.agreement.compare import By, compare
from brittle.findings import FailureKind, TargetAgreement
from brittle.probes import Family
from brittle.records import AttackRows, Norm, ShiftMap
from brittle.scores import severity_scores

STEEPEST = "margin gradient"
"""The family along which our prediction of the adversarial distance looks."""

NORM_NAMES = {"l2": "L2", "linf": "Linf"}


@dataclass(frozen=True)
class Contest:
    """Scores (higher: brittler) and outcomes of one kind of failure on M inputs.

    The first `ours` of the scores are ours, and the very first is the one that was named in advance.
    """

    kind: FailureKind
    name: str
    by: By
    names: tuple[str, ...]
    ours: int
    scores: Tensor  # shape: (len(names), M), float64
    failed: Tensor  # shape: (M,) bool
    severity: Tensor | None  # shape: (M,), infinite where an input never failed


def settle(contest: Contest, generator: torch.Generator, resamples: int = 1000) -> TargetAgreement:
    """Hold the scores against the outcomes."""
    return compare(
        contest.kind,
        contest.name,
        dict(zip(contest.names, contest.scores, strict=True)),
        contest.names[: contest.ours],
        contest.names[0],
        contest.failed,
        contest.severity,
        generator,
        resamples,
        contest.by,
    )


def natural_errors(wrong: Tensor, ours: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> Contest:
    """Errors on the inputs as they are. wrong: (M,) bool; ours: our scores, the named one first; plain: baselines."""
    return _contest("natural", "natural errors", "auroc", ours, plain, wrong, None)


def probe_failures(
    families: Sequence[Family],
    shift: ShiftMap,
    ours: Mapping[str, Tensor],
    severity: Tensor,
    plain: Mapping[str, Tensor],
) -> list[Contest]:
    """Errors under each family by its reference; the baselines may look at the same small probes as we do.

    Args:
        shift: of queries that are right when clean.
        ours: our scores by name, each (M, F), the named one first.
        severity: (M, F) smallest level that failed, infinite where none did.
        plain: the baselines of the queries.
    """
    extrapolated, found = extrapolated_margin(shift), []
    for f, family in enumerate(families):
        mine, at = {name: score[:, f] for name, score in ours.items()}, severity[:, f]
        others = {**plain, "extrapolated margin": extrapolated[:, f]}
        found.append(_contest("probe", family.name, "auroc", mine, others, at.isfinite(), at))
    return found


def attack_distances(
    envelopes: Sequence[AttackRows],
    shift: ShiftMap,
    support: Tensor,
    plain: Mapping[Norm, Mapping[str, Tensor]],
) -> list[Contest]:
    """The smallest adversarial distance over all attacks, in each norm.

    Args:
        shift: of queries that are right when clean, as all that follows.
        plain: the baselines in each norm.
    """
    found, predicted = [], severity_scores(shift)
    for rows in envelopes:
        ours, name = {"predicted distance": predicted[STEEPEST], "lack of support": support}, NORM_NAMES[rows.norm]
        outcome = (rows.success, rows.distance.double())
        found.append(_contest("attack", f"{name} distance", "spearman", ours, plain[rows.norm], *outcome))
    return found


def _contest(
    kind: FailureKind,
    name: str,
    by: By,
    ours: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    failed: Tensor,
    severity: Tensor | None,
) -> Contest:
    scores = {**ours, **others}
    table = torch.stack([score.double() for score in scores.values()])
    return Contest(
        kind, name, by, tuple(scores), len(ours), table, failed, None if severity is None else severity.clone()
    )

"""The kinds of failure that are predicted, each apart: natural errors, every probe family, the distance in each norm.

Of our scores one is named for each kind before outcomes are seen, and only that one decides:

    natural errors   the late path (without a path: lack of support in the mass)
    a probe family   the predicted severity under that family
    the distance     the predicted severity along the margin's gradient
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from brittle.agreement.baselines import baselines
from brittle.agreement.compare import compare
from brittle.findings import TargetAgreement
from brittle.probes import Family
from brittle.records import AttackRows, Queries
from brittle.subject import Subject

STEEPEST = "margin gradient"
"""The family along which our prediction of the adversarial distance looks."""

NORM_NAMES = {"l2": "L2", "linf": "Linf"}


def natural_errors(
    subject: Subject, queries: Queries, ours: Mapping[str, Tensor], generator: torch.Generator
) -> TargetAgreement:
    """Errors on the inputs as they are. ours: our scores, the named one first."""
    scores = {**ours, **baselines(subject, queries)}
    return compare("natural", "natural errors", scores, list(ours), next(iter(ours)), ~queries.right, None, generator)


def probe_failures(
    subject: Subject,
    queries: Queries,
    families: Sequence[Family],
    severity_scores: Mapping[str, Tensor],
    support: Tensor,
    severity: Tensor,
    generator: torch.Generator,
) -> list[TargetAgreement]:
    """Errors under each family by its reference, among inputs that are right when clean.

    Args:
        severity_scores: minus log predicted severity by family, each (M,).
        support: our mass score, (M,).
        severity: (M, F) smallest level that failed, infinite where none did.
    """
    right = queries.right
    plain = baselines(subject, queries[right])
    found = []
    for f, family in enumerate(families):
        ours = {"predicted severity": severity_scores[family.name][right], "lack of support": support[right]}
        at = severity[right, f]
        scores = {**ours, **plain}
        found.append(
            compare("probe", family.name, scores, list(ours), "predicted severity", at.isfinite(), at, generator)
        )
    return found


def attack_distances(
    subject: Subject,
    queries: Queries,
    envelopes: Sequence[AttackRows],
    severity_scores: Mapping[str, Tensor],
    support: Tensor,
    generator: torch.Generator,
) -> list[TargetAgreement]:
    """The minimal adversarial distance over all attacks, in each norm; `queries` are right when clean."""
    found = []
    for envelope in envelopes:
        ours = {"predicted distance": severity_scores[STEEPEST], "lack of support": support}
        scores = {**ours, **baselines(subject, queries, envelope.norm)}
        name = f"{NORM_NAMES[envelope.norm]} distance"
        distance = envelope.distance.double()
        found.append(
            compare(
                "attack",
                name,
                scores,
                list(ours),
                "predicted distance",
                envelope.success,
                distance,
                generator,
                by="spearman",
            )
        )
    return found

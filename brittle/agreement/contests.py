"""The kinds of failure that are predicted, each apart: natural errors, every probe family, the distance in each norm.

Of our scores one is named for each kind before outcomes are seen, and only that one decides:

    natural errors   kernel machine
    a probe family   late path at the reference (without a path: predicted severity)
    a distance       reach, in its norm

`Predicted` is all that is said of the sealed inputs before their labels are opened; a contest then holds the scores
and the outcomes of one kind on the same inputs; `settle` compares them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from brittle.agreement.calibration import reliability
from brittle.agreement.compare import By, compare
from brittle.agreement.increment import Together, increment
from brittle.findings import FailureKind, TargetAgreement
from brittle.holes import Region
from brittle.natural_holes import NaturalMap
from brittle.probes import Family
from brittle.records import AttackRows, Norm

NATURAL = "natural errors"

NORM_NAMES = {"l2": "L2", "linf": "Linf"}


@dataclass(frozen=True)
class Rates:
    """Failure rates predicted for M inputs, from the named score, and what they were fitted on."""

    rate: Tensor  # shape: (M,), float64
    inputs: int
    failures: int


@dataclass(frozen=True)
class Predicted:
    """All that is predicted of the sealed inputs, without their labels.

    M of them are probed and attacked; they are the first of the W on which natural errors are counted. Of our scores
    the one that was named in advance comes first. Baselines are those of `baselines`, in L2; in other norms those that
    depend on it.
    """

    natural: dict[str, Tensor]  # ours of natural errors, (W,)
    probes: dict[str, Tensor]  # ours under each family, (M, F)
    distances: dict[str, dict[str, Tensor]]  # ours of the adversarial distance in each norm, (M,)
    plain: dict[str, Tensor]  # baselines, (W,)
    extrapolated: Tensor  # the baseline that looks at probes, (M, F)
    by_norm: dict[str, dict[str, Tensor]]  # baselines in other norms, (M,)
    together: Together  # models of natural errors, of W inputs
    rates: dict[str, Rates]  # by name of the kind: of W natural errors, of M inputs under each family
    holes: list[Region]  # from the predicting queries
    natural_holes: NaturalMap  # from the same, of W inputs

    def baselines(self, rows: Tensor, norm: Norm = "l2") -> dict[str, Tensor]:
        """Of some of the M inputs that are probed and attacked, in a norm. rows: positions."""
        return {name: score[rows] for name, score in {**self.plain, **self.by_norm.get(norm, {})}.items()}


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
    severity: Tensor | None = None  # shape: (M,), infinite where an input never failed
    rates: Rates | None = None  # of the named score
    together: Together | None = None


def settle(contest: Contest, generator: torch.Generator, resamples: int = 1000) -> TargetAgreement:
    """Hold the scores against the outcomes, alone and together, and the rates."""
    target = compare(
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
    if contest.together is not None and len(contest.failed):
        gained = increment(contest.together, contest.failed, generator, resamples)
        target = target.model_copy(update={"increment": gained})
    rates = contest.rates
    if rates is None or not len(contest.failed):
        return target
    fitted = (rates.inputs, rates.failures)
    held = reliability(contest.name, contest.names[0], rates.rate, contest.failed, fitted, generator, resamples)
    return target.model_copy(update={"calibration": held})


def natural_errors(predicted: Predicted, wrong: Tensor) -> Contest:
    """Errors on the inputs as they are. wrong: (W,) bool."""
    rates = predicted.rates[NATURAL]
    alone = _contest("natural", NATURAL, "auroc", predicted.natural, predicted.plain, wrong, rates=rates)
    return replace(alone, together=predicted.together)


def probe_failures(predicted: Predicted, families: Sequence[Family], right: Tensor, severity: Tensor) -> list[Contest]:
    """Errors under each family by its reference; the baselines may look at the same small probes as we do.

    Args:
        right: positions of the inputs that are right when clean, (M',), among the M.
        severity: (M', F) smallest level that failed, infinite where none did.
    """
    plain, found = predicted.baselines(right), []
    for f, family in enumerate(families):
        ours = {name: score[right, f] for name, score in predicted.probes.items()}
        others = {**plain, "extrapolated margin": predicted.extrapolated[right, f]}
        of_all, at = predicted.rates[family.name], severity[:, f]
        rates = Rates(of_all.rate[right], of_all.inputs, of_all.failures)
        found.append(_contest("probe", family.name, "auroc", ours, others, at.isfinite(), at, rates))
    return found


def attack_distances(predicted: Predicted, envelopes: Sequence[AttackRows], right: Tensor) -> list[Contest]:
    """The smallest adversarial distance over all attacks, in each norm. right: as for probes; rows as in it."""
    found = []
    for rows in envelopes:
        ours = {name: score[right] for name, score in predicted.distances[rows.norm].items()}
        others, name = predicted.baselines(right, rows.norm), f"{NORM_NAMES[rows.norm]} distance"
        found.append(_contest("attack", name, "spearman", ours, others, rows.success, rows.distance.double()))
    return found


def _contest(
    kind: FailureKind,
    name: str,
    by: By,
    ours: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    failed: Tensor,
    severity: Tensor | None = None,
    rates: Rates | None = None,
) -> Contest:
    scores = {**ours, **others}
    table = torch.stack([score.double() for score in scores.values()])
    kept = None if severity is None else severity.clone()
    return Contest(kind, name, by, tuple(scores), len(ours), table, failed, kept, rates)

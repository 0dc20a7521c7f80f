"""Predicted against observed, one kind of failure at a time, beside the baselines.

The deciding figure is the difference between *one* score of ours, named before the outcomes are seen, and the best
baseline on the same inputs. The best baseline is chosen with the outcomes in sight, which can only cost us. The
verdict follows from the interval of that difference and from nothing else. Beside it every score of ours has its own
difference, with a p-value corrected for their number (Holm).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from scipy.stats import binom
from torch import Tensor

from brittle.agreement.conditional import confident_half, partial_spearman
from brittle.agreement.meanings import MEANINGS
from brittle.agreement.metrics import (
    Metric,
    Resampled,
    augrc,
    auroc,
    average_precision,
    bootstrap,
    e_aurc,
    fpr95,
    holm,
    kendall,
    resample_weights,
    spearman,
)
from brittle.errors import DataError, NotFiniteError
from brittle.findings import Agreement, Estimate, FailureKind, ScoreResult, TargetAgreement, Verdict

UNDEFINED = Resampled(math.nan, torch.zeros(0))

SEPARATING: Mapping[str, Metric] = {
    "auroc": auroc,
    "average_precision": average_precision,
    "fpr95": fpr95,
    "e_aurc": e_aurc,
    "augrc": augrc,
}
"""Figures of how a score parts failures from the others."""

RANKING: Mapping[str, Metric] = {"spearman": spearman, "kendall": kendall}
"""Figures of how a score follows the distance or severity."""

MARGIN, CONFIDENCE = "logit margin", "softmax confidence"
"""Baselines beyond which a score may say something."""

By = Literal["auroc", "spearman"]

FIGURE = {"auroc": "AUROC", "spearman": "Spearman"}

FEWEST = 10
"""Failures, and for AUROC also inputs that did not fail, below which no verdict is given: resampling fewer makes
intervals that are too short."""


def compare(
    kind: FailureKind,
    name: str,
    scores: Mapping[str, Tensor],
    ours: Sequence[str],
    named: str,
    failed: Tensor,
    severity: Tensor | None,
    generator: torch.Generator,
    resamples: int = 1000,
    by: By = "auroc",
) -> TargetAgreement:
    """Hold all scores against one kind of failure.

    Args:
        scores: by name, each (M,), higher meaning brittler.  ours: the names that are not baselines.
        named: the one of ours that was fixed in advance.  failed: (M,) bool.
        severity: (M,), distance or severity at which an input failed, infinite where it never did; None: the error.
        by: what decides; Spearman where all inputs may have failed, as they do under attacks without a budget.

    Raises:
        DataError: where names or lengths do not fit.  NotFiniteError: for a score or severity that is NaN.
    """
    _check(scores, ours, named, failed, severity)
    observed = failed.double() if severity is None else -severity.double()
    weights = resample_weights(failed, resamples, generator)  # shape: (M, resamples)
    figures = {
        score: _figures(values, failed, observed, weights) | _beyond(values, scores, failed, observed, weights)
        for score, values in scores.items()
    }
    deciding = {score: figure[by] for score, figure in figures.items()}
    best_baseline = _best(deciding, [score for score in scores if score not in ours])
    gains = {score: deciding[score] - deciding[best_baseline] for score in ours}
    gain, enough = gains[named].estimate, _enough(failed, by)
    verdict = _verdict(gain) if enough else "inconclusive"
    chances = [gains[score].chance if enough else None for score in ours]
    tested = {
        score: {"gain": gains[score].estimate, "p": p, "p_holm": adjusted}
        for score, p, adjusted in zip(ours, chances, holm(chances), strict=True)
    }
    count = int(failed.sum())
    return TargetAgreement(
        kind=kind,
        name=name,
        inputs=len(failed),
        failures=count,
        prevalence=count / len(failed) if len(failed) else 0.0,
        scores=[_result(score, figure, tested.get(score)) for score, figure in figures.items()],
        decided_by=by,
        best_ours=_best(deciding, ours),
        best_baseline=best_baseline,
        gain=gain,
        verdict=verdict,
        sentence=_sentence(name, named, best_baseline, deciding, gain, verdict, failed, by),
    )


def overall(targets: Sequence[TargetAgreement], inputs: int) -> Agreement:
    """One verdict and one sentence over all kinds of failure; the kinds themselves are not pooled.

    A score no better than the best baseline still wins a target by luck once in forty. So the verdict is `pass`
    where wins outnumber losses and are more than luck explains (a chance below 5 %, if the targets were
    independent), `fail` the other way round. Targets without an interval do not count.

    Args:
        inputs: held-out inputs that the targets were compared on.
    """
    won, lost = ([t.name for t in targets if t.verdict == verdict] for verdict in ("pass", "fail"))
    decidable = sum(t.gain.value is not None for t in targets)
    beyond_luck = lambda wins: binom.sf(wins - 1, decidable, 0.025) < 0.05  # noqa: E731
    verdict: Verdict = "inconclusive"
    if len(won) != len(lost) and beyond_luck(max(len(won), len(lost))):
        verdict = "pass" if len(won) > len(lost) else "fail"
    summary = {
        "pass": "Our score predicts failures better than what a user would compute anyway",
        "fail": "Our score predicts failures worse than what a user would compute anyway",
        "inconclusive": "Our score is not shown to predict failures better than what a user would compute anyway",
    }[verdict]
    sentence = (
        f"{summary}: of {len(targets)} kinds of failure it beats the best baseline on {_listed(won)}, falls behind "
        f"it on {_listed(lost)}, and neither is shown on {len(targets) - len(won) - len(lost)}."
    )
    names = dict.fromkeys(score.name for target in targets for score in target.scores)
    meanings = {name: MEANINGS[name] for name in names if name in MEANINGS}
    return Agreement(inputs=inputs, verdict=verdict, sentence=sentence, targets=list(targets), meanings=meanings)


def _check(
    scores: Mapping[str, Tensor], ours: Sequence[str], named: str, failed: Tensor, severity: Tensor | None
) -> None:
    if named not in ours or not set(ours) < set(scores):
        raise DataError(
            f"the named score must be one of ours, ours among the scores, and a baseline beside them; "
            f"found named {named!r}, ours {list(ours)}, scores {list(scores)}"
        )
    columns = dict(scores) | ({} if severity is None else {"severity": severity})
    for column, values in columns.items():
        if values.shape != failed.shape:
            raise DataError(
                f"scores need one value an input: {len(failed)} inputs, {column!r} has shape {tuple(values.shape)}"
            )
        if values.isnan().any():
            raise NotFiniteError(
                f"scores must be numbers, found NaN in {column!r} at {int(values.isnan().sum())} inputs"
            )


def _figures(values: Tensor, failed: Tensor, observed: Tensor, weights: Tensor) -> dict[str, Resampled]:
    """All figures of one score; with fewer than two failures or two others only rank correlation can be resampled."""
    split = min(int(failed.sum()), int((~failed).sum())) >= 2
    separating = {
        name: bootstrap(metric, values, failed, weights) if split else UNDEFINED for name, metric in SEPARATING.items()
    }
    return separating | {name: bootstrap(metric, values, observed, weights) for name, metric in RANKING.items()}


def _beyond(
    values: Tensor, scores: Mapping[str, Tensor], failed: Tensor, observed: Tensor, weights: Tensor
) -> dict[str, Resampled]:
    """What a score says beyond margin and confidence, where these are among the scores."""
    found = {}
    if MARGIN in scores:
        found["spearman_given_margin"] = partial_spearman(values, observed, scores[MARGIN], weights)
    if CONFIDENCE in scores:
        found["auroc_confident_half"] = confident_half(values, failed, scores[CONFIDENCE], weights)
    return found


def _result(name: str, figures: Mapping[str, Resampled], tested: Mapping[str, Any] | None) -> ScoreResult:
    """tested: the gain of a score of ours and what chance has to do with it; None for a baseline."""
    estimates: dict[str, Any] = {figure: resampled.estimate for figure, resampled in figures.items()}
    return ScoreResult(name=name, ours=tested is not None, **estimates, **(tested or {}))


def _best(deciding: Mapping[str, Resampled], names: Sequence[str]) -> str:
    """The name of the highest figure, the first of equals; a figure that is not defined is the lowest."""
    return max(names, key=lambda name: -math.inf if math.isnan(deciding[name].value) else deciding[name].value)


def _enough(failed: Tensor, by: By) -> bool:
    others = len(failed) if by == "spearman" else int((~failed).sum())
    return min(int(failed.sum()), others) >= FEWEST


def _verdict(gain: Estimate) -> Verdict:
    if gain.low is None or gain.high is None:
        return "inconclusive"
    return "pass" if gain.low > 0 else "fail" if gain.high < 0 else "inconclusive"


def _sentence(
    name: str,
    named: str,
    baseline: str,
    deciding: Mapping[str, Resampled],
    gain: Estimate,
    verdict: Verdict,
    failed: Tensor,
    by: By,
) -> str:
    count, figure = f"{int(failed.sum())} failures among {len(failed)} inputs", FIGURE[by]
    opening = name[:1].upper() + name[1:]
    if gain.value is None or gain.low is None or gain.high is None:
        return f"{opening}: with {count} no score can be told from another."
    words = {
        "pass": "beats the best baseline",
        "fail": "does not beat but falls behind the best baseline",
        "inconclusive": "is not shown to beat the best baseline",
    }[verdict]
    reason = "" if _enough(failed, by) else ", too few to decide"
    return (
        f"{opening}: our score, {named} ({figure} {deciding[named].value:.3f}), {words}, {baseline} "
        f"({deciding[baseline].value:.3f}); the difference is {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] "
        f"with {count}{reason}."
    )


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names)})" if names else "none"

"""What the suggested examples bring: retraining with them against retraining with random ones of the same number.

One seed gives one difference of accuracies, suggested minus random, in percentage points; n of them give the mean
d with the interval d +- t(.975, n - 1) s / sqrt(n). With three seeds an established rule can look better or worse
than random by luck; on small data twenty are affordable.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy import stats
from torch import Tensor, nn

from brittle.data import Examples
from brittle.errors import SubjectError
from brittle.findings import NOTHING, Estimate, RetrainCheck, Verdict
from brittle.subject import Retrain, Subject

Score = Callable[[nn.Module], tuple[float, float]]
"""model -> (clean, robust) accuracy, in [0, 1]."""


def retrain_check(
    subject: Subject,
    chosen: Tensor,
    *,
    seeds: int,
    score: Score,
    generator: torch.Generator,
    progress: Callable[[int, int], None] | None = None,
) -> RetrainCheck:
    """Retrain with the chosen examples and with as many random ones of the pool, and compare.

    Each seed trains both models from the same start and draws other random examples; the differences are paired,
    and their interval is Student's t.

    Args:
        chosen: ids in the pool.
        score: gives the clean accuracy and that under probes.
        progress: called with (models trained, 2 seeds).

    Raises:
        SubjectError: where the subject cannot be retrained or has no pool.
    """
    if subject.retrain is None or subject.pool is None:
        missing = "retrain" if subject.retrain is None else "pool"
        raise SubjectError(f"checking suggestions needs a subject with pool and retrain, found no {missing}; pass it")
    scores = _scores(subject.retrain, subject.train, subject.pool, chosen, seeds, score, generator, progress)
    clean, robust = (_paired(100 * gain) for gain in (scores[:, 0] - scores[:, 1]).unbind(1))
    verdict = _verdict(clean, robust)
    return RetrainCheck(
        added=len(chosen),
        seeds=seeds,
        clean_gain=clean,
        robust_gain=robust,
        base_clean=score(subject.model)[0],
        random_clean=scores[:, 1, 0].mean().item(),
        suggested_clean=scores[:, 0, 0].mean().item(),
        verdict=verdict,
        sentence=_sentence(len(chosen), seeds, clean, robust, verdict),
    )


def _scores(
    retrain: Retrain,
    train: Examples,
    pool: Examples,
    chosen: Tensor,
    seeds: int,
    score: Score,
    generator: torch.Generator,
    progress: Callable[[int, int], None] | None,
) -> Tensor:
    """Accuracies of all retrainings. Shape: (seeds, suggested or random, clean or robust)."""
    scores = torch.zeros(seeds, 2, 2, dtype=torch.float64)
    for seed in range(seeds):
        drawn = torch.randperm(len(pool), generator=generator)[: len(chosen)]
        for arm, ids in enumerate((chosen, drawn)):
            model = retrain(train.join(pool[ids]), seed).eval()
            scores[seed, arm] = torch.tensor(score(model), dtype=torch.float64)
            if progress:
                progress(2 * seed + arm + 1, 2 * seeds)
    return scores


def _paired(gains: Tensor) -> Estimate:
    """Mean of paired differences with its 95 % t interval; one difference has none. gains: (seeds,)."""
    if not len(gains):
        return NOTHING
    mean = gains.mean().item()
    if len(gains) < 2:
        return Estimate(value=mean, low=None, high=None)
    half = stats.t.ppf(0.975, len(gains) - 1) * gains.std().item() / len(gains) ** 0.5
    return Estimate(value=mean, low=mean - half, high=mean + half)


def _verdict(clean: Estimate, robust: Estimate) -> Verdict:
    """Pass: one gain lies above 0 and none below; fail: one lies below and none above."""
    above = any(gain.low is not None and gain.low > 0 for gain in (clean, robust))
    below = any(gain.high is not None and gain.high < 0 for gain in (clean, robust))
    return "inconclusive" if above == below else "pass" if above else "fail"


def _sentence(added: int, seeds: int, clean: Estimate, robust: Estimate, verdict: Verdict) -> str:
    words = {
        "pass": "helped more than",
        "fail": "helped less than",
        "inconclusive": "are not shown to help more than",
    }[verdict]
    return (
        f"The {added} suggested examples {words} {added} random ones: {_points(clean)} of clean accuracy and "
        f"{_points(robust)} under probes, over {seeds} retrainings of each."
    )


def _points(gain: Estimate) -> str:
    if gain.value is None:
        return "no figure"
    interval = "" if gain.low is None or gain.high is None else f" [{gain.low:+.1f}, {gain.high:+.1f}]"
    return f"{gain.value:+.1f} points{interval}"

"""Predicted failure rates held against observed ones, on inputs that they were not fitted on.

Inputs are put into `BINS` bins of about equal number by their predicted rate r, those of equal rate into one. With
n_b inputs in bin b, of which f_b failed, the expected calibration error is

    ECE = sum_b |f_b - sum_{i in b} r_i| / sum_b n_b

It is above 0 by chance even where every rate is right. So it stands beside what chance alone makes of it: the 95th
percentile over failures drawn at the predicted rates.

Sources: Obtaining Well Calibrated Probabilities Using Bayesian Binning, M. Naeini, G. Cooper and M. Hauskrecht, 2015,
doi 10.1609/aaai.v29i1.9602; Increasing the Reliability of Reliability Diagrams, J. Broecker and L. Smith, 2007,
doi 10.1175/WAF993.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from brittle.agreement.metrics import Resampled, resample_weights, wilson
from brittle.findings import Calibration, RateBin, Verdict

BINS = 5

FEWEST = 10
"""Failures, and inputs that held, without which nothing is concluded."""


def reliability(
    name: str,
    score: str,
    rate: Tensor,
    failed: Tensor,
    fitted: tuple[int, int],
    generator: torch.Generator,
    resamples: int = 1000,
) -> Calibration:
    """Predicted rates against what happened to the same inputs.

    Args:
        name: of the kind of failure.  score: that the rates were calibrated from.
        rate: (M,) in [0, 1].  failed: (M,) bool.
        fitted: inputs, and failures among them, that the rates were fitted on.
    """
    place = bins(rate)
    weights = resample_weights(torch.zeros(len(rate)), resamples, generator).double()
    outcome, ones = failed.double()[:, None], torch.ones(len(rate), 1, dtype=torch.float64)
    error = Resampled(
        calibration_error(rate, outcome, ones, place).item(), calibration_error(rate, outcome, weights, place)
    ).estimate
    drawn = torch.rand(len(rate), resamples, generator=generator, dtype=torch.float64) < rate[:, None]
    chance = calibration_error(rate, drawn.double(), ones, place).quantile(0.95).item()
    failures = int(failed.sum())
    few = min(failures, len(failed) - failures) < FEWEST
    off = error.value is not None and error.value > chance
    verdict: Verdict = "inconclusive" if few else "fail" if off else "pass"
    predicted, observed = rate.mean().item(), wilson(failures, len(failed))
    return Calibration(
        score=score,
        fitted_inputs=fitted[0],
        fitted_failures=fitted[1],
        predicted=predicted,
        observed=observed,
        error=error,
        error_if_right=chance,
        bins=[_bin(rate[place == b], failed[place == b]) for b in place.unique().tolist()],
        verdict=verdict,
        sentence=(
            f"{name[:1].upper()}{name[1:]}: rates fitted on {fitted[1]} failures among {fitted[0]} inputs predict "
            f"{predicted:.1%} of the sealed ones to fail, {failures / len(failed):.1%} did; by bin they are off by "
            f"{error.value or 0:.1%}, {'more' if off else 'no more'} than chance would explain ({chance:.1%})"
            f"{', with too few failures to conclude from' if few else ''}."
        ),
    )


def bins(rate: Tensor) -> Tensor:
    """The bin of each input: its mid-rank's share of all ranks, in `BINS` parts. (M,) -> (M,) int64."""
    ordered = rate.sort().values
    below = torch.searchsorted(ordered, rate)
    upto = torch.searchsorted(ordered, rate, right=True)
    return (BINS * (below + upto) / (2 * len(rate))).long().clamp_max(BINS - 1)


def calibration_error(rate: Tensor, failed: Tensor, weights: Tensor, place: Tensor) -> Tensor:
    """ECE of R draws of failures, or of R resamples of the inputs.

    Args:
        rate: (M,).  failed: (M, R) or (M, 1), 0 or 1.  weights: (M, R) or (M, 1), how often each input counts.
        place: (M,) bins.
    """
    gap = weights * (failed - rate[:, None])  # shape: (M, R)
    by_bin = gap.new_zeros(BINS, gap.shape[1]).index_add_(0, place, gap)
    return by_bin.abs().sum(0) / weights.sum(0)


def _bin(rate: Tensor, failed: Tensor) -> RateBin:
    failures = int(failed.sum())
    return RateBin(
        inputs=len(rate), predicted=rate.mean().item(), failures=failures, observed=wilson(failures, len(rate))
    )

"""What our scores add to all baselines together: the deciding figure, since a score may be the best and add nothing.

On inputs whose labels are in the open, two kinds of model (`models`) are fitted to failures, each once from all
baselines and once from these and ours. Held against inputs that they were not fitted on, the gain of each kind is the
difference of AUROC, with a paired interval. Beside the baselines stands what costs nothing: the predicted and the rival
class, all logits, and outputs averaged over the later path; without them much of a gain may be class identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.agreement.compare import FEWEST
from brittle.agreement.metrics import auroc, bootstrap, resample_weights
from brittle.agreement.models import KINDS, Table, rates
from brittle.findings import Estimate, Increment, Verdict
from brittle.records import Queries

SIDES = ("baselines", "all")


@dataclass(frozen=True)
class Together:
    """Failure rates of M inputs by the models, by "SIDE KIND", and what these were fitted on."""

    rate: dict[str, Tensor]  # (M,) each
    inputs: int
    failures: int


def free_controls(queries: Queries, averaged: Tensor | None = None) -> dict[str, Tensor]:
    """What costs the baselines nothing. averaged: probabilities over the later path, (M, C)."""
    found = {
        "predicted class": queries.pairs.predicted,
        "rival class": queries.pairs.rival,
        "logits": queries.logits.double(),
    }
    return found if averaged is None else found | {"averaged outputs": averaged.clamp_min(1e-12).log()}


def together(
    known: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    failed: Tensor,
    asked: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
) -> Together:
    """Fit on known failures, and say of other inputs.

    Args:
        known, asked: the baselines with their controls, and ours, of the one and of the other inputs.
        failed: of the known, (M,) bool.
    """
    found = {}
    for side, width in zip(SIDES, (1, 2), strict=True):
        taught, told = ({name: s for part in parts[:width] for name, s in part.items()} for parts in (known, asked))
        nothing = torch.zeros(len(next(iter(told.values()))), dtype=torch.bool)
        for kind in KINDS:
            found[f"{side} {kind}"] = rates(kind, Table(taught, failed), Table(told, nothing))
    return Together(found, len(failed), int(failed.sum()))


def increment(models: Together, failed: Tensor, generator: torch.Generator, resamples: int = 1000) -> Increment:
    """The gains of both kinds of model on other inputs. failed: of these, (M,) bool."""
    weights = resample_weights(failed, resamples, generator)
    figure = {name: bootstrap(auroc, rate, failed, weights) for name, rate in models.rate.items()}
    gains = {kind: (figure[f"all {kind}"] - figure[f"baselines {kind}"]).estimate for kind in KINDS}
    few = min(models.failures, models.inputs - models.failures, int(failed.sum()), int((~failed).sum())) < FEWEST
    verdict: Verdict = "inconclusive" if few else _verdict(list(gains.values()))
    words = {"pass": "add to", "fail": "take away from", "inconclusive": "are not shown to add to"}[verdict]
    shown = ", ".join(f"{kind} {_signed(gain)}" for kind, gain in gains.items())
    return Increment(
        fitted_inputs=models.inputs,
        fitted_failures=models.failures,
        baselines={kind: figure[f"baselines {kind}"].estimate for kind in KINDS},
        together={kind: figure[f"all {kind}"].estimate for kind in KINDS},
        gain={kind: gains[kind] for kind in KINDS},
        verdict=verdict,
        sentence=f"Our scores {words} all baselines together: gain of AUROC by model {shown}; models fitted on "
        f"{models.failures} failures among {models.inputs} inputs{', too few to decide' if few else ''}.",
    )


def _verdict(gains: list[Estimate]) -> Verdict:
    """Of both kinds of model, or none."""
    if all(gain.low is not None and gain.low > 0 for gain in gains):
        return "pass"
    return "fail" if all(gain.high is not None and gain.high < 0 for gain in gains) else "inconclusive"


def _signed(gain: Estimate) -> str:
    if gain.value is None or gain.low is None or gain.high is None:
        return "not defined"
    return f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"

"""Holes held against what happened to sealed inputs that were right when clean.

The rule of a hole says which inputs lie in it, and under which family f_m each of them flips soonest; a member has
failed where that family makes it wrong by the reference. A hole has

    T = sum_{m in hole} failed[m, f_m]

failures. Inputs of low confidence fail more often, and so do some classes; a region that says no more than that is no
finding. So T is held against the same sum over random regions: each member makes room for a random input of its
*stratum*, the predicted class and a bin of confidence within it, under the member's family. Where outcomes depend on
class and confidence alone, the inputs of a stratum are exchangeable and

    p = (1 + #{r: T_r >= T}) / (1 + R)

is valid at every sample size (B. Phipson and G. Smyth, 2010, doi 10.2202/1544-6115.1585): a Monte Carlo p-value of an
exact permutation test, never too small, and never below 1/(1 + R). The holes of a run are tested together (Y. Benjamini
and Y. Hochberg, 1995, doi 10.1111/j.2517-6161.1995.tb02031.x), without those that could not have passed whatever
had happened (R. Tarone, 1990, doi 10.2307/2531456): too few members, or strata in which nearly all fail or hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import false_discovery_control
from torch import Tensor

from brittle.agreement.metrics import wilson
from brittle.findings import FALSE_DISCOVERY_RATE, FEWEST_MEMBERS, NOTHING, Estimate, HoleTest, Verdict

REGIONS = 1000
"""Random regions that a hole is held against."""
PER_STRATUM = 5
MOST_BINS = 10
"""Bins of confidence within a class: ten, or as many as hold `PER_STRATUM` inputs each.

On digits networks with 190 and 320 sealed inputs, where outcomes were drawn from class and continuous confidence alone,
0 to 7 % of the runs called any hole a finding with 5 inputs a stratum, 2 to 12 % with 10, 5 to 35 % by class alone;
with 3, real holes could no longer pass.
"""


@dataclass(frozen=True)
class Claim:
    """What the rule of one hole says of M inputs, before their outcomes are seen."""

    inside: Tensor  # shape: (M,) bool
    family: Tensor  # shape: (M,) int64, under which each would flip soonest
    rate: Tensor  # shape: (M,) predicted probability of failure there


@dataclass(frozen=True)
class Peers:
    """M inputs by class and confidence, and random inputs in each one's place."""

    predicted: Tensor  # shape: (M,) predicted class
    confidence: Tensor  # shape: (M,), higher is surer
    strata: Tensor  # shape: (M,) class and bin of confidence
    matched: Tensor  # shape: (R, M) an input of the same stratum
    of_class: Tensor  # shape: (R, M) an input of the same class


def peers_of(predicted: Tensor, confidence: Tensor, generator: torch.Generator, regions: int = REGIONS) -> Peers:
    """Strata of the inputs, and `regions` random stand-ins for each. predicted, confidence: (M,)."""
    strata = strata_of(predicted, confidence)
    matched, of_class = (stand_ins(labels, regions, generator) for labels in (strata, predicted))
    return Peers(predicted, confidence, strata, matched, of_class)


def strata_of(predicted: Tensor, confidence: Tensor) -> Tensor:
    """Predicted class and bin of confidence within it, counted through from the least confident bin: (M,)."""
    strata, first = torch.zeros_like(predicted), 0
    for label in predicted.unique():
        rows = (predicted == label).nonzero()[:, 0]
        bins = min(max(len(rows) // PER_STRATUM, 1), MOST_BINS)
        ranked = rows[confidence[rows].argsort(stable=True)]
        strata[ranked] = first + torch.arange(len(rows)) * bins // len(rows)
        first += bins
    return strata


def stand_ins(strata: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random permutations that stay within strata: (M,) -> (count, M)."""
    places = strata.argsort(stable=True)
    shuffled = torch.rand(count, len(strata), generator=generator, dtype=torch.float64) + strata
    found = torch.empty(count, len(strata), dtype=torch.int64)
    found[:, places] = shuffled.argsort(dim=1)
    return found


def permuted(failed: Tensor, strata: Tensor, generator: torch.Generator) -> Tensor:
    """Outcomes dealt anew among the inputs of each stratum, all families of an input together. failed: (M, F)."""
    return failed[stand_ins(strata, 1, generator)[0]]


def hole_tests(claims: Sequence[Claim], failed: Tensor, peers: Peers) -> list[HoleTest]:
    """Every hole of a run against its observed failures.

    The verdict is `pass`, and the hole a finding, where the corrected p is at most 5 % and the Wilson interval of the
    observed rate lies above the rate of all inputs; `fail` where it lies below; otherwise, and with fewer than
    `FEWEST_MEMBERS` members, `inconclusive`.

    Args:
        claims: one a hole.
        failed: (M, F) bool, wrong under each family by its reference.
        peers: of the same M inputs.
    """
    sums = [(_failures(c, failed), _random(c, failed, peers.matched)) for c in claims]
    enough = [int(c.inside.sum()) >= FEWEST_MEMBERS for c in claims]
    p = [p_value(*pair) for pair in sums]
    testable = [many and smallest_p(*pair) <= FALSE_DISCOVERY_RATE for many, pair in zip(enough, sums, strict=True)]
    adjusted = corrected(p, testable)
    return [_test(*row, failed, peers) for row in zip(claims, p, adjusted, strict=True)]


def p_value(observed: int, random: Tensor) -> float:
    """Chance of so many failures in a random region. random: (R,) failures in as many of them."""
    return (1 + int((random >= observed).sum())) / (1 + len(random))


def smallest_p(observed: int, random: Tensor) -> float:
    """The p-value of the best that was drawn, the hole itself being one of the draws: no hole could do better.

    Under the null the hole is a draw like the others, so this says nothing of which of them it is.
    """
    most = max(observed, int(random.max()) if len(random) else 0)
    return (int((random == most).sum()) + (observed == most)) / (1 + len(random))


def corrected(p: Sequence[float], testable: Sequence[bool]) -> list[float | None]:
    """p-values by Benjamini and Hochberg over those that are testable; None for the others."""
    chosen = [value for value, keep in zip(p, testable, strict=True) if keep]
    adjusted = iter(false_discovery_control(chosen).tolist() if chosen else ())
    return [next(adjusted) if keep else None for keep in testable]


def false_findings(
    claims: Sequence[Claim], failed: Tensor, peers: Peers, generator: torch.Generator, runs: int = 100
) -> Estimate:
    """Share of runs that call any hole a finding though outcomes were `permuted`; at most 5 % are due.

    The holes and their rules are kept. Cost: `runs` times `hole_tests`.
    """
    found = 0
    for _ in range(runs):
        tests = hole_tests(claims, permuted(failed, peers.strata, generator), peers)
        found += any(test.verdict == "pass" for test in tests)
    return wilson(found, runs)


def least_confident(inside: Tensor, groups: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor]:
    """Members, and as many of the least confident inputs of each member's group, both from the least confident on.

    Args:
        inside: (M,) bool.  groups: (M,), of which each has as many members as picks.  confidence: (M,).
    """
    members, picks = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    for label in groups[inside].unique():
        rows = (groups == label).nonzero()[:, 0]
        ranked = rows[confidence[rows].argsort(stable=True)]
        own = ranked[inside[ranked]]
        members.append(own)
        picks.append(ranked[: len(own)])
    return torch.cat(members), torch.cat(picks)


def _failures(claim: Claim, failed: Tensor) -> int:
    rows = claim.inside
    return int(failed[rows].gather(1, claim.family[rows, None]).sum())


def _random(claim: Claim, failed: Tensor, stand_in: Tensor) -> Tensor:
    """Failures with each member replaced, under the member's family. stand_in: (R, M) -> (R,)."""
    rows = claim.inside.nonzero()[:, 0]
    return failed[stand_in[:, rows], claim.family[rows]].sum(1)


def _test(claim: Claim, p: float, adjusted: float | None, failed: Tensor, peers: Peers) -> HoleTest:
    members, failures = int(claim.inside.sum()), _failures(claim, failed)
    observed, counted = wilson(failures, members), claim.inside if members else torch.ones_like(claim.inside)
    base = failed.double().mean(0)[claim.family[counted]].mean().item()
    predicted = claim.rate[claim.inside].mean().item() if members else None
    within = None
    if predicted is not None and observed.low is not None and observed.high is not None:
        within = observed.low <= predicted <= observed.high
    by_class = _random(claim, failed, peers.of_class)
    return HoleTest(
        members=members,
        failures=failures,
        observed_rate=observed,
        base_rate=base,
        lift=observed.value / base if observed.value is not None and base > 0 else None,
        verdict=_verdict(observed, base, members, adjusted),
        predicted_rate=predicted,
        predicted_within=within,
        least_confident=_least_confident_rate(claim, failed, torch.zeros_like(peers.predicted), peers.confidence),
        least_confident_of_class=_least_confident_rate(claim, failed, peers.predicted, peers.confidence),
        random=_spread(_random(claim, failed, peers.matched), members),
        random_of_class=_spread(by_class, members),
        p_value=p if members else None,
        p_value_of_class=p_value(failures, by_class) if members else None,
        corrected=adjusted,
    )


def _verdict(observed: Estimate, base: float, members: int, adjusted: float | None) -> Verdict:
    if observed.low is None or observed.high is None or members < FEWEST_MEMBERS:
        return "inconclusive"
    if observed.high < base:
        return "fail"
    return (
        "pass" if adjusted is not None and adjusted <= FALSE_DISCOVERY_RATE and observed.low > base else "inconclusive"
    )


def _least_confident_rate(claim: Claim, failed: Tensor, groups: Tensor, confidence: Tensor) -> Estimate:
    """Failure rate of as many of the least confident, each under the family of the member at its place."""
    members, picks = least_confident(claim.inside, groups, confidence)
    return wilson(int(failed[picks, claim.family[members]].sum()), len(picks))


def _spread(sums: Tensor, members: int) -> Estimate:
    """Mean failure rate of random regions, and the range that holds 95 % of them."""
    if not members:
        return NOTHING
    rates = sums.double() / members
    low, high = rates.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(value=rates.mean().item(), low=low, high=high)

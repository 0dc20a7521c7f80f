"""The stages that judge: predictions against outcomes, and what the suggested examples bring."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from brittle.agreement import baselines, overall
from brittle.agreement.baselines import gradient_passes, gradient_scores
from brittle.agreement.contests import Contest, attack_distances, natural_errors, probe_failures, settle
from brittle.attacks.envelope import envelope
from brittle.findings import Agreement, ExampleSuggestion, Hole, RetrainCheck, Suggestions
from brittle.holes import Region
from brittle.kernel.memory import Memory, mass
from brittle.outcomes import Observed
from brittle.pipeline.context import NORMS, Context
from brittle.probes import MAP_SHARES
from brittle.records import AttackRows, Norm, Progress, ShiftMap
from brittle.scores import lack_of_support, late_path, late_path_at_reference, late_probabilities, severity_scores
from brittle.shift import probe_inputs
from brittle.stages import Spend
from brittle.suggest import regions, retrain_check
from brittle.suggest.plan import MOST_COVERED, plan, robustness


def agreement(
    c: Context, memory: Memory, shift: ShiftMap, observed: Observed, attacked: list[AttackRows]
) -> tuple[list[Contest], Agreement]:
    """Predicted against observed on sealed queries; kinds of failure are never pooled."""
    sealed, first = c.split.sealed, len(c.split.predict)
    right, ours = sealed.right, shift[first:]
    support = lack_of_support(ours.mass, c.groups, c.subject.classes)
    severity = observed[first:].severity(sealed.targets)
    envelopes = [envelope(attacked, norm) for norm in NORMS]
    generator = c.stages.generator("agreement")

    def compute(tick: Progress, spend: Spend) -> dict[str, Any]:
        under_probes = {name: score[right] for name, score in probe_scores(c, ours, support).items()}
        plain, by_norm = plain_scores(c, memory, spend)
        under_attack = {
            norm: {name: score[right] for name, score in scores.items()} for norm, scores in by_norm.items()
        }
        held = [
            natural_errors(~c.split.natural.right, natural_scores(c, memory, tick, spend), plain),
            *probe_failures(c.families, ours[right], under_probes, severity[right], under_attack["l2"]),
            *attack_distances(envelopes, ours[right], support[right], under_attack),
        ]
        settled = []
        for contest in held:
            settled.append(settle(contest, generator))
            tick(len(settled), len(held))
        return {"contests": held, "agreement": overall(settled, len(c.split.natural)).model_dump()}

    found = c.stages("agreement", "comparing predictions with outcomes", compute)
    return found["contests"], Agreement.model_validate(found["agreement"])


def plain_scores(c: Context, memory: Memory, spend: Spend) -> tuple[dict[str, Tensor], dict[Norm, dict[str, Tensor]]]:
    """The baselines of the natural queries, and of the sealed ones, the first of them, in each norm of the attacks.

    The descent among them takes as many gradient passes as the mass of an input.
    """
    natural, sealed, passes = c.split.natural, c.split.sealed, memory.evaluations
    plain = baselines(c.subject, natural, passes=passes)
    first = {name: score[: len(sealed)] for name, score in plain.items()}
    other = gradient_scores(c.subject, sealed, "linf", passes)
    spend(gradient_passes(c.subject, passes) * (len(natural) + len(sealed)))
    return plain, {"l2": first, "linf": {**first, **other}}


def natural_scores(c: Context, memory: Memory, tick: Progress, spend: Spend) -> dict[str, Tensor]:
    """Our scores of natural errors, the named one first."""
    queries = c.split.natural
    masses = mass(memory, c.subject, queries.inputs, queries.pairs, c.device, tick)[:, : len(c.groups)]
    spend(len(queries) * memory.evaluations)
    support = {"lack of support": lack_of_support(masses, c.groups, c.subject.classes)}
    if c.path is None:
        return support
    late = late_probabilities(c.path, c.subject, queries.inputs, c.device)
    return {"late path": late_path(late, queries.pairs)} | support


def probe_scores(c: Context, shift: ShiftMap, support: Tensor) -> dict[str, Tensor]:
    """Our scores of failure under each family, each (M, F), the named one first."""
    severity = torch.stack(list(severity_scores(shift).values()), dim=1)
    scores = {"predicted severity": severity, "lack of support": support[:, None].expand_as(severity)}
    if c.path is None:
        return scores
    sealed, draws, path, share = c.split.sealed, c.sealed_draws(), c.path, MAP_SHARES[-1]
    late = lambda inputs: late_path(late_probabilities(path, c.subject, inputs, c.device), sealed.pairs)  # noqa: E731
    clean = late(sealed.inputs)
    probes = [probe_inputs(sealed.inputs, family, draws[family.name], (share,))[:, 0] for family in c.families]
    carried = torch.stack([late_path_at_reference(clean, late(probe), share) for probe in probes], dim=1)
    return {"late path at the reference": carried} | scores


def suggestions(c: Context, holes: list[Hole], regions_of: list[Region], failures: int) -> Suggestions:
    """Regions that lack data, examples of the pool that would fill them, and what retraining says of it."""
    lacking = regions(holes, c.families, failures)
    if c.subject.pool is None:
        return Suggestions(regions=lacking, examples=[], note="No pool was given, so no examples are suggested.")
    generator = c.stages.generator("suggest")
    pool = len(c.subject.pool)

    def choose(tick: Progress, spend: Spend) -> list[dict[str, Any]]:
        spend(min(pool, MOST_COVERED) + min(len(c.subject.train), MOST_COVERED) + len(c.split.predict))
        return [s.model_dump() for s in plan(c.subject, c.split.predict, regions_of, generator, c.device)]

    chosen = c.stages("suggest", "choosing examples", choose)
    examples = [ExampleSuggestion.model_validate(s) for s in chosen]
    if c.subject.retrain is None:
        note = "The subject cannot be retrained (no `retrain`), so these suggestions are not checked."
        return Suggestions(regions=lacking, examples=examples, note=note)
    ids = torch.tensor([e.pool_id for e in examples])
    draws = c.stages.generator("suggest/check")
    score = robustness(c.subject, c.split.sealed, c.families, c.sealed_draws())
    check = c.stages(
        "suggest/check",
        "retraining with suggested and with random examples",
        lambda tick, _: retrain_check(
            c.subject, ids, seeds=c.effort.retrainings, score=score, generator=draws, progress=tick
        ).model_dump(),
    )
    return Suggestions(regions=lacking, examples=examples, check=RetrainCheck.model_validate(check))

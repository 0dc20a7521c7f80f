"""The stages that judge: predictions against outcomes, and what the suggested examples bring."""

from __future__ import annotations

from typing import Any

import torch

from brittle.agreement import overall
from brittle.agreement.contests import Contest, Predicted, attack_distances, natural_errors, probe_failures, settle
from brittle.attacks.envelope import envelope
from brittle.findings import Agreement, ExampleSuggestion, Hole, RetrainCheck, SealedPart, Suggestions
from brittle.holes import Region
from brittle.outcomes import Observed
from brittle.pipeline.context import NORMS, Context
from brittle.records import AttackRows, Progress
from brittle.stages import Spend
from brittle.suggest import regions, retrain_check
from brittle.suggest.plan import MOST_COVERED, plan, robustness


def agreement(
    c: Context, predicted: Predicted, sealed: SealedPart, observed: Observed, attacked: list[AttackRows]
) -> tuple[list[Contest], Agreement]:
    """Predicted against observed on the sealed queries, now open; kinds of failure are never pooled."""
    right = c.split.sealed.right.nonzero()[:, 0]
    severity = observed[len(c.split.predict) :].severity(c.split.sealed.targets)[right]
    generator = c.stages.generator("agreement")

    def compute(tick: Progress, spend: Spend) -> dict[str, Any]:
        held = [
            natural_errors(predicted, ~c.split.natural.right),
            *probe_failures(predicted, c.families, right, severity),
            *attack_distances(predicted, [envelope(attacked, norm) for norm in NORMS], right),
        ]
        settled = []
        for contest in held:
            settled.append(settle(contest, generator))
            tick(len(settled), len(held))
        return {"contests": held, "agreement": overall(settled, len(c.split.natural)).model_dump()}

    found = c.stages("agreement", "comparing predictions with outcomes", compute)
    agreed = Agreement.model_validate(found["agreement"])
    return found["contests"], agreed.model_copy(update={"sealed": sealed})


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

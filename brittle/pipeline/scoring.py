"""The stage that fixes what is predicted of the sealed queries: scores, baselines, rates and holes, without a label.

It takes the split before the opening, in which asking for a sealed label raises. Rates are fitted on the predicting
queries, whose labels are in the open.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from brittle.agreement import baselines, calibrate, extrapolated_margin
from brittle.agreement.baselines import gradient_passes, gradient_scores
from brittle.agreement.contests import NATURAL, Predicted, Rates
from brittle.agreement.increment import free_controls, together
from brittle.holes import Region
from brittle.kernel.memory import Memory, mass
from brittle.natural_holes import ground, natural_holes, where
from brittle.outcomes import Observed
from brittle.path.flat import FlatModel
from brittle.pipeline.context import NORMS, Context
from brittle.pipeline.reaching import REACH_PASSES, reach_scores
from brittle.probes import MAP_SHARES
from brittle.records import Progress, Queries, ShiftMap
from brittle.scores import (
    TAUGHT,
    lack_of_support,
    late_path,
    late_path_at_reference,
    late_probabilities,
    machine_lead,
    machine_opinions,
    machine_states,
    severity_scores,
)
from brittle.shift import probe_inputs
from brittle.stages import Spend

STEEPEST = "margin gradient"
"""The family along which the shift map's prediction of the adversarial distance looks."""


def predictions(c: Context, memory: Memory, shift: ShiftMap, observed: Observed, holes: list[Region]) -> Predicted:
    """All that is predicted of the sealed queries; what is stored is what counts, holes included."""
    predict, natural, first = c.split.predict, c.split.natural, len(c.split.predict)

    def compute(tick: Progress, spend: Spend) -> Predicted:
        masses = mass(memory, c.subject, natural.inputs, natural.pairs, c.device, tick)[:, : len(c.groups)]
        spend(len(natural) * memory.evaluations)
        opinions = taught_machine(c, len(natural) + len(predict), spend)
        ours, free = natural_scores(c, natural, masses, opinions)
        learned, known_free = natural_scores(c, predict, shift[:first].mass, opinions)
        under = probe_scores(c, shift)  # shape of each: (first + M, F)
        plain, steep = plain_scores(c, memory, spend)
        passes = descent_passes(memory)
        known_plain = baselines(c.subject, predict, passes=passes)
        spend(gradient_passes(c.subject, passes) * len(predict))
        named, clean = next(iter(under.values())), predict.right
        failed = observed[:first].failed(predict.targets)[clean]  # shape: (right ones, F)
        rates = {NATURAL: _rates(next(iter(learned.values())), ~clean, next(iter(ours.values())))}
        for f, family in enumerate(c.families):
            rates[family.name] = _rates(named[:first][clean, f], failed[:, f], named[first:, f])
        sealed, on = shift[first:], ground(shift[:first].mass, predict.pairs.predicted, ~clean)
        others = {
            "lack of support": lack_of_support(sealed.mass, c.groups, c.subject.classes),
            "predicted distance": severity_scores(sealed)[STEEPEST],
        }
        reached = reach_scores(c, spend)
        return Predicted(
            natural=ours,
            probes={name: score[first:] for name, score in under.items()},
            distances={norm: {"reach": reached[norm], **others} for norm in NORMS},
            plain=plain,
            extrapolated=extrapolated_margin(sealed),
            by_norm={"linf": steep},
            together=together((known_plain | known_free, learned), ~clean, (plain | free, ours)),
            rates=rates,
            holes=holes,
            natural_holes=where(natural_holes(on), on, masses, natural.pairs.predicted),
        )

    return c.stages("predictions", "fixing what is predicted", compute)


def taught_machine(c: Context, asked: int, spend: Spend) -> Callable[[Tensor], Tensor]:
    """The kernel machine, a function (M, *input) -> (M, C). asked: of how many inputs it will be."""
    states = machine_states(c.path) if c.path else [FlatModel(c.subject.model).state]
    spend((min(TAUGHT, len(c.subject.train)) + asked) * len(states))
    return machine_opinions(c.subject, states, c.stages.generator("kernel machine"), c.device)


def natural_scores(
    c: Context, queries: Queries, masses: Tensor, opinions: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Our scores of natural errors, the named one first, and what costs baselines nothing. masses: (M, G)."""
    own = {
        "kernel machine": machine_lead(opinions(queries.inputs), queries.pairs),
        "lack of support": lack_of_support(masses, c.groups, c.subject.classes),
    }
    if c.path is None:
        return own, free_controls(queries)
    late = late_probabilities(c.path, c.subject, queries.inputs, c.device)
    return own | {"late path": late_path(late, queries.pairs)}, free_controls(queries, late)


def probe_scores(c: Context, shift: ShiftMap) -> dict[str, Tensor]:
    """Our scores of failure under each family of the queries of the shift map, each (M, F), the named one first."""
    severity = torch.stack(list(severity_scores(shift).values()), dim=1)
    support = lack_of_support(shift.mass, c.groups, c.subject.classes)
    scores = {"predicted severity": severity, "lack of support": support[:, None].expand_as(severity)}
    if c.path is None:
        return scores
    queries, path, share = c.split.both, c.path, MAP_SHARES[-1]
    late = lambda inputs: late_path(late_probabilities(path, c.subject, inputs, c.device), queries.pairs)  # noqa: E731
    clean = late(queries.inputs)
    probes = (probe_inputs(queries.inputs, family, c.draws[family.name], (share,))[:, 0] for family in c.families)
    carried = torch.stack([late_path_at_reference(clean, late(probe), share) for probe in probes], dim=1)
    return {"late path at the reference": carried} | scores


def plain_scores(c: Context, memory: Memory, spend: Spend) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The baselines of the natural queries in L2, and in Linf those of the sealed ones that depend on the norm.

    The descent among them takes `descent_passes`.
    """
    natural, sealed, passes = c.split.natural, c.split.sealed, descent_passes(memory)
    spend(gradient_passes(c.subject, passes) * (len(natural) + len(sealed)))
    return baselines(c.subject, natural, passes=passes), gradient_scores(c.subject, sealed, "linf", passes)


def descent_passes(memory: Memory) -> int:
    """Gradient passes of the baseline that descends: as many as the costlier of our scores take, mass or reach."""
    return max(memory.evaluations, REACH_PASSES)


def _rates(learned: Tensor, failed: Tensor, score: Tensor) -> Rates:
    """Rates at `score` (M,), by a curve fitted on other inputs' scores and failures."""
    return Rates(calibrate(learned, failed)(score), len(failed), int(failed.sum()))

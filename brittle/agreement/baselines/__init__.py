"""What a user would compute anyway: scores from the final model alone. Higher means brittler.

outputs      softmax confidence, entropy, energy, logit margin: a forward pass
gradients    input-gradient norm, first-order distance, margin after one step and after K steps
neighbours   trust score on pixels and on features, nearest-neighbour ratio: distances to the training data
probed       extrapolated margin: what a straight line through the small probes gives

The last takes the same small probes as the shift map, without a kernel: a score that looks at probes must beat it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from brittle.agreement.baselines.gradients import first_order_distance, gradient_passes, gradient_scores
from brittle.agreement.baselines.neighbours import neighbour_scores
from brittle.agreement.baselines.outputs import output_scores
from brittle.agreement.baselines.probed import extrapolated_margin
from brittle.records import Norm, Queries
from brittle.subject import Subject

__all__ = ["baselines", "extrapolated_margin", "first_order_distance", "gradient_passes", "gradient_scores"]

PASSES = 20
"""Steps of `margin after K steps` where the caller does not say what its own score costs."""


def baselines(
    subject: Subject,
    queries: Queries,
    norm: Norm = "l2",
    progress: Callable[[int, int], None] | None = None,
    passes: int = PASSES,
) -> dict[str, Tensor]:
    """All scores by name but the extrapolated margin, each (M,) float64; no label is looked at.

    Args:
        norm: in which gradients are measured and steps taken.
        progress: called with (steps done, all steps).
        passes: K of `margin after K steps`: as many gradient passes as the score beside it costs.

    Cost: min(9, C - 1) + passes + 2 gradient passes a query; three nearest-neighbour searches in the training data,
    and one of the training data in itself, on inputs and on features.
    """
    report, climbs = progress or (lambda done, total: None), gradient_passes(subject, passes)
    steep = gradient_scores(subject, queries, norm, passes, lambda done: report(done, climbs + 3))
    near = neighbour_scores(subject, queries, lambda done: report(climbs + done, climbs + 3))
    return {**output_scores(queries.logits), **steep, **near}

"""Examples of a pool to add, so that the pool is covered best, given what the training examples cover.

They are chosen by greedy facility location in the cosine of tangent-kernel features (gradients of the outputs
with respect to the final weights). With k(q, i) that cosine, a set S covers a pool of Q examples by

    F(S) = sum_q w_q max(max_{i in training} k(q, i), max_{i in S} k(q, i), 0) / sum_q w_q

and each step adds the example that raises F most. F is monotone and submodular, so the greedy set reaches at least
1 - 1/e of the best set's gain, and the gain of an example never rises from step to step: a candidate whose old gain
is below another's new one need not be looked at again. On small data it was the one rule that helped clean and
robust accuracy both; weights by uncertainty helped the first and cost the second, hence none by default.

Sources: An analysis of approximations for maximizing submodular set functions, G. Nemhauser, L. Wolsey and
M. Fisher, 1978, https://doi.org/10.1007/BF01588971; Accelerated greedy algorithms for maximizing submodular set
functions, M. Minoux, 1978, https://doi.org/10.1007/BFb0006528.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from brittle.errors import DataError, NotFiniteError
from brittle.findings import ExampleSuggestion
from brittle.subject import Subject


def choose(
    pool_features: Tensor, covered_features: Tensor, count: int, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The pool examples that together cover the pool best, given what training covers.

    Args:
        pool_features: (Q, D).  covered_features: (N, D), of the training examples; N may be 0.
        count: how many to choose; at most Q.
        weights: (Q,), how much covering each pool example counts; 1 by default.

    Returns:
        Ids of the chosen in the order of choice, and the gain in F of each, both (count,); gains never rise.

    Raises:
        NotFiniteError: for features with NaN or infinity.

    Cost: O(Q^2) memory; O(Q (Q + N) D) for the cosines, then seldom more than a few Q a choice.
    """
    pool = F.normalize(_finite(pool_features), dim=1)  # shape: (Q, D)
    weights = pool.new_ones(len(pool)) if weights is None else weights.to(pool)
    share = weights / weights.sum()
    similar = pool @ pool.T  # shape: (Q, Q): row = candidate, column = covered
    reached = _reach(pool, F.normalize(_finite(covered_features), dim=1))  # shape: (Q,)
    bounds = _gain(similar, reached, share)
    chosen, gains = list[int](), list[float]()
    for _ in range(min(count, len(pool))):
        best = _largest(bounds, similar, reached, share)
        chosen.append(best)
        gains.append(bounds[best].item())
        reached = torch.maximum(reached, similar[best])
        bounds[best] = -torch.inf
    return torch.tensor(chosen, dtype=torch.int64), torch.tensor(gains, dtype=torch.float64)


def suggest(
    subject: Subject, ids: Tensor, pool_features: Tensor, train_features: Tensor, membership: Tensor, count: int
) -> list[ExampleSuggestion]:
    """The pool examples to add, each with the hole that it lies in.

    Args:
        ids: (Q,) the pool examples that may be chosen.
        pool_features: (Q, D) and train_features: (N, D), tangent-kernel features of pool and training data.
        membership: (Q,) id of the hole whose rule each pool example meets, -1 for none.

    Returns:
        `count` suggestions in the order of choice; none where the subject has no pool.
    """
    if subject.pool is None:
        return []
    if not len(ids) == len(pool_features) == len(membership):
        raise DataError(
            f"each pool example needs its features and its hole: {len(ids)} examples, "
            f"{len(pool_features)} features, {len(membership)} hole ids"
        )
    chosen, gains = choose(pool_features, train_features, count)
    return [
        ExampleSuggestion(
            pool_id=int(ids[row]),
            name=subject.pool.name(int(ids[row])),
            class_name=subject.class_names[int(subject.pool.targets[ids[row]])],
            hole=int(membership[row]) if membership[row] >= 0 else None,
            gain=gain,
        )
        for row, gain in zip(chosen.tolist(), gains.tolist(), strict=True)
    ]


def _finite(features: Tensor) -> Tensor:
    if not features.isfinite().all():
        raise NotFiniteError(
            f"features must be finite, found {int((~features.isfinite()).sum())} NaN or infinities; "
            "look for overflow in the model's gradients"
        )
    return features.flatten(1)


def _reach(pool: Tensor, covered: Tensor) -> Tensor:
    """Each pool example's largest cosine with what is covered, at least 0. (Q, D), (N, D) -> (Q,)."""
    reached = pool.new_zeros(len(pool))
    for part in covered.split(4096):
        reached = torch.cat([reached[:, None], pool @ part.T.to(pool)], 1).amax(1)
    return reached


def _gain(similar: Tensor, reached: Tensor, share: Tensor) -> Tensor:
    """What candidates add to F. similar: (..., Q), their cosines; reached, share: (Q,) -> (...,)."""
    return (similar - reached).clamp_min(0) @ share


def _largest(bounds: Tensor, similar: Tensor, reached: Tensor, share: Tensor) -> int:
    """The candidate of largest gain; `bounds` (Q,) are gains of earlier steps, renewed where they are looked at."""
    renewed = set[int]()
    while (best := int(bounds.argmax())) not in renewed:
        bounds[best] = _gain(similar[best], reached, share)
        renewed.add(best)
    return best

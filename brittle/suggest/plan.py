"""What to add: features of pool and training data, the hole each pool example lies nearest to, and the choice.

A pool example belongs to the hole of the query it is most like, by the tangent kernel's cosine: its features
are output gradients at the final weights, randomly projected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brittle.data import Examples
from brittle.findings import ExampleSuggestion
from brittle.holes import Region
from brittle.kernel.tangent import tangent_features
from brittle.probes import Family
from brittle.records import Queries
from brittle.shift import probe_inputs
from brittle.subject import Subject
from brittle.suggest.cover import suggest

DIMENSIONS = 512
MOST_COVERED = 5_000
"""Training examples, and pool examples, that the choice looks at."""

SHARE_OF_POOL, MOST_ADDED = 5, 200
"""One pool example in five is suggested, at most so many."""


@dataclass(frozen=True)
class Robustness:
    """Accuracy as it is and under the image probes at their reference severity, on fixed probes of some queries."""

    subject: Subject
    queries: Queries
    probes: Tensor  # shape: (M, F, *input)

    def __call__(self, model: nn.Module) -> tuple[float, float]:
        """(clean, robust) accuracy of a model, in [0, 1]."""
        right = lambda inputs, targets: (  # noqa: E731
            (self.subject.predict(inputs, model=model).argmax(1) == targets).double().mean().item()
        )
        targets = self.queries.targets
        return right(self.queries.inputs, targets), right(
            self.probes.flatten(0, 1), targets.repeat_interleave(self.probes.shape[1])
        )


def robustness(
    subject: Subject, queries: Queries, families: Sequence[Family], draws: Mapping[str, Tensor]
) -> Robustness:
    """Fix the probes on which models are compared: every family's reference severity, directions left out."""
    usual = [f for f in families if f.unit != "L2"] or [f for f in families if f.name == "random direction"]
    probes = torch.cat([probe_inputs(queries.inputs, f, draws[f.name], (1.0,)) for f in usual], dim=1)
    return Robustness(subject, queries, probes)


def plan(
    subject: Subject, queries: Queries, holes: Sequence[Region], generator: torch.Generator, device: str = "cpu"
) -> list[ExampleSuggestion]:
    """The pool examples to add, in the order of choice; none without a pool.

    Args:
        queries: those from which the holes were made.
    """
    if subject.pool is None:
        return []
    pool, seed = subject.pool, int(torch.randint(1 << 31, (1,), generator=generator))
    look = lambda examples: tangent_features(  # noqa: E731
        subject, examples, DIMENSIONS, torch.Generator().manual_seed(seed), device
    )
    kept = torch.randperm(len(pool), generator=generator)[:MOST_COVERED].sort().values
    covered = torch.randperm(len(subject.train), generator=generator)[:MOST_COVERED]
    features = look(pool[kept])
    nearest = _nearest(features, look(Examples(queries.inputs, queries.targets)))
    home = torch.full((len(queries),), -1)
    for number in reversed(range(len(holes))):
        home[holes[number].members] = number
    count = min(len(pool) // SHARE_OF_POOL, MOST_ADDED)
    return suggest(subject, kept, features, look(subject.train[covered]), home[nearest], count)


def _nearest(features: Tensor, others: Tensor) -> Tensor:
    """For each row the most similar row of `others`, by cosine. (Q, D), (M, D) -> (Q,)."""
    return (F.normalize(features, dim=1) @ F.normalize(others, dim=1).T).argmax(1)

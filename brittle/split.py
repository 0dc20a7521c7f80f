"""Test inputs apart: those that make the prediction, and sealed ones that only test it.

The split is drawn before anything is looked at. Holes, thresholds and calibrated rates come from the `predict`
part; the labels of the sealed part are used for nothing but the comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.errors import DataError
from brittle.records import Pairs, Queries
from brittle.subject import Subject

MOST_NATURAL = 2_000
"""Sealed inputs on which natural errors are held against scores."""

FEWEST = 20
"""Test inputs without which there is nothing to split."""


@dataclass(frozen=True)
class Split:
    """The parts of the test data."""

    predict: Queries  # make the prediction
    sealed: Queries  # are probed and attacked
    natural: Queries  # sealed inputs for natural errors, `sealed` the first of them
    everything: Queries  # all test inputs

    @property
    def both(self) -> Queries:
        """The queries of the shift map: `predict`, then `sealed`."""
        return self.everything[torch.cat([self.predict.ids, self.sealed.ids])]


def split_test(subject: Subject, queries: int, generator: torch.Generator) -> Split:
    """At most half the test inputs predict, as many (`queries`) are sealed, the others join natural errors."""
    if len(subject.test) < FEWEST:
        raise DataError(
            f"test needs at least {FEWEST} inputs to predict on some and test on others, found {len(subject.test)}"
        )
    everything = queries_at(subject, torch.arange(len(subject.test)))
    order = torch.randperm(len(everything), generator=generator)
    count = min(queries, len(order) // 2)
    return Split(
        predict=everything[order[:count]],
        sealed=everything[order[count : 2 * count]],
        natural=everything[order[count : count + max(count, MOST_NATURAL)]],
        everything=everything,
    )


def queries_at(subject: Subject, ids: Tensor) -> Queries:
    """Queries at positions of the test data, with the model's logits there."""
    part = subject.test[ids]
    logits = subject.predict(part.inputs)
    return Queries(ids, part.inputs, part.targets, logits, Pairs.of(logits))

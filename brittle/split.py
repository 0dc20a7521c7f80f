"""Test inputs apart: those that make the prediction, and sealed ones that only test it.

The split is drawn before anything is looked at. Holes, thresholds and calibrated rates come from the `predict`
part; the labels of the sealed part are used for nothing but the comparison. So that this is no mere promise,

    seal = Seal(split_test(...))
    seal.split                    for what predicts: of the sealed part inputs, logits and pairs; labels raise
    seal.open({name: digest})     the labels, once, in exchange for the digests of all that was predicted

Attacks come after the opening: which inputs are right when clean is itself a label. `Subject.test` still holds every
label, for this module to read and for pictures to be drawn from; that nothing fixed before the opening depends on the
sealed ones there is tested, by changing them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from brittle.errors import DataError, SealedError
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


class Unlabelled(Queries):
    """Queries whose labels are sealed: whoever asks for one hears of it."""

    def __init__(self, ids: Tensor, inputs: Tensor, logits: Tensor, pairs: Pairs) -> None:
        for name, value in (("ids", ids), ("inputs", inputs), ("logits", logits), ("pairs", pairs)):
            object.__setattr__(self, name, value)

    def __getitem__(self, rows: Tensor | slice) -> Unlabelled:
        return Unlabelled(self.ids[rows], self.inputs[rows], self.logits[rows], self.pairs[rows])

    @property
    def targets(self) -> NoReturn:
        raise SealedError("sealed labels may not be looked at before predictions are fixed; take those of Seal.open")

    @classmethod
    def of(cls, queries: Queries) -> Unlabelled:
        """The same queries without their labels."""
        return cls(queries.ids, queries.inputs, queries.logits, queries.pairs)


class Seal:
    """Keeps the labels of the sealed part, and gives them out once."""

    def __init__(self, whole: Split) -> None:
        self._whole: Split | None = whole
        hidden = {name: Unlabelled.of(getattr(whole, name)) for name in ("sealed", "natural", "everything")}
        self.split = replace(whole, **hidden)
        self.fixed: dict[str, str] = {}

    def open(self, fixed: Mapping[str, str]) -> Split:
        """The split with all labels.

        Args:
            fixed: digests, by name, of all that was predicted of the sealed part; empty where nothing was.

        Raises:
            SealedError: the second time.
        """
        if self._whole is None:
            raise SealedError(
                f"sealed labels are given out once, they were opened with {', '.join(self.fixed) or 'nothing'} fixed; "
                "pass on the split that the first opening gave"
            )
        whole, self._whole, self.fixed = self._whole, None, dict(fixed)
        return whole


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

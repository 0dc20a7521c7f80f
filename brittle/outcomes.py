"""What really happened: predictions under every probe at four severities, and the rows of the failures table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.probes import Family
from brittle.records import AttackRows, Progress, Queries
from brittle.shift import probe_inputs
from brittle.subject import Subject

LEVELS = (0.25, 0.5, 0.75, 1.0)
"""Severities at which outcomes are observed, as shares of a family's reference."""


@dataclass(frozen=True)
class Observed:
    """Predicted classes of M queries under F families at the `LEVELS`."""

    classes: Tensor  # shape: (M, F, K)

    def __getitem__(self, rows: Tensor | slice) -> Observed:
        """What was observed of some of the queries."""
        return Observed(self.classes[rows])

    def failed(self, targets: Tensor) -> Tensor:
        """Wrong by the reference severity: (M, F) bool."""
        return (self.classes != targets[:, None, None]).any(2)

    def severity(self, targets: Tensor) -> Tensor:
        """Smallest level that fails, infinite where none does: (M, F)."""
        wrong = self.classes != targets[:, None, None]
        return torch.where(wrong, torch.tensor(LEVELS, dtype=torch.float64), torch.inf).amin(2)


def observe(
    subject: Subject, queries: Queries, families: Sequence[Family], draws: Mapping[str, Tensor], progress: Progress
) -> Observed:
    """Run the model on every probe of every query. Cost: M F K forward passes."""
    found = []
    for f, family in enumerate(families):
        probes = probe_inputs(queries.inputs, family, draws[family.name], LEVELS)  # shape: (M, K, *input)
        found.append(subject.predict(probes.flatten(0, 1)).argmax(1).reshape(len(queries), -1))
        progress(f + 1, len(families))
    return Observed(torch.stack(found, dim=1))


def failure_rows(
    subject: Subject,
    queries: Queries,
    families: Sequence[Family],
    observed: Observed,
    share: Tensor,
    holes: Sequence[Sequence[int]],
    part: Sequence[str],
) -> Iterator[dict[str, object]]:
    """One row a query and probe family. share: (M, F) predicted severity; holes, part: per query."""
    severity = observed.severity(queries.targets)
    names = subject.class_names
    for m in range(len(queries)):
        for f, family in enumerate(families):
            level = severity[m, f].item()
            at = LEVELS.index(level) if level in LEVELS else -1
            yield {
                "query": int(queries.ids[m]),
                "part": part[m],
                "kind": "probe",
                "name": family.name,
                "norm": "",
                "unit": family.unit,
                "distance": level * family.reference,
                "predicted": share[m, f].item() * family.reference,
                "success": level <= 1 and bool(queries.right[m]),
                "evaluations": 0,
                "true_class": names[int(queries.targets[m])],
                "clean_class": names[int(queries.pairs.predicted[m])],
                "new_class": names[int(observed.classes[m, f, at])],
                "holes": " ".join(map(str, holes[m])),
            }


def attack_rows(
    subject: Subject, queries: Queries, rows: Sequence[AttackRows], holes: Sequence[Sequence[int]]
) -> Iterator[dict[str, object]]:
    """One row a query and attack, with the columns of `failure_rows`."""
    names = subject.class_names
    for attack in rows:
        for m in range(len(queries)):
            yield {
                "query": int(queries.ids[m]),
                "part": "sealed",
                "kind": "attack",
                "name": attack.attack,
                "norm": attack.norm,
                "unit": attack.norm,
                "distance": attack.distance[m].item(),
                "predicted": "",
                "success": bool(attack.success[m]),
                "evaluations": int(attack.evaluations[m]),
                "true_class": names[int(queries.targets[m])],
                "clean_class": names[int(queries.pairs.predicted[m])],
                "new_class": names[int(attack.new_class[m])],
                "holes": " ".join(map(str, holes[m])),
            }

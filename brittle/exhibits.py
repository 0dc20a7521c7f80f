"""What the report shows besides the findings: the arrays behind its figures, and the pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from brittle.accounts import Account
from brittle.agreement.contests import Contest
from brittle.findings import Findings
from brittle.records import Groups, Queries, ShiftMap
from brittle.shift import gone_at
from brittle.subject import Subject


def figure_arrays(
    subject: Subject,
    shift: ShiftMap,
    queries: Queries,
    groups: Groups,
    contests: Sequence[Contest],
    account: Account,
    count: int,
) -> dict[str, Tensor]:
    """The arrays that `report.render` names. queries: of the shift map; count: of the ledger's queries shown."""
    arrays = {f"severity.{name}": column for name, column in zip(shift.families, gone_at(shift).T, strict=True)}
    arrays["shift.rate"] = mean_shift(shift, queries, groups, subject.classes)
    arrays["shift.queries"] = torch.bincount(queries.pairs.predicted, minlength=subject.classes)
    for k, contest in enumerate(contests):
        arrays[f"agreement.{k}.scores"] = contest.scores
        arrays[f"agreement.{k}.failed"] = contest.failed
        if contest.severity is not None:
            arrays[f"agreement.{k}.severity"] = contest.severity
    if account.ledger is not None:
        ledger = account.ledger
        arrays["ledger.rows"] = torch.stack([ledger.row(name)[:count] for name in ledger.ROWS])
        arrays["ledger.output"] = ledger.output[:count]
    return {name: array.contiguous() for name, array in arrays.items()}


def mean_shift(shift: ShiftMap, queries: Queries, groups: Groups, classes: int) -> Tensor:
    """Change of each class's mass, carried to the reference severity, by predicted class: (F, C, C) logits."""
    factor = shift.reference / shift.severities[:, -1]  # shape: (F,)
    moved = groups.by_class(shift.shift[:, :, -1], classes) * factor[:, None]  # shape: (M, F, C)
    rows = [moved[queries.pairs.predicted == c] for c in range(classes)]
    return torch.stack([r.mean(0) if len(r) else r.new_full(moved.shape[1:], torch.nan) for r in rows], dim=1)


def training_index(subject: Subject) -> dict[str, list[str]]:
    """Name and class of every training example, so that a run can be read without its subject."""
    names = [subject.train.name(i) for i in range(len(subject.train))]
    return {"names": names, "classes": [subject.class_names[c] for c in subject.train.targets.tolist()]}


def pictures(subject: Subject, findings: Findings, flipped: Tensor) -> dict[str, Tensor]:
    """The inputs that the report shows, by key. flipped: (K, *input) the flips, in the findings' order."""
    test = {i for hole in findings.holes for i in (hole.exemplar, *hole.members)}
    train = set()
    for flip in findings.prediction.flips:
        test.add(flip.query)
        train |= {example.id for example in [*flip.leaving, *flip.arriving]}
    shown = {f"test:{i}": subject.test.inputs[i] for i in sorted(test)}
    shown |= {f"train:{i}": subject.train.inputs[i] for i in sorted(train)}
    if subject.pool is not None:
        shown |= {f"pool:{e.pool_id}": subject.pool.inputs[e.pool_id] for e in findings.suggestions.examples}
    return shown | {f"flip:{k}": picture for k, picture in enumerate(flipped)}

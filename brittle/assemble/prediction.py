"""The prediction: the shift map family by family, the flows of mass, the worst flips explained."""

from __future__ import annotations

import torch
from torch import Tensor

from brittle.assemble.estimates import finite
from brittle.assemble.evidence import Evidence
from brittle.findings import ExampleShift, FamilyPrediction, Flip, Flow, Prediction
from brittle.holes import leak_of
from brittle.shift import flow, gone_at

SHOWN_EXAMPLES, FEWEST_IN_FLOW, MOST_FLOWS = 5, 3, 30


def prediction(e: Evidence) -> Prediction:
    """The shift map, family by family, over all its queries, and the worst flips explained."""
    gone = gone_at(e.shift)
    families = [
        FamilyPrediction(
            name=family.name,
            unit=family.unit,
            reference=family.reference,
            map_severities=e.shift.severities[f].tolist(),
            predicted_failing=(gone[:, f] <= family.reference).double().mean().item(),
            median_severity=finite(gone[:, f].median()),
        )
        for f, family in enumerate(e.families)
    ]
    return Prediction(
        queries=len(e.split.both),
        groups=list(e.groups.names),
        families=families,
        flows=flows(e),
        flips=[_flip(e, k) for k in range(len(e.flips))],
    )


def flows(e: Evidence) -> list[Flow]:
    """The commonest flows of mass between classes among queries predicted to fail, most frequent first."""
    leak, moved, names = leak_of(e.shift, e.groups), flow(e.shift, e.groups), e.subject.class_names
    found = []
    for f, family in enumerate(e.families):
        fails = leak.share[:, f] <= 1
        ends = torch.stack([leak.from_class[:, f], leak.to_class[:, f]], dim=1)
        for a, b in ends[fails].unique(dim=0).tolist():
            rows = fails & (ends == torch.tensor([a, b])).all(1)
            if int(rows.sum()) >= FEWEST_IN_FLOW:
                found.append(
                    Flow(
                        family=family.name,
                        from_class=names[a],
                        to_class=names[b],
                        queries=int(rows.sum()),
                        leaving=moved.lost[rows, f].mean().item(),
                        arriving=moved.gained[rows, f].mean().item(),
                    )
                )
    return sorted(found, key=lambda flow: -flow.queries)[:MOST_FLOWS]


def _flip(e: Evidence, k: int) -> Flip:
    flips, names = e.flips, e.subject.class_names
    m, count = int(flips.rows[k]), len(flips)
    before, after = e.account.contributions[e.first + k], e.account.contributions[e.first + count + k]
    change = after - before
    logits = e.subject.predict(torch.stack([flips.before[k], flips.after[k]]))
    margins = flips.pairs[torch.tensor([k, k])].margin(logits).tolist()
    holding = torch.where(before > 0, change, torch.inf)
    against = torch.where(after < 0, change, torch.inf)

    def examples(ranked: Tensor) -> list[ExampleShift]:
        rows = [i for i in ranked.argsort()[:SHOWN_EXAMPLES].tolist() if ranked[i] < 0]
        return [
            ExampleShift(
                id=i,
                name=e.subject.train.name(i),
                class_name=names[int(e.subject.train.targets[i])],
                before=before[i].item(),
                after=after[i].item(),
            )
            for i in rows
        ]

    return Flip(
        query=int(e.split.sealed.ids[m]),
        how=flips.how[k],
        size=flips.size[k],
        unit=flips.unit[k],
        true_class=names[int(e.split.sealed.targets[m])],
        before_class=names[int(flips.pairs.predicted[k])],
        after_class=names[int(flips.pairs.rival[k])],
        margin_before=margins[0],
        margin_after=margins[1],
        leaving=examples(torch.where(against < torch.inf, torch.inf, holding)),
        arriving=examples(against),
        picture_before=f"test:{int(e.split.sealed.ids[m])}",
        picture_after=f"flip:{k}",
        account=e.account.kind,
    )

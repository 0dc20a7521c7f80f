"""From what the stages found to findings: each function writes one part of the document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.accounts import Account
from brittle.agreement import hole_test, wilson
from brittle.agreement.contests import Contest
from brittle.attacks.envelope import envelope
from brittle.exhibits import figure_arrays, pictures, training_index
from brittle.findings import (
    Agreement,
    AttackResult,
    Attacks,
    ClassAccuracy,
    Clean,
    Cost,
    Estimate,
    ExampleShift,
    FamilyPrediction,
    Fidelity,
    Findings,
    Flip,
    Flow,
    Hole,
    LedgerRow,
    MemoryFidelity,
    Prediction,
    SubjectFacts,
    Suggestions,
)
from brittle.flips import Flips
from brittle.holes import Leak, Region, leak_of, membership
from brittle.outcomes import Observed, attack_rows, failure_rows
from brittle.path.store import PathReader
from brittle.probes import Family
from brittle.records import AttackRows, Groups, Norm, ShiftMap
from brittle.report import render
from brittle.runs import RunFolder
from brittle.shift import flow, gone_at
from brittle.split import Split
from brittle.subject import Subject

CLOSES, FAITHFUL = 0.05, 0.9
"""Relative residual up to which an account closes, and shift cosine from which the memory is faithful."""

SHOWN_EXAMPLES, FEWEST_IN_FLOW, MOST_FLOWS = 5, 3, 30


@dataclass(frozen=True)
class Evidence:
    """Everything the stages found."""

    subject: Subject
    spec: str | None
    path: PathReader | None
    split: Split
    families: tuple[Family, ...]
    groups: Groups
    memory_fidelity: MemoryFidelity | None
    shift: ShiftMap  # of `split.both`
    observed: Observed  # of `split.both`
    holes: list[Region]
    attacked: list[AttackRows]  # on sealed queries that are right when clean
    flips: Flips
    account: Account  # of the predicting queries, then every flip before and after
    contests: list[Contest]
    agreement: Agreement

    @property
    def first(self) -> int:
        """Where the sealed queries begin in `split.both`."""
        return len(self.split.predict)


def write_run(e: Evidence, holes: list[Hole], suggestions: Suggestions, run: RunFolder, cost: Cost) -> Findings:
    """Write every document of the run folder; returns the findings."""
    findings = Findings(
        subject=subject_facts(e),
        fidelity=fidelity(e),
        clean=clean(e),
        prediction=prediction(e),
        holes=holes,
        attacks=attacks(e),
        agreement=e.agreement,
        suggestions=suggestions,
        warnings=warnings(e),
        cost=cost,
    )
    lies_in = holes_of_queries(e)
    sealed = e.split.sealed
    right = sealed.right.nonzero()[:, 0]
    parts = ["predict"] * e.first + ["sealed"] * len(sealed)
    share = leak_of(e.shift, e.groups).share
    probe_rows = failure_rows(e.subject, e.split.both, e.families, e.observed, share, lies_in, parts)
    attacked = attack_rows(e.subject, sealed[right], e.attacked, [lies_in[e.first + int(r)] for r in right])
    arrays = figure_arrays(e.subject, e.shift, e.split.both, e.groups, e.contests, e.account, e.first)
    arrays |= {f"distance.{norm}": envelope(e.attacked, norm).distance for norm in norms_of(e.attacked)}
    shown = pictures(e.subject, findings, e.flips.after)
    run.save_failures([*probe_rows, *attacked])
    run.save_document("holes", [hole.model_dump() for hole in holes])
    run.save_document("train", training_index(e.subject))
    run.save("figures", arrays)
    run.save("pictures", shown)
    run.save_report(render(findings, arrays, shown))
    run.save_findings(findings)
    return findings


def subject_facts(e: Evidence) -> SubjectFacts:
    """What was audited."""
    s = e.subject
    return SubjectFacts(
        name=s.name,
        spec=e.spec,
        class_names=list(s.class_names),
        parameters=sum(p.numel() for p in s.model.parameters()),
        input_shape=list(s.train.inputs.shape[1:]),
        bounds=list(s.bounds),
        train=len(s.train),
        test=len(s.test),
        pool=len(s.pool) if s.pool is not None else 0,
        optimizer=e.path.optimizer if e.path else None,
        steps=e.path.steps if e.path else None,
    )


def fidelity(e: Evidence) -> Fidelity:
    """How much of the path is known, how well the account closes, and what may be claimed."""
    ledger = e.account.ledger
    if ledger is None:
        return Fidelity(
            path="weights",
            verdict="inconclusive",
            statement=(
                "Only the final weights are known. Contributions are those of one more training step (the tangent "
                "kernel): local statements about which examples would move a prediction now. It cannot be claimed "
                "which examples made a prediction during training, and no account closes."
            ),
        )
    closes = ledger.relative_residual <= CLOSES
    faithful = e.memory_fidelity is not None and e.memory_fidelity.shift_cosine >= FAITHFUL
    return Fidelity(
        path="recorded",
        verdict="pass" if closes and faithful else "fail",
        statement=(
            "Every step of the training is known. Each prediction is accounted for, example by example, up to "
            f"{ledger.relative_residual:.2%} of what was learned. Contributions say how training examples moved a "
            "prediction in this training; they do not say what would have happened without them."
        ),
        relative_residual=ledger.relative_residual,
        cancellation=ledger.cancellation.median().item(),
        rows=[
            LedgerRow(name=name, mean=row.mean().item(), mean_absolute=row.abs().mean().item())
            for name, row in ((name, ledger.row(name)[: e.first]) for name in ledger.ROWS)
        ],
        memory=e.memory_fidelity,
    )


def clean(e: Evidence) -> Clean:
    """Accuracy on all test inputs as they are."""
    everything = e.split.everything
    classes = []
    for c, name in enumerate(e.subject.class_names):
        own = everything.right[everything.targets == c]
        classes.append(ClassAccuracy(class_name=name, inputs=len(own), accuracy=wilson(int(own.sum()), len(own))))
    right = wilson(int(everything.right.sum()), len(everything))
    return Clean(inputs=len(everything), accuracy=right, per_class=classes)


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
            median_severity=_finite(gone[:, f].median()),
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
    leak, moved, names = leak_of(e.shift, e.groups), flow(e.shift), e.subject.class_names
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


def hole_families(families: Sequence[Family]) -> list[int]:
    """The families that holes are made of: ordinary perturbations, or directions where there are no others."""
    usual = [f for f, family in enumerate(families) if family.unit != "L2"]
    return usual or list(range(len(families)))


def hole_findings(e: Evidence) -> list[Hole]:
    """Every hole with its test on the sealed queries that are right when clean."""
    leak, sealed = leak_of(e.shift[e.first :], e.groups), e.split.sealed
    failed = e.observed[e.first :].failed(sealed.targets)  # shape: (M, F)
    return [_hole(e, number, region, leak, failed, sealed.right) for number, region in enumerate(e.holes)]


def holes_of_queries(e: Evidence) -> list[list[int]]:
    """The holes that each query of `split.both` lies in, by their rule."""
    leak = leak_of(e.shift, e.groups)
    inside = [membership(region, leak)[0].tolist() for region in e.holes]
    return [[number for number, rows in enumerate(inside) if rows[m]] for m in range(len(e.split.both))]


def attacks(e: Evidence) -> Attacks:
    """Every attack's success and distance, and the envelope's, in each norm."""
    sealed = e.split.sealed
    results = []
    for norm in norms_of(e.attacked):
        smallest = envelope(e.attacked, norm)
        results += [_attack(rows, smallest) for rows in e.attacked if rows.norm == norm] + [_attack(smallest, None)]
    return Attacks(inputs=int(sealed.right.sum()), wrong_when_clean=int((~sealed.right).sum()), results=results)


def warnings(e: Evidence) -> list[str]:
    """What a reader must know before trusting a figure."""
    found, sealed = [], e.split.sealed
    if not sealed.right.all():
        found.append(
            f"{int((~sealed.right).sum())} of {len(sealed)} sealed queries are wrong when clean; they count as natural "
            "errors and are left out of probes and attacks."
        )
    for f, family in enumerate(e.families):
        failed = e.observed[e.first :].failed(sealed.targets)[sealed.right, f]
        if failed.double().mean() < 0.01:
            found.append(
                f"Under {family.name} fewer than 1% fail by {family.reference:g} ({family.unit}): little to learn."
            )
    if e.path is None:
        found.append("No path was recorded: mass and shift are those of one more training step at the final weights.")
    return found


def norms_of(rows: Sequence[AttackRows]) -> list[Norm]:
    """The norms attacked in, in order."""
    return list(dict.fromkeys(r.norm for r in rows))


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


def _hole(e: Evidence, number: int, region: Region, leak: Leak, failed: Tensor, right: Tensor) -> Hole:
    names, ids = e.subject.class_names, e.split.predict.ids
    start, end = region.flows[0]
    opened = [e.families[f].name for f in region.families]
    inside, family_of = membership(region, leak)
    inside = inside & right
    hits = failed.gather(1, family_of[:, None])[:, 0] & inside
    rates = failed[right].double().mean(0)  # shape: (F,)
    base = rates[family_of[inside]].mean().item() if inside.any() else rates[list(region.families)].mean().item()
    return Hole(
        id=number,
        title=f"{names[start]} gives way to {names[end]} under {' and '.join(opened[:2])}",
        families=opened,
        from_class=names[start],
        to_class=names[end],
        from_group=e.groups.names[region.from_group],
        to_group=e.groups.names[region.to_group],
        exemplar=int(ids[region.exemplar]),
        members=ids[region.members].tolist(),
        support=region.support,
        severity=Estimate(
            value=region.share.median().item(),
            low=region.share.quantile(0.05).item(),
            high=region.share.quantile(0.95).item(),
        ),
        predicted_rate=_mean(region.rate),
        test=hole_test(int(inside.sum()), int(hits.sum()), base),
    )


def _attack(rows: AttackRows, smallest: AttackRows | None) -> AttackResult:
    """One attack's figures. smallest: the envelope in the same norm, None for the envelope itself."""
    count = len(rows.success)
    share = None
    if smallest is not None and rows.kind == "minimal":
        share = (rows.success & (rows.distance <= smallest.distance * (1 + 1e-6))).double().mean().item()
    return AttackResult(
        name=rows.attack,
        norm=rows.norm,
        kind="envelope" if smallest is None else rows.kind,
        epsilon=rows.epsilon,
        inputs=count,
        success=wilson(int(rows.success.sum()), count),
        median_distance=_median(rows.distance.double()),
        smallest_share=share,
        evaluations=rows.evaluations.double().mean().item(),
    )


def _median(values: Tensor) -> Estimate:
    """The median with its distribution-free interval, from order statistics (normal approximation of the ranks)."""
    ordered, n = values.sort().values, len(values)
    if n == 0:
        return Estimate(value=None, low=None, high=None)
    half = 0.98 * n**0.5
    low, high = max(0, round(n / 2 - half) - 1), min(n - 1, round(n / 2 + half))
    return Estimate(value=_finite(ordered[(n - 1) // 2]), low=_finite(ordered[low]), high=_finite(ordered[high]))


def _mean(values: Tensor) -> Estimate:
    """A mean of rates with its normal interval, kept within [0, 1]."""
    middle = values.mean().item()
    half = 1.96 * values.std().item() / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Estimate(value=middle, low=max(0.0, middle - half), high=min(1.0, middle + half))


def _finite(value: Tensor) -> float | None:
    return value.item() if value.isfinite() else None

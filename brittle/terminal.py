"""What the terminal shows of an audit: the headline figures, and why one input flips. Plain text, no colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from brittle.errors import UsageError
from brittle.findings import Findings
from brittle.report.formatting import fixed, norm_name, number, percent, signed
from brittle.report.view.flips import ExampleView, FlipView, flips_of
from brittle.report.view.headline import headline_of
from brittle.report.view.holes import counted
from brittle.runs import RunFolder

if TYPE_CHECKING:
    from brittle.pipeline.attacking import Attacked
    from brittle.pipeline.charting import Charted

TOP = 5
"""Training examples named on either side of a ledger."""


def headline(findings: Findings, report: Path | str) -> str:
    """The headline figures in aligned rows, the agreement's sentence, and the report's path."""
    first = headline_of(findings)
    rows = [("subject", f"{first.name}, {first.path}")]
    for card in first.cards:
        amounts = ", ".join(" ".join(filter(None, (a.label, a.value, a.interval))) for a in card.amounts)
        rows.append((card.title.lower(), f"{amounts}  {card.note}" + (f" ({card.verdict})" if card.verdict else "")))
    rows += [
        ("holes", counted(findings.holes)),
        ("agreement", findings.agreement.sentence),
        ("warnings", number(len(findings.warnings))),
        ("report", str(report)),
    ]
    return _aligned(rows)


def charted(found: Charted, run: Path | str) -> str:
    """How far a map has come, and what goes on from there, in one line."""
    if found.missing:
        return (
            f"{run}: {found.units - found.missing} of {found.units} units are finished; run the other shards, then the "
            "same command without --shard"
        )
    parts = [f"{run}: {found.queries} queries over {found.examples} training examples are mapped"]
    if found.ledger is not None:
        parts.append(f"their account misses {percent(found.ledger.relative_residual)} of what was learned")
    if found.fidelity is not None:
        parts.append(f"shift cosine {fixed(found.fidelity.shift_cosine, 3)}")
    if found.holes is not None:
        parts.append(f"{found.holes} holes")
    return ", ".join(parts) + "; `brittle audit` goes on from here"


def attacked(found: Attacked, run: Path | str) -> str:
    """What attacks found, norm by norm, and whether they can be believed."""
    lines = []
    for norm in found.norms():
        far, held = found.nearest(norm)
        near = "never" if far.value is None else fixed(far.value, 4)
        share = "" if held is None or held.value is None else f", {percent(held.value)} hold within {found.epsilon:g}"
        lines.append(f"{norm_name(norm)}: {found.inputs} inputs fail at a median distance of {near}{share}")
    lines += [
        f"  {c.verdict:<5} {norm_name(c.norm)} {c.name}: {c.sentence}" for c in found.health if c.verdict != "pass"
    ]
    if found.wrong_when_clean:
        lines.append(f"{found.wrong_when_clean} inputs are wrong before any attack and were left out")
    return "\n".join([*lines, f"health: {found.verdict}; every attack's rows are in {Path(run) / 'failures.csv'}"])


def explanation(run: RunFolder, query: int) -> str:
    """Why `query`, a position in the test data, flips: the training examples that leave and arrive.

    Where it is not among the explained flips, its ledger: the examples that hold its prediction up, and those
    that speak against it. Raises `UsageError` where the audit did not look at this query.
    """
    findings = run.findings()
    views = zip(findings.prediction.flips, flips_of(findings), strict=True)
    flips = [_flip(query, view) for flip, view in views if flip.query == query]
    return "\n\n".join(flips) or _account(query, ledger_row(run, query), run.load_document("train"))


def ledger_row(run: RunFolder, query: int) -> Tensor:
    """The contributions of the training examples to one query's output, (N,) in logits.

    Read from the stage `ledger`: `ids` (M,) are the queries' positions, `contributions` has shape (M, N).
    """
    ledger = run.load("ledger") if run.has("ledger") else {}
    known = [flip.query for flip in run.findings().prediction.flips] + ledger.get("ids", Tensor()).long().tolist()
    if query not in ledger.get("ids", Tensor()):
        shown = ", ".join(map(str, sorted(set(known))[:8])) or "none"
        raise UsageError(f"--query must be a query of this audit, found {query}; explained are {shown}, ...")
    return ledger["contributions"][ledger["ids"].tolist().index(query)]


def _flip(query: int, flip: FlipView) -> str:
    return "\n".join(
        [
            f"query {query}, a {flip.true_class}",
            f"{flip.before_class} becomes {flip.after_class} by {flip.how}, {flip.size}",
            f"margin {flip.margin_before} becomes {flip.margin_after} logits; contributions of the {flip.account}",
            *_table("leaving", flip.leaving),
            *_table("arriving", flip.arriving),
        ]
    )


def _table(title: str, examples: Sequence[ExampleView]) -> list[str]:
    rows = [(e.name, e.class_name, e.before, e.after, e.change) for e in examples]
    return ["", _aligned([(title, "class", "before", "after", "change"), *rows])]


def _account(query: int, contributions: Tensor, train: Mapping[str, Sequence[str]]) -> str:
    """The largest contributions on either side. train: names and classes of the training examples."""
    best = contributions.topk(min(TOP, len(contributions)))
    worst = contributions.topk(min(TOP, len(contributions)), largest=False)
    lines = [f"query {query} is none of the worst flips; this is its ledger, in logits towards the predicted class"]
    for title, side in (("supporters", best), ("rival examples", worst)):
        rows = [
            (train["names"][i], train["classes"][i], signed(v))
            for i, v in zip(side.indices.tolist(), side.values.tolist(), strict=True)
        ]
        lines += ["", _aligned([(title, "class", "contribution"), *rows])]
    return "\n".join(lines)


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)

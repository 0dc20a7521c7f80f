"""Does the account close? The rows of the ledger, and the group memory against a finer account.

start + examples + decay + buffers + unexplained + residual = output
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from brittle.findings import Fidelity, Findings, MemoryFidelity, Verdict
from brittle.report.charts import Points, Waterfall
from brittle.report.curves import read, thin
from brittle.report.formatting import fixed, number, percent, signed

MEANINGS = {
    "start": "output before the first step",
    "examples": "sum of all training examples' contributions",
    "decay": "what weight decay took away",
    "buffers": "change of BatchNorm's running statistics",
    "unexplained": "displacement that the recorded gradients do not account for",
    "residual": "what quadrature missed",
}
MOST_POINTS = 400


@dataclass(frozen=True)
class RowView:
    name: str
    meaning: str
    mean: str
    mean_absolute: str


@dataclass(frozen=True)
class Account:
    """The section `Does the account close`; `missing` says why there is no ledger."""

    verdict: Verdict
    facts: tuple[tuple[str, str], ...]
    rows: tuple[RowView, ...]
    waterfall: Waterfall | None
    closing: Points | None
    memory: tuple[tuple[str, str], ...]
    missing: str


def account_of(findings: Findings, arrays: Mapping[str, Tensor]) -> Account:
    """The ledger's rows and the two fidelities."""
    fidelity = findings.fidelity
    rows = tuple(
        RowView(row.name, MEANINGS.get(row.name, ""), signed(row.mean), fixed(row.mean_absolute, 3))
        for row in fidelity.rows
    )
    return Account(
        verdict=fidelity.verdict,
        facts=_facts(fidelity),
        rows=rows,
        waterfall=_waterfall(fidelity),
        closing=_closing(arrays),
        memory=_memory(fidelity.memory) if fidelity.memory else (),
        missing="" if rows else "There is no ledger: the path is not known well enough to sum it up.",
    )


def _facts(fidelity: Fidelity) -> tuple[tuple[str, str], ...]:
    facts = []
    if fidelity.relative_residual is not None:
        facts.append(("Relative residual", percent(fidelity.relative_residual, 2)))
    if fidelity.cancellation is not None:
        facts.append(("Cancellation, median", f"{number(fidelity.cancellation)} ×"))
    return tuple(facts)


def _waterfall(fidelity: Fidelity) -> Waterfall | None:
    if not fidelity.rows:
        return None
    total = sum(row.mean for row in fidelity.rows)
    return Waterfall(
        tuple(row.name for row in fidelity.rows),
        tuple(row.mean for row in fidelity.rows),
        "output",
        x_label="mean over the queries, logits",
        alt=f"The ledger's mean rows add up to a mean output of {fixed(total)} logits",
    )


def _closing(arrays: Mapping[str, Tensor]) -> Points | None:
    """Every row but the residual, summed, against the true output: a ledger that closes lies on the diagonal."""
    rows, output = read(arrays, "ledger.rows"), read(arrays, "ledger.output")  # shape: (6, M), (M,)
    if rows is None or output is None or not len(output):
        return None
    kept = thin(len(output), MOST_POINTS)
    return Points(
        tuple(output[kept].tolist()),
        tuple(rows[:-1].sum(0)[kept].tolist()),
        x_label="true output, logits",
        y_label="account without residual, logits",
        alt="The account without its residual against the true output, one point a query",
        diagonal=True,
    )


def _memory(memory: MemoryFidelity) -> tuple[tuple[str, str], ...]:
    return (
        ("Shift cosine, median", fixed(memory.shift_cosine, 3)),
        ("Shift cosine, 5th percentile", fixed(memory.shift_cosine_p5, 3)),
        ("Shift residual", percent(memory.shift_residual)),
        ("Class cosine", fixed(memory.class_cosine, 4)),
        ("Relative residual", percent(memory.relative_residual, 2)),
        ("Segments", number(memory.segments)),
        ("Gradient passes an input", number(memory.nodes)),
        ("Probes compared", number(memory.sample)),
        *_tolerance(memory),
    )


def _tolerance(memory: MemoryFidelity) -> Iterator[tuple[str, str]]:
    """What was asked of the memory, and what half precision costs it."""
    if memory.tolerance is not None:
        yield "Error of shifts asked for", f"{percent(memory.tolerance)}, {'met' if memory.met else 'not met'}"
    if memory.rounding is not None:
        yield "Error of half precision", percent(memory.rounding, 2)

"""The first sections: what was audited, how well its account closes, how accurate it is, what to beware of."""

from __future__ import annotations

from brittle.agreement import wilson
from brittle.assemble.evidence import Evidence
from brittle.findings import SPOKEN_OF, ClassAccuracy, Clean, Fidelity, LedgerRow, SubjectFacts
from brittle.path.checkpoints import Checkpoints
from brittle.records import Ledger

CLOSES, FAITHFUL = 0.05, 0.9
"""Relative residual, and unexplained row, up to which an account closes; shift cosine from which memory is faithful."""


def subject_facts(e: Evidence) -> SubjectFacts:
    """What was audited."""
    s = e.subject
    return SubjectFacts(
        name=s.name,
        spec=e.spec,
        class_names=list(s.class_names),
        parameters=sum(p.numel() for p in s.model.parameters()),
        input_shape=list(s.train.inputs.shape[1:]),
        bounds=list(s.range),
        train=len(s.train),
        test=len(s.test),
        pool=len(s.pool) if s.pool is not None else 0,
        optimizer=e.path.optimizer_name if e.path else None,
        steps=e.path.steps if e.path and not coarse(e) else None,
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
    closes = max(ledger.relative_residual, ledger.relative_unexplained) <= CLOSES
    faithful = e.memory_fidelity is not None and e.memory_fidelity.shift_cosine >= FAITHFUL
    return Fidelity(
        path="checkpoints" if coarse(e) else "recorded",
        verdict="inconclusive" if coarse(e) else "pass" if closes and faithful else "fail",
        statement=_few_are_known(e, ledger) if coarse(e) else _all_are_known(ledger),
        relative_unexplained=ledger.relative_unexplained,
        relative_residual=ledger.relative_residual,
        cancellation=ledger.cancellation.median().item(),
        rows=[
            LedgerRow(name=name, mean=row.mean().item(), mean_absolute=row.abs().mean().item())
            for name, row in ((name, ledger.row(name)[: e.first]) for name in ledger.ROWS)
        ],
        memory=e.memory_fidelity,
    )


def coarse(e: Evidence) -> bool:
    """Whether checkpoints are all that is known of the path."""
    return isinstance(e.path, Checkpoints)


def _all_are_known(ledger: Ledger) -> str:
    missing = ledger.relative_unexplained
    apart = f" A further {missing:.1%} is unexplained: no recorded gradient accounts for it."
    if missing < SPOKEN_OF:
        apart = ""
    return (
        "Every step of the training is known. Each prediction is accounted for, example by example, up to "
        f"{ledger.relative_residual:.2%} of what was learned.{apart} Contributions say how training examples moved a "
        "prediction in this training; they do not say what would have happened without them."
    )


def _few_are_known(e: Evidence, ledger: Ledger) -> str:
    assert e.path is not None
    return (
        f"Only {e.path.steps + 1} checkpoints of the training are known. Which examples moved a prediction between "
        "them is guessed from gradients at the checkpoints: it may be claimed which groups of examples matter, not by "
        f"how much, and not for single examples. {ledger.relative_unexplained:.0%} of what was learned is "
        f"unexplained, and the sum over the path missed {ledger.relative_residual:.1%}."
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
    for check in e.health:
        if check.verdict == "fail":
            found.append(f"Attacks in {check.norm} cannot be believed: {check.sentence}.")
    if e.precision != "float32":
        found.append(
            f"The ledger's products were made in {e.precision} (sums in float32): single contributions are rounded, "
            "shifts and masses are not."
        )
    found += e.path.warnings if e.path else []
    if e.path is None:
        found.append("No path was recorded: mass and shift are those of one more training step at the final weights.")
    return found

"""The first sections: what was audited, how well its account closes, how accurate it is, what to beware of."""

from __future__ import annotations

from brittle.agreement import wilson
from brittle.assemble.evidence import Evidence
from brittle.findings import ClassAccuracy, Clean, Fidelity, LedgerRow, SubjectFacts

CLOSES, FAITHFUL = 0.05, 0.9
"""Relative residual up to which an account closes, and shift cosine from which the memory is faithful."""


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

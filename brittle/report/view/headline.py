"""The first lines: what was audited, what may be claimed, and six figures with their verdicts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from brittle.findings import SPOKEN_OF, AttackResult, Estimate, Findings, Verdict
from brittle.report.formatting import NONE, Amount, amount, fixed, norm_name, number, percent, with_unit
from brittle.report.view.holes import counted

FAITHFUL_SHIFT_COSINE = 0.95
"""From this median cosine to a finer account on, the shift map is called faithful."""

PATHS = {
    "recorded": "recorded path",
    "checkpoints": "checkpoints only",
    "weights": "final weights only",
}


@dataclass(frozen=True)
class Card:
    """A headline figure. `verdict` is None where the figure is a measurement and no bar is set."""

    title: str
    amounts: tuple[Amount, ...]
    note: str
    rule: str
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Headline:
    """Name, facts, statement, cards."""

    name: str
    path: str
    statement: str
    facts: tuple[tuple[str, str], ...]
    cards: tuple[Card, ...]


def headline_of(findings: Findings) -> Headline:
    """The first lines of the page."""
    return Headline(
        name=findings.subject.name,
        path=PATHS[findings.fidelity.path],
        statement=findings.fidelity.statement,
        facts=_facts(findings),
        cards=(
            _accuracy(findings),
            _account(findings),
            _map(findings),
            _distance(findings),
            _predicted(findings),
            _baselines(findings),
        ),
    )


def _facts(findings: Findings) -> tuple[tuple[str, str], ...]:
    s = findings.subject
    facts = [
        ("Subject", s.spec or s.name),
        ("Parameters", number(s.parameters)),
        ("Classes", number(len(s.class_names))),
        ("Input", f"{' × '.join(map(str, s.input_shape))}, from {' to '.join(map(number, s.bounds))}"),
        ("Training examples", number(s.train)),
        ("Test inputs", number(s.test)),
        ("Pool", number(s.pool)),
        ("Queries", number(findings.prediction.queries)),
        ("Holes", counted(findings.holes)),
    ]
    if s.optimizer:
        facts.append(("Optimizer", s.optimizer))
    if s.steps is not None:
        facts.append(("Steps", number(s.steps)))
    return tuple(facts)


def _accuracy(findings: Findings) -> Card:
    clean = findings.clean
    return Card(
        "Clean accuracy",
        (amount(clean.accuracy, "share"),),
        f"on {number(clean.inputs)} test inputs as they are",
        "A measurement: no bar is set.",
    )


def _account(findings: Findings) -> Card:
    fidelity = findings.fidelity
    title, residual, unexplained = (
        "The account closes",
        fidelity.relative_residual,
        fidelity.relative_unexplained or 0.0,
    )
    rule = "Relative residual: mean absolute residual over the queries / mean absolute learned change."
    if residual is None:
        note = f"no account is claimed: {PATHS[fidelity.path]}"
        return Card(title, (Amount(NONE),), note, rule, fidelity.verdict)
    if unexplained > residual and fidelity.verdict != "pass":
        note = f"of what was learned is unexplained; the sum over the path missed {percent(residual, 2)}"
        return Card(title, (Amount(percent(unexplained, 0)),), note, rule, fidelity.verdict)
    note = "of what was learned is missed by the sum over the training path"
    if unexplained >= SPOKEN_OF:
        note += f"; a further {percent(unexplained, 1)} is unexplained"
    return Card(title, (Amount(percent(residual, 2)),), note, rule, fidelity.verdict)


def _map(findings: Findings) -> Card:
    memory = findings.fidelity.memory
    title, rule = "The map is faithful", f"Passes from a median shift cosine of {FAITHFUL_SHIFT_COSINE} on."
    if memory is None:
        note = "the map was not compared with a finer account"
        return Card(title, (Amount(NONE),), note, rule, "inconclusive")
    verdict: Verdict = "pass" if memory.shift_cosine >= FAITHFUL_SHIFT_COSINE else "fail"
    note = f"shift cosine to a finer account; 5th percentile {fixed(memory.shift_cosine_p5, 3)}"
    if findings.fidelity.path != "recorded":
        verdict, note = (
            "inconclusive",
            f"{note}. That account knows as little of the path: {PATHS[findings.fidelity.path]}",
        )
    return Card(title, (Amount(fixed(memory.shift_cosine, 3)),), note, rule, verdict)


def _distance(findings: Findings) -> Card:
    envelopes = [result for result in findings.attacks.results if result.kind == "envelope"]
    failed = dict.fromkeys(check.name for check in findings.attacks.health if check.verdict == "fail")
    note = "smallest change that flips the prediction, over all attacks" if envelopes else "no attack was run"
    return Card(
        "Median adversarial distance",
        tuple(_median(result) for result in envelopes) or (Amount(NONE),),
        f"{note}; not to be believed, checks failed: {', '.join(failed)}" if failed else note,
        "A measurement: no bar is set. An input that no attack fooled counts as infinitely far.",
        "inconclusive" if failed else None,
    )


def _median(result: AttackResult) -> Amount:
    return replace(distance(result), label=norm_name(result.norm))


def distance(result: AttackResult) -> Amount:
    """The median distance; infinite where more than half withstood."""
    if result.median_distance.value is None and (result.success.value or 0) < 0.5:
        return Amount("∞")
    return amount(result.median_distance)


def _predicted(findings: Findings) -> Card:
    title, rule = "Predicted to fail", "Share of queries whose margin the shift map predicts gone; no bar is set."
    if not findings.prediction.families:
        return Card(title, (Amount(NONE),), "no probe family was mapped", rule)
    worst = max(findings.prediction.families, key=lambda family: family.predicted_failing)
    note = f"under {worst.name}, the worst family, at {with_unit(worst.unit, worst.reference)}"
    observed = observed_share(findings, worst.name)
    if observed.value is not None:
        note += f"; observed on held-out inputs: {percent(observed.value)}"
    return Card(title, (Amount(percent(worst.predicted_failing)),), note, rule)


def observed_share(findings: Findings, family: str) -> Estimate:
    """Share of held-out inputs that failed under a probe family; empty where it was not tested."""
    found = [t.prevalence for t in findings.agreement.targets if t.kind == "probe" and t.name == family]
    return Estimate(value=found[0] if found else None, low=None, high=None)


def _baselines(findings: Findings) -> Card:
    targets = findings.agreement.targets
    beaten = sum(target.verdict == "pass" for target in targets)
    return Card(
        "Beats the baselines",
        (Amount(f"{beaten} of {len(targets)}" if targets else NONE),),
        "kinds of failure ranked better than by the best baseline" if targets else "nothing was compared",
        "A kind passes where the 95% interval of the gain in AUROC over the best baseline lies above 0.",
        findings.agreement.verdict,
    )

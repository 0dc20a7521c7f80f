"""The audit: the stages in order, as code. Read this second, after `records`.

    memory     what each group of training examples displaced along the path, and how faithful that is
    shift      mass and margin at every query and at its small probes
    probes     what the model really says under every probe
    holes      predicted failure regions, from the first queries alone
    predictions  scores, baselines, rates and holes: all that is said of the sealed queries, without their labels
    opening    the labels of the sealed queries, once
    attacks    the nearest failure of each sealed query
    severities where each sealed image first fails under perturbations that people meet
    ledger     the account of the first queries, in units of work, and of the worst flips before and after
    agreement  predicted against observed, on sealed queries
    suggest    which examples to add, checked by retraining
    report     findings.json, failures.csv, holes.json, report.html

Each stage's result is kept in the run folder; the same command resumes after the last whole one. `make_map` makes the
stages up to holes, and the ledger of the first queries: alone, as one of several processes, or as one job of an array.
`attack` attacks alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from brittle.assemble import Evidence, hole_findings, write_run
from brittle.findings import Findings
from brittle.kernel.precision import Precision
from brittle.kernel.units import BUDGET
from brittle.pipeline.accounting import whole_account
from brittle.pipeline.attacking import Attacked, Wish
from brittle.pipeline.attacking import attack as run_attacks
from brittle.pipeline.charting import Charted, chart
from brittle.pipeline.context import PRESETS, Asked, Context, begin
from brittle.pipeline.judging import agreement, suggestions
from brittle.pipeline.mapping import holes, memory, memory_fidelity, shift
from brittle.pipeline.observing import attacks, flips, health, probes, severities
from brittle.pipeline.opening import unseal
from brittle.pipeline.scoring import predictions
from brittle.records import Norm
from brittle.shares import Share
from brittle.subject import Subject

__all__ = ["PRESETS", "attack", "audit", "make_map"]


def audit(
    subject: Subject,
    out: Path | str,
    *,
    queries: int = 200,
    seed: int = 0,
    device: str = "cpu",
    preset: str = "quick",
    spec: str | None = None,
    options: Mapping[str, str] | None = None,
    progress: bool = True,
    memory_budget: int = BUDGET,
    deterministic: bool = False,
    tolerance: float | None = None,
    precision: Precision = "float32",
) -> Findings:
    """Audit a classifier and write the run folder `out`; the same call resumes an interrupted one.

    Args:
        queries: test inputs that make the prediction; as many sealed ones test it.
        seed: of every random choice.
        device: where gradients are computed.
        preset: quick, standard or thorough.
        spec, options: how the subject was made, noted in settings.json.
        progress: draw progress bars.
        memory_budget: bytes for the queries that are accounted for at once.
        deterministic: the same bits every time, in one thread.
        tolerance: relative error that a shift in the map may have; the preset's by default.
        precision: float32, tf32 or bfloat16, of the ledger's products (`brittle.kernel.precision`).

    Returns:
        The findings, as in findings.json.

    Raises:
        BrittleError: one of its kinds, with the rule, the value found and the remedy.
    """
    asked = Asked(
        queries,
        seed,
        device,
        preset,
        spec,
        options or {},
        progress,
        memory_budget,
        deterministic,
        tolerance,
        precision,
    )
    with begin(subject, out, asked) as c:
        return _run(c, spec)


def make_map(
    subject: Subject,
    out: Path | str,
    *,
    share: Share = Share(),  # noqa: B008  (it is frozen)
    queries: int = 200,
    seed: int = 0,
    device: str = "cpu",
    preset: str = "quick",
    spec: str | None = None,
    options: Mapping[str, str] | None = None,
    progress: bool = True,
    memory_budget: int = BUDGET,
    deterministic: bool = False,
    tolerance: float | None = None,
    precision: Precision = "float32",
) -> Charted:
    """Make the map alone: memory, shift, holes, and the account of the predicting queries; `audit` goes on from there.

    Arguments and errors are those of `audit`. share: of the work, where several processes make the map together.
    """
    asked = Asked(
        queries,
        seed,
        device,
        preset,
        spec,
        options or {},
        progress,
        memory_budget,
        deterministic,
        tolerance,
        precision,
    )
    with begin(subject, out, asked, share) as c:
        return chart(c)


def attack(
    subject: Subject,
    out: Path | str,
    *,
    norms: Sequence[Norm] | None = None,
    epsilon: float | None = None,
    attacks: Sequence[str] | None = None,
    cap: int | None = None,
    queries: int = 200,
    seed: int = 0,
    device: str = "cpu",
    preset: str = "quick",
    spec: str | None = None,
    options: Mapping[str, str] | None = None,
    progress: bool = True,
    memory_budget: int = BUDGET,
    deterministic: bool = False,
    tolerance: float | None = None,
    precision: Precision = "float32",
) -> Attacked:
    """Attack the sealed queries alone; without norms, epsilon, attacks and cap as `audit` does, which goes on from it.

    Args:
        norms: l0, l1, l2, linf; the audit's where left out.
        epsilon: budget of the attacks within a distance.
        attacks: names, as in `brittle.attacks.plan.SUITE`; those of the preset where left out.
        cap: evaluations that one attack may spend on an input.

    The other arguments and errors are those of `audit`.
    """
    asked = Asked(
        queries,
        seed,
        device,
        preset,
        spec,
        options or {},
        progress,
        memory_budget,
        deterministic,
        tolerance,
        precision,
    )
    wish = Wish(tuple(norms) if norms else None, epsilon, tuple(attacks) if attacks else None, cap)
    with begin(subject, out, asked) as c:
        return run_attacks(c, wish)


def _run(c: Context, spec: str | None) -> Findings:
    """The stages, each from what the earlier ones found."""
    built = memory(c)
    faithful = memory_fidelity(c, built)
    moved = shift(c, built)
    observed = probes(c)
    predicted = predictions(c, built, moved, observed, holes(c, moved, observed))
    c, sealed = unseal(c, predicted)
    regions = predicted.holes
    attacked = attacks(c, built)
    believed = health(c, attacked)
    perturbed = severities(c)
    flipped = flips(c, observed, attacked)
    accounted = whole_account(c, flipped)
    contests, agreed = agreement(c, predicted, sealed, observed, attacked)
    evidence = Evidence(
        subject=c.subject,
        spec=spec,
        precision=c.precision,
        path=c.path,
        split=c.split,
        families=c.families,
        groups=c.groups,
        memory_fidelity=faithful,
        shift=moved,
        observed=observed,
        holes=regions,
        natural_holes=predicted.natural_holes,
        attacked=attacked,
        health=believed,
        perturbed=perturbed,
        flips=flipped,
        account=accounted,
        contests=contests,
        agreement=agreed,
    )
    tested = hole_findings(evidence, c.stages.generator("holes/test"))
    missing = suggestions(c, tested, regions, failures=sum(hole.test.failures for hole in tested if hole.test))
    return write_run(evidence, tested, missing, c.stages.run, c.stages.cost(c.device))

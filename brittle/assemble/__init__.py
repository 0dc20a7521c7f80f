"""From what the stages found to findings, and to the documents of the run folder."""

from __future__ import annotations

from brittle.assemble.attacked import attacks, norms_of, severity_rows
from brittle.assemble.evidence import Evidence
from brittle.assemble.facts import clean, fidelity, subject_facts, warnings
from brittle.assemble.prediction import prediction
from brittle.assemble.regions import failure_rate, hole_families, hole_findings, holes_of_queries
from brittle.attacks.envelope import envelope
from brittle.exhibits import figure_arrays, pictures, training_index
from brittle.findings import Cost, Findings, Hole, Suggestions
from brittle.holes import leak_of
from brittle.outcomes import attack_rows, failure_rows
from brittle.report import render
from brittle.runs import RunFolder

__all__ = ["Evidence", "failure_rate", "hole_families", "hole_findings", "write_run"]


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
    held = [lies_in[e.first + int(r)] for r in right]
    attacked = attack_rows(e.subject, sealed[right], e.attacked, held)
    perturbed = severity_rows(e.subject, sealed[right], e.perturbed, held)
    arrays = figure_arrays(e.subject, e.shift, e.split.both, e.groups, e.contests, e.account, e.first)
    arrays |= {f"distance.{norm}": envelope(e.attacked, norm).distance for norm in norms_of(e.attacked)}
    shown = pictures(e.subject, findings, e.flips.after)
    run.add_failures([*probe_rows, *attacked, *perturbed])
    run.save_document("holes", [hole.model_dump() for hole in holes])
    run.save_document("train", training_index(e.subject))
    run.save("figures", arrays)
    run.save("pictures", shown)
    run.save_report(render(findings, arrays, shown))
    run.save_findings(findings)
    return findings

"""The audit: the stages in order, as code. Read this second, after `records`.

    memory     what each group of training examples displaced along the path, and how faithful that is
    shift      mass and margin at every query and at its small probes
    probes     what the model really says under every probe
    holes      predicted failure regions, from the first queries alone
    attacks    the nearest failure of each sealed query
    ledger     the account of the first queries, and of the worst flips before and after
    agreement  predicted against observed, on sealed queries
    suggest    which examples to add, checked by retraining
    report     findings.json, failures.csv, holes.json, report.html

Each stage's result is kept in the run folder; the same command resumes after the last whole one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from brittle.assemble import Evidence, hole_findings, write_run
from brittle.errors import UsageError
from brittle.findings import Findings
from brittle.outcomes import observe
from brittle.pipeline.context import PRESETS, RECORDS, Context, prepare
from brittle.pipeline.judging import agreement, suggestions
from brittle.pipeline.mapping import holes, memory, memory_fidelity, shift
from brittle.pipeline.observing import account, attacks, flips
from brittle.runs import RunFolder, open_run
from brittle.settings import fingerprints
from brittle.stages import Stages
from brittle.subject import Subject

__all__ = ["PRESETS", "audit"]


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
) -> Findings:
    """Audit a classifier and write the run folder `out`; the same call resumes an interrupted one.

    Args:
        queries: test inputs that make the prediction; as many sealed ones test it.
        seed: of every random choice.
        device: where gradients are computed.
        preset: quick, standard or thorough.
        spec, options: how the subject was made, noted in settings.json.
        progress: draw progress bars.

    Returns:
        The findings, as in findings.json.

    Raises:
        BrittleError: one of its kinds, with the rule, the value found and the remedy.
    """
    if preset not in PRESETS:
        raise UsageError(f"preset must be one of {', '.join(PRESETS)}, found {preset!r}")
    settings = {
        "spec": spec,
        "options": dict(options or {}),
        "queries": queries,
        "seed": seed,
        "device": device,
        "effort": {"preset": preset, **asdict(PRESETS[preset])},
        "path": str(subject.path) if subject.path else None,
        "fingerprints": fingerprints(subject),
    }
    with open_run(out, settings) as run:
        stages = Stages(run, RECORDS, seed, progress)
        return _run(prepare(subject, stages, queries, device, preset), run, spec)


def _run(c: Context, run: RunFolder, spec: str | None) -> Findings:
    """The stages, each from what the earlier ones found."""
    built = memory(c)
    faithful = memory_fidelity(c, built)
    moved = shift(c, built)
    observed = c.stages(
        "probes", "probing", lambda tick, _: observe(c.subject, c.split.both, c.families, c.draws, tick)
    )
    regions = holes(c, moved, observed)
    attacked = attacks(c, built)
    flipped = flips(c, observed, attacked)
    accounted = account(c, flipped)
    contests, agreed = agreement(c, built, moved, observed, attacked)
    evidence = Evidence(
        subject=c.subject,
        spec=spec,
        path=c.path,
        split=c.split,
        families=c.families,
        groups=c.groups,
        memory_fidelity=faithful,
        shift=moved,
        observed=observed,
        holes=regions,
        attacked=attacked,
        flips=flipped,
        account=accounted,
        contests=contests,
        agreement=agreed,
    )
    tested = hole_findings(evidence)
    missing = suggestions(c, tested, regions, failures=sum(hole.test.failures for hole in tested if hole.test))
    return write_run(evidence, tested, missing, run, c.stages.cost(c.device))

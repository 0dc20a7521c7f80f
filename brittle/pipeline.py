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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brittle import accounts
from brittle.agreement import calibrate, overall
from brittle.agreement.contests import Contest, attack_distances, natural_errors, probe_failures, settle
from brittle.assemble import Evidence, hole_families, hole_findings, write_run
from brittle.attacks import suite
from brittle.attacks.envelope import envelope
from brittle.errors import UsageError
from brittle.findings import Agreement, ExampleSuggestion, Findings, Hole, MemoryFidelity, RetrainCheck, Suggestions
from brittle.flips import Flips, worst_flips
from brittle.holes import Region, find_holes, leak_of
from brittle.kernel.memory import Memory, differentiable_mass, mass
from brittle.mass import class_groups, cluster_groups
from brittle.outcomes import Observed, observe
from brittle.path.store import PathReader
from brittle.probes import MAP_SHARES, Family, families_for
from brittle.records import AttackRows, Groups, Ledger, Norm, Pairs, ShiftMap
from brittle.runs import RunFolder, open_run
from brittle.scores import lack_of_support, late_path, late_path_at_reference, late_probabilities, severity_scores
from brittle.settings import fingerprints
from brittle.shift import draw_probes, probe_inputs, shift_map
from brittle.split import Split, split_test
from brittle.stages import Progress, Spend, Stages
from brittle.subject import Subject
from brittle.suggest import regions, retrain_check
from brittle.suggest.plan import plan, robustness

RECORDS = {
    record.__name__: record
    for record in (accounts.Account, AttackRows, Contest, Ledger, Memory, Observed, Pairs, ShiftMap)
}
NORMS: tuple[Norm, ...] = ("l2", "linf")


@dataclass(frozen=True)
class Effort:
    """How much work a preset does."""

    segments: int  # of the group memory
    nodes: int  # midpoints in each
    clusters: int  # groups of training examples in each class
    route: int  # segments of the memory that the hole-seeking attack differentiates
    retrainings: int  # seeds of the retraining check


PRESETS = {
    "quick": Effort(segments=40, nodes=2, clusters=3, route=4, retrainings=5),
    "standard": Effort(segments=80, nodes=2, clusters=3, route=8, retrainings=10),
    "thorough": Effort(segments=160, nodes=4, clusters=5, route=8, retrainings=20),
}


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
        return _run(_prepare(subject, stages, queries, device, preset), run, spec)


@dataclass(frozen=True)
class _Context:
    """What all stages of one audit share."""

    subject: Subject
    stages: Stages
    path: PathReader | None
    split: Split
    families: tuple[Family, ...]
    draws: Mapping[str, Tensor]  # of `split.both`, by family
    groups: Groups
    device: str
    preset: str

    @property
    def effort(self) -> Effort:
        return PRESETS[self.preset]

    def sealed_draws(self) -> dict[str, Tensor]:
        return {name: draw[len(self.split.predict) :] for name, draw in self.draws.items()}


def _prepare(subject: Subject, stages: Stages, queries: int, device: str, preset: str) -> _Context:
    """The cheap beginnings, made anew in a resumed audit."""
    path = accounts.open_path(subject)
    split = split_test(subject, queries, stages.generator("split"))
    families = families_for(subject, stages.generator("families"))
    draws = draw_probes(split.both, families, stages.generator("draws"))
    groups = cluster_groups(subject, PRESETS[preset].clusters)
    return _Context(subject, stages, path, split, families, draws, groups, device, preset)


def _run(c: _Context, run: RunFolder, spec: str | None) -> Findings:
    """The stages, each from what the earlier ones found."""
    memory = _memory(c)
    fidelity = _memory_fidelity(c, memory)
    shift = _shift(c, memory)
    observed = c.stages(
        "probes", "probing", lambda tick, _: observe(c.subject, c.split.both, c.families, c.draws, tick)
    )
    holes = _holes(c, shift, observed)
    attacked = _attacks(c, memory)
    flips = _flips(c, observed, attacked)
    account = _account(c, flips)
    contests, agreement = _agreement(c, memory, shift, observed, attacked)
    evidence = Evidence(
        c.subject,
        spec,
        c.path,
        c.split,
        c.families,
        c.groups,
        fidelity,
        shift,
        observed,
        holes,
        attacked,
        flips,
        account,
        contests,
        agreement,
    )
    found = hole_findings(evidence)
    suggestions = _suggestions(c, found, holes, sum(h.test.failures for h in found if h.test))
    return write_run(evidence, found, suggestions, run, c.stages.cost(c.device))


def _memory(c: _Context) -> Memory:
    e = c.effort
    return c.stages(
        "memory",
        "building the group memory",
        lambda tick, _: accounts.build_memory(c.subject, c.path, c.groups, e.segments, e.nodes, c.device, tick),
    )


def _memory_fidelity(c: _Context, memory: Memory) -> MemoryFidelity | None:
    path = c.path
    if path is None:
        return None
    generator = c.stages.generator("fidelity")
    found = c.stages(
        "memory/fidelity",
        "checking the memory against a finer account",
        lambda tick, _: accounts.memory_fidelity(
            c.subject, path, memory, c.groups, c.split.both, c.families, c.draws, generator, c.device, tick
        ).model_dump(),
    )
    return MemoryFidelity.model_validate(found)


def _shift(c: _Context, memory: Memory) -> ShiftMap:
    queries = c.split.both

    def compute(tick: Progress, spend: Spend) -> ShiftMap:
        def mass_of(inputs: Tensor, pairs: Pairs) -> Tensor:
            spend(len(inputs) * memory.evaluations)
            return mass(memory, c.subject, inputs, pairs, c.device, tick)[:, : len(c.groups)]

        return shift_map(c.subject, queries, c.families, c.draws, mass_of)

    return c.stages("shift", "mapping the shift", compute)


def _holes(c: _Context, shift: ShiftMap, observed: Observed) -> list[Region]:
    """Holes from the predicting queries alone: their shift, their labels and their outcomes."""
    predict = c.split.predict
    families = hole_families(c.families)
    leak = leak_of(shift[: len(predict)], c.groups)
    failed = observed[: len(predict)].failed(predict.targets)[predict.right][:, families]
    share = leak.share[predict.right][:, families]
    rate = calibrate(-share.flatten().log(), failed.flatten())
    return find_holes(leak, families, lambda shares: rate(-shares.log()))


def _attacks(c: _Context, memory: Memory) -> list[AttackRows]:
    sealed = c.split.sealed
    right = sealed[sealed.right]
    by_class = class_groups(c.subject)
    route = memory.by_class(c.groups, c.subject.classes).merged(c.effort.route)
    generator = c.stages.generator("attacks")

    def compute(tick: Progress, spend: Spend) -> list[AttackRows]:
        rows = suite.run(
            c.subject,
            right,
            mass=differentiable_mass(route, c.subject, c.device),
            mass_evaluations=route.evaluations,
            groups=by_class,
            generator=generator,
            preset=c.preset,
            norms=NORMS,
            progress=tick,
        )
        spend(sum(int(r.evaluations.sum()) for r in rows))
        return rows

    return c.stages("attacks", "attacking", compute)


def _flips(c: _Context, observed: Observed, attacked: list[AttackRows]) -> Flips:
    sealed = c.split.sealed
    envelopes = [envelope(attacked, norm) for norm in NORMS]
    return worst_flips(
        sealed,
        sealed.right.nonzero()[:, 0],
        envelopes,
        observed[len(c.split.predict) :],
        c.families,
        c.sealed_draws(),
    )


def _account(c: _Context, flips: Flips) -> accounts.Account:
    """One sweep: the predicting queries, then every flip before and after."""
    predict = c.split.predict
    ids = torch.cat([predict.ids, *[c.split.sealed.ids[flips.rows]] * 2])
    inputs = torch.cat([predict.inputs, flips.before, flips.after])
    pairs = Pairs.join(predict.pairs, flips.pairs, flips.pairs)

    def compute(tick: Progress, spend: Spend) -> accounts.Account:
        found = accounts.account(c.subject, c.path, ids, inputs, pairs, c.device, tick)
        spend(found.evaluations)
        return found

    return c.stages("ledger", "balancing the ledger", compute)


def _agreement(
    c: _Context, memory: Memory, shift: ShiftMap, observed: Observed, attacked: list[AttackRows]
) -> tuple[list[Contest], Agreement]:
    """Predicted against observed on sealed queries; kinds of failure are never pooled."""
    sealed, first = c.split.sealed, len(c.split.predict)
    right, ours = sealed.right, shift[first:]
    support = lack_of_support(ours.mass, c.groups, c.subject.classes)
    severity = observed[first:].severity(sealed.targets)
    envelopes = [envelope(attacked, norm) for norm in NORMS]
    generator = c.stages.generator("agreement")

    def compute(tick: Progress, spend: Spend) -> dict[str, Any]:
        probe_scores = {name: score[right] for name, score in _probe_scores(c, ours, support).items()}
        held = [
            natural_errors(c.subject, c.split.natural, _natural_scores(c, memory, tick, spend)),
            *probe_failures(c.subject, sealed[right], c.families, ours[right], probe_scores, severity[right]),
            *attack_distances(c.subject, sealed[right], envelopes, ours[right], support[right]),
        ]
        settled = []
        for contest in held:
            settled.append(settle(contest, generator))
            tick(len(settled), len(held))
        return {"contests": held, "agreement": overall(settled, len(c.split.natural)).model_dump()}

    found = c.stages("agreement", "comparing predictions with outcomes", compute)
    return found["contests"], Agreement.model_validate(found["agreement"])


def _natural_scores(c: _Context, memory: Memory, tick: Progress, spend: Spend) -> dict[str, Tensor]:
    """Our scores of natural errors, the named one first."""
    queries = c.split.natural
    masses = mass(memory, c.subject, queries.inputs, queries.pairs, c.device, tick)[:, : len(c.groups)]
    spend(len(queries) * memory.evaluations)
    support = {"lack of support": lack_of_support(masses, c.groups, c.subject.classes)}
    if c.path is None:
        return support
    late = late_probabilities(c.path, c.subject, queries.inputs, c.device)
    return {"late path": late_path(late, queries.pairs)} | support


def _probe_scores(c: _Context, shift: ShiftMap, support: Tensor) -> dict[str, Tensor]:
    """Our scores of failure under each family, each (M, F), the named one first."""
    severity = torch.stack(list(severity_scores(shift).values()), dim=1)
    scores = {"predicted severity": severity, "lack of support": support[:, None].expand_as(severity)}
    if c.path is None:
        return scores
    sealed, draws, path, share = c.split.sealed, c.sealed_draws(), c.path, MAP_SHARES[-1]
    late = lambda inputs: late_path(late_probabilities(path, c.subject, inputs, c.device), sealed.pairs)  # noqa: E731
    clean = late(sealed.inputs)
    probes = [probe_inputs(sealed.inputs, family, draws[family.name], (share,))[:, 0] for family in c.families]
    carried = torch.stack([late_path_at_reference(clean, late(probe), share) for probe in probes], dim=1)
    return {"late path at the reference": carried} | scores


def _suggestions(c: _Context, holes: list[Hole], regions_of: list[Region], failures: int) -> Suggestions:
    """Regions that lack data, examples of the pool that would fill them, and what retraining says of it."""
    lacking = regions(holes, c.families, failures)
    if c.subject.pool is None:
        return Suggestions(regions=lacking, examples=[], note="No pool was given, so no examples are suggested.")
    generator = c.stages.generator("suggest")
    chosen = c.stages(
        "suggest",
        "choosing examples",
        lambda tick, _: [s.model_dump() for s in plan(c.subject, c.split.predict, regions_of, generator, c.device)],
    )
    examples = [ExampleSuggestion.model_validate(s) for s in chosen]
    if c.subject.retrain is None:
        note = "The subject cannot be retrained (no `retrain`), so these suggestions are not checked."
        return Suggestions(regions=lacking, examples=examples, note=note)
    ids = torch.tensor([e.pool_id for e in examples])
    score = robustness(c.subject, c.split.sealed, c.families, c.sealed_draws())
    check = c.stages(
        "suggest/check",
        "retraining with suggested and with random examples",
        lambda tick, _: retrain_check(
            c.subject, ids, seeds=c.effort.retrainings, score=score, generator=generator, progress=tick
        ).model_dump(),
    )
    return Suggestions(regions=lacking, examples=examples, check=RetrainCheck.model_validate(check))

"""What all stages of one audit share: the subject, its path, the split, the families and their draws, the groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path as FilePath
from typing import Any

from torch import Tensor

from brittle import accounts
from brittle.agreement.contests import Contest, Predicted, Rates
from brittle.agreement.increment import Together
from brittle.attacks.perturbations import Severities
from brittle.deterministic import deterministic
from brittle.errors import UsageError
from brittle.holes import Region
from brittle.kernel.halved import Halved
from brittle.kernel.memory import Memory
from brittle.kernel.precision import Precision, asked_for, check_precision
from brittle.kernel.units import Part
from brittle.mass import groups_of
from brittle.natural_holes import NaturalHole, NaturalMap
from brittle.outcomes import Observed
from brittle.path.replay import Path
from brittle.probes import Family, families_for
from brittle.records import AttackRows, Groups, Ledger, Norm, Pairs, ShiftMap
from brittle.runs import open_run
from brittle.settings import fingerprints
from brittle.shares import Share
from brittle.shift import draw_probes
from brittle.split import Seal, Split, split_test
from brittle.stages import Stages
from brittle.subject import Subject

RECORDS = {
    record.__name__: record
    for record in (
        accounts.Account,
        AttackRows,
        Contest,
        Halved,
        Ledger,
        Memory,
        NaturalHole,
        NaturalMap,
        Observed,
        Pairs,
        Part,
        Predicted,
        Rates,
        Region,
        Severities,
        ShiftMap,
        Together,
    )
}
NORMS: tuple[Norm, ...] = ("l2", "linf")


@dataclass(frozen=True)
class Effort:
    """How much work a preset does."""

    segments: int  # of the group memory, at most
    nodes: int  # midpoints in each, at most
    tolerance: float  # of the shift's error, by which both are chosen
    half: bool  # keep the memory in half precision
    clusters: int  # groups of training examples in each class
    retrainings: int  # seeds of the retraining check


PRESETS = {
    "quick": Effort(segments=40, nodes=2, tolerance=0.2, half=False, clusters=3, retrainings=5),
    "standard": Effort(segments=80, nodes=2, tolerance=0.1, half=False, clusters=3, retrainings=10),
    "thorough": Effort(segments=160, nodes=2, tolerance=0.05, half=True, clusters=5, retrainings=20),
}


@dataclass(frozen=True)
class Context:
    """What all stages of one audit share."""

    subject: Subject
    stages: Stages
    path: Path | None
    split: Split  # without sealed labels, until the seal is opened
    seal: Seal
    families: tuple[Family, ...]
    draws: Mapping[str, Tensor]  # of `split.both`, by family
    groups: Groups
    device: str
    precision: Precision
    preset: str
    effort: Effort
    budget: int  # bytes for a block of queries
    share: Share  # of the work, where several processes do it

    def sample(self, stage: str) -> accounts.Sample:
        """Queries and families on which a stage measures the memory."""
        return accounts.Sample.of(self.split.both, self.families, self.draws, self.stages.generator(stage))

    def sealed_draws(self) -> dict[str, Tensor]:
        return {name: draw[len(self.split.predict) :] for name, draw in self.draws.items()}


@dataclass(frozen=True)
class Asked:
    """What the user asks for."""

    queries: int
    seed: int
    device: str
    preset: str
    spec: str | None
    options: Mapping[str, str]
    progress: bool
    memory_budget: int
    deterministic: bool
    tolerance: float | None = None
    precision: Precision = "float32"

    @property
    def effort(self) -> Effort:
        """The preset's, with the shift's error that is asked for."""
        preset = PRESETS[self.preset]
        return preset if self.tolerance is None else replace(preset, tolerance=self.tolerance)

    def settings(self, subject: Subject) -> dict[str, Any]:
        """What the result depends on."""
        return {
            "spec": self.spec,
            "options": dict(self.options),
            "queries": self.queries,
            "seed": self.seed,
            "device": self.device,
            "effort": {"preset": self.preset, **asdict(self.effort)},
            "deterministic": self.deterministic,
            "precision": self.precision,
            "path": str(subject.path) if subject.path else None,
            "fingerprints": fingerprints(subject),
        }


@contextmanager
def begin(subject: Subject, out: FilePath | str, asked: Asked, share: Share | None = None) -> Iterator[Context]:
    """Hold the run folder, and prepare what all stages share. share: of the work, with others in the same folder."""
    if asked.preset not in PRESETS:
        raise UsageError(f"preset must be one of {', '.join(PRESETS)}, found {asked.preset!r}")
    if not (asked.tolerance is None or 0 < asked.tolerance < 1):
        raise UsageError(f"tolerance must be between 0 and 1, found {asked.tolerance}; pass .1 for a tenth of a shift")
    check_precision(asked.precision, subject.model, asked.device)
    settings = asked.settings(subject)
    with (
        open_run(out, settings, shared=share is not None) as run,
        deterministic(asked.deterministic),
        asked_for(asked.precision),
    ):
        share = share or Share()
        stages = Stages(run, RECORDS, asked.seed, asked.progress and share.leads)
        yield prepare(subject, stages, asked, share)


def prepare(subject: Subject, stages: Stages, asked: Asked, share: Share) -> Context:
    """The cheap beginnings, made anew in a resumed audit."""
    path = accounts.open_path(subject)
    seal = Seal(split_test(subject, asked.queries, stages.generator("split")))
    split = seal.split
    families = families_for(subject, stages.generator("families"))
    draws = draw_probes(split.both, families, stages.generator("draws"))
    groups = groups_of(subject, asked.effort.clusters)
    shared = (asked.device, asked.precision, asked.preset, asked.effort, asked.memory_budget, share)
    return Context(subject, stages, path, split, seal, families, draws, groups, *shared)

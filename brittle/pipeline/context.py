"""What all stages of one audit share: the subject, its path, the split, the families and their draws, the groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from brittle import accounts
from brittle.agreement.contests import Contest
from brittle.kernel.memory import Memory
from brittle.mass import cluster_groups
from brittle.outcomes import Observed
from brittle.path.replay import Path
from brittle.probes import Family, families_for
from brittle.records import AttackRows, Groups, Ledger, Norm, Pairs, ShiftMap
from brittle.shift import draw_probes
from brittle.split import Split, split_test
from brittle.stages import Stages
from brittle.subject import Subject

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


@dataclass(frozen=True)
class Context:
    """What all stages of one audit share."""

    subject: Subject
    stages: Stages
    path: Path | None
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


def prepare(subject: Subject, stages: Stages, queries: int, device: str, preset: str) -> Context:
    """The cheap beginnings, made anew in a resumed audit."""
    path = accounts.open_path(subject)
    split = split_test(subject, queries, stages.generator("split"))
    families = families_for(subject, stages.generator("families"))
    draws = draw_probes(split.both, families, stages.generator("draws"))
    groups = cluster_groups(subject, PRESETS[preset].clusters)
    return Context(subject, stages, path, split, families, draws, groups, device, preset)

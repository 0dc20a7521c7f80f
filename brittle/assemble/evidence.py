"""Everything the stages found: what findings are written from."""

from __future__ import annotations

from dataclasses import dataclass

from brittle.accounts import Account
from brittle.agreement.contests import Contest
from brittle.attacks.perturbations import Severities
from brittle.findings import Agreement, HealthCheck, MemoryFidelity
from brittle.flips import Flips
from brittle.holes import Region
from brittle.kernel.precision import Precision
from brittle.natural_holes import NaturalMap
from brittle.outcomes import Observed
from brittle.path.replay import Path
from brittle.probes import Family
from brittle.records import AttackRows, Groups, ShiftMap
from brittle.split import Split
from brittle.subject import Subject


@dataclass(frozen=True)
class Evidence:
    """Everything the stages found."""

    subject: Subject
    spec: str | None
    precision: Precision  # of the account's products
    path: Path | None
    split: Split
    families: tuple[Family, ...]
    groups: Groups
    memory_fidelity: MemoryFidelity | None
    shift: ShiftMap  # of `split.both`
    observed: Observed  # of `split.both`
    holes: list[Region]
    natural_holes: NaturalMap  # of `split.natural`
    attacked: list[AttackRows]  # on sealed queries that are right when clean
    health: list[HealthCheck]  # of these attacks
    perturbed: list[Severities]  # of the same queries; none where they are no images
    flips: Flips
    account: Account  # of the predicting queries, then every flip before and after
    contests: list[Contest]
    agreement: Agreement

    @property
    def first(self) -> int:
        """Where the sealed queries begin in `split.both`."""
        return len(self.split.predict)

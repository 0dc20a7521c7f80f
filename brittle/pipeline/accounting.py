"""The stage `ledger`: the account of the queries by units of work, which several processes may share.

Every unit is stored by itself under `STAGE/units/`, whole or not at all; those that are there and undamaged are not
done again. A unit is claimed while it is computed: where its process dies the system lets go of the claim, and
another takes it up. When all are there they are added up, and deleted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from brittle import accounts
from brittle.flips import Flips
from brittle.kernel.sweep import Quadrature
from brittle.kernel.units import Part, Unit, account_unit, cut, total
from brittle.pipeline.context import Context
from brittle.records import Ledger, Pairs, Progress
from brittle.settings import digest
from brittle.stages import Spend

PAUSE = 0.5
"""Seconds between two looks at what other processes do."""

STEP_BY_STEP = Quadrature(segment=1)
"""How flips are accounted for: the shift from a query to its probe asks for far shorter segments than either output."""


def first_account(c: Context) -> Accounting:
    """The account of the predicting queries, to be made."""
    predict = c.split.predict
    return Accounting(c, "ledger", "balancing the ledger", predict.ids, predict.inputs, predict.pairs)


def whole_account(c: Context, flips: Flips) -> accounts.Account:
    """The account of the predicting queries, then of every flip before and after."""
    ids, pairs = torch.cat([c.split.sealed.ids[flips.rows]] * 2), Pairs.join(flips.pairs, flips.pairs)
    inputs = torch.cat([flips.before, flips.after])
    flipped = Accounting(c, "ledger/flips", "balancing the ledger of flips", ids, inputs, pairs, STEP_BY_STEP)
    first = first_account(c).made()
    if not len(flips.rows):
        return first
    second = flipped.made()
    ledgers = [found.ledger for found in (first, second) if found.ledger is not None]
    return accounts.Account(
        torch.cat([first.ids, second.ids]),
        torch.cat([first.predicted, second.predicted]),
        torch.cat([first.rival, second.rival]),
        torch.cat([first.contributions, second.contributions]),
        Ledger.join(*ledgers) if len(ledgers) == 2 else None,
        first.evaluations + second.evaluations,
    )


@dataclass
class Accounting:
    """The account of M outputs in the making. Without a path there is nothing to be shared."""

    c: Context
    stage: str
    title: str
    ids: Tensor  # shape: (M,)
    inputs: Tensor  # shape: (M, *input)
    pairs: Pairs
    quadrature: Quadrature | None = None
    _whole: set[Unit] = field(default_factory=set)

    def __post_init__(self) -> None:
        c = self.c
        self.units = cut(c.path, c.subject, len(self.pairs), c.budget, self.quadrature) if c.path else []
        self.key = digest(self.inputs, self.pairs.predicted, self.pairs.rival)[:8]
        self.length = sum(stop - start for start, stop in (unit.steps for unit in self.units))

    def finish(self) -> bool:
        """Do this process's share of the units, and what others have left. Whether all are done.

        The first of several ranks waits for the others, and takes up what those leave that are gone.
        """
        c = self.c
        if self.merged():
            return True
        with c.stages.bar(self.title) as tick:
            for k in c.share.order(len(self.units)):
                self._do(self.units[k], tick)
        while (missing := self.missing()) and c.share.leads and not c.share.lone:
            with c.stages.bar(f"waiting for {len(missing)} units of other processes") as tick:
                while len(self.missing()) == len(missing):
                    tick(self.done(), self.length)
                    time.sleep(PAUSE)
                    for unit in missing:
                        self._do(unit, tick)
        return not missing or self.merged()

    def made(self) -> accounts.Account:
        """The account: what is missing of its units is done, they are added up, and go away."""
        self.finish()
        found = self.c.stages(self.stage, self.title, self._total)
        self.c.stages.run.drop(f"{self.stage}/units")
        return found

    def merged(self) -> bool:
        """Whether the whole account is there already."""
        return self.c.stages.run.has(self.stage)

    def missing(self) -> list[Unit]:
        """The units that are not there, or damaged."""
        return [unit for unit in self.units if not self._there(unit)]

    def done(self) -> int:
        """Steps of the units that are there."""
        return sum(unit.steps[1] - unit.steps[0] for unit in self.units if self._there(unit))

    def _do(self, unit: Unit, tick: Progress) -> None:
        """Compute and store one unit, unless it is there or another process is at it."""
        c, before = self.c, self.done()
        tick(before, self.length)
        if self._there(unit):
            return
        steps = unit.steps[1] - unit.steps[0]

        def compute(spend: Spend) -> Part:
            assert c.path is not None
            within = lambda now, all_: tick(before + steps * now // all_, self.length)  # noqa: E731
            part = account_unit(
                c.path, c.subject, self.inputs, self.pairs, unit, self.quadrature, c.device, progress=within
            )
            spend(part.evaluations)
            return part

        with c.stages.run.claim(self._name(unit), wait=False) as ours:
            if ours and not self._there(unit) and not self.merged():
                c.stages.keep(self._name(unit), self.title, compute)
                self._whole.add(unit)
        tick(self.done(), self.length)

    def _total(self, tick: Progress, spend: Spend) -> accounts.Account:
        c = self.c
        if c.path is None:
            found = accounts.tangent_account(c.subject, self.ids, self.inputs, self.pairs, c.device, tick)
            spend(found.evaluations)
            return found

        def parts() -> Iterator[Part]:
            for k, unit in enumerate(self.units):
                part, cost = c.stages.read(self._name(unit))
                spend.part(cost)
                yield part
                tick(k + 1, len(self.units))

        swept = total(self.units, parts(), len(self.pairs), len(c.subject.train))
        return accounts.swept_account(self.ids, self.pairs, swept)

    def _there(self, unit: Unit) -> bool:
        if unit not in self._whole and self.c.stages.run.has(self._name(unit)):
            self._whole.add(unit)
        return unit in self._whole

    def _name(self, unit: Unit) -> str:
        return f"{self.stage}/units/{self.key}-{unit}"

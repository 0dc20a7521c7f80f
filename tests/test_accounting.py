"""The account of flips: taken step by step, because a shift asks for more than an output does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import reference
import torch
from cases import CASES, Training, plain_pairs, train
from cases import float64 as float64
from torch import Tensor

from brittle.flips import Flips
from brittle.kernel.sweep import sweep
from brittle.pipeline.accounting import first_account, whole_account
from brittle.pipeline.context import Asked, begin
from brittle.records import Pairs
from brittle.subject import Subject

FLIPS, NODES = 4, 5


@pytest.fixture
def training(tmp_path: Path) -> Training:
    """Sixty steps of a network with kinks, five of which are a segment for outputs."""
    found = train("relu", "momentum", tmp_path / "path", steps=60, count=24)
    data = CASES["relu"].data
    return replace(found, subject=Subject(found.subject.model, data(24, seed=0), data(24, seed=100), path=found.root))


def some_flips(training: Training, before: Tensor, pairs: Pairs) -> Flips:
    after = (before + 0.1 * torch.randn(before.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)
    count = len(before)
    return Flips(torch.arange(count), before, after, pairs, ("noise",) * count, (0.1,) * count, ("",) * count)


def shift(contributions: Tensor) -> Tensor:
    """From every query to its probe. contributions: (2 K, N), queries first."""
    return contributions[len(contributions) // 2 :] - contributions[: len(contributions) // 2]


def test_flips_are_accounted_for_step_by_step(training: Training, tmp_path: Path) -> None:
    asked = Asked(FLIPS, 0, "cpu", "quick", None, {}, False, 1 << 30, False)
    with begin(training.subject, tmp_path / "run", asked) as c:
        sealed = c.split.sealed
        flips = some_flips(training, sealed.inputs, sealed.pairs)
        found = whole_account(c, flips)
        first = first_account(c).made()
    inputs, pairs = torch.cat([flips.before, flips.after]), Pairs.join(flips.pairs, flips.pairs)
    expected = reference.account(
        training.seen, reference.displacements(training.seen), inputs, plain_pairs(pairs), NODES
    ).contributions
    coarse = sweep(training.path, training.subject, inputs, pairs).ledger.contributions
    ours = found.contributions[len(first.ids) :].double()
    off, before = (1 - torch.cosine_similarity(shift(c), shift(expected), dim=1) for c in (ours, coarse))
    assert (off < before).all()
    assert off.mean() < before.mean() / 10
    assert torch.equal(found.contributions[: len(first.ids)], first.contributions)
    assert found.ledger is not None
    assert torch.allclose(found.ledger.total(), found.ledger.output, atol=1e-10)
    assert torch.allclose(found.ledger.output[len(first.ids) :], pairs.margin(training.subject.predict(inputs)))

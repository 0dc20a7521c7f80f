"""Averaged weights as the audited model: their shares are read from how they move, and the account ends at them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import ByHand, account, assert_adds_up, assert_replays, data, normalized, sgd, tanh
from cases import float64 as float64
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn

from brittle.errors import DataError, PathMismatchError, UnsupportedError
from brittle.kernel.displacement import displaced, even_cuts
from brittle.mass import class_groups
from brittle.path.flat import state_of
from brittle.path.match import check_path
from brittle.records import Pairs
from brittle.subject import Subject

STEPS = 8

Update = Callable[[nn.Module, nn.Module, int], None]


@dataclass(frozen=True)
class Averaging:
    """make: the averaged model; update: how it is moved after step k; shares: of the new weights, as they must be."""

    make: Callable[[nn.Module], nn.Module]
    update: Update
    shares: list[float]


def torchs(average: nn.Module, model: nn.Module, k: int) -> None:
    assert isinstance(average, AveragedModel)
    average.update_parameters(model)


def by_hand(share: Callable[[int], float]) -> Update:
    @torch.no_grad()
    def update(average: nn.Module, model: nn.Module, k: int) -> None:
        for mean, new in zip(average.parameters(), model.parameters(), strict=True):
            mean.add_(new - mean, alpha=share(k))
        for held, buffer in zip(average.buffers(), model.buffers(), strict=True):
            held.copy_(buffer)

    return update


def after(step: int, every: int = 1) -> Update:
    return lambda average, model, k: torchs(average, model, k) if k >= step and (k - step) % every == 0 else None


AVERAGES = {
    "ema": Averaging(lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.7)), torchs, [1.0] + [0.3] * 7),
    "ema of buffers": Averaging(
        lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True), torchs, [1.0] + [0.3] * 7
    ),
    "equal": Averaging(AveragedModel, torchs, [1 / (k + 1) for k in range(8)]),
    "swa of the late path": Averaging(
        lambda m: AveragedModel(m, multi_avg_fn=get_swa_multi_avg_fn()),
        after(4, every=2),
        [0, 0, 0, 0, 1, 0, 0.5, 0],
    ),
    "by hand": Averaging(copy.deepcopy, by_hand(lambda k: 0.2), [0.2] * 8),
    "changing decay": Averaging(copy.deepcopy, by_hand(lambda k: 9 / (10 + k)), [9 / (10 + k) for k in range(8)]),
    "now and then a copy": Averaging(copy.deepcopy, by_hand(lambda k: float(k % 3 == 0)), [1.0, 0, 0, 1, 0, 0, 1, 0]),
    "lookahead of nothing": Averaging(copy.deepcopy, lambda *_: None, [0.0] * 8),
}


def averaged(root: Path, name: str, model: nn.Module | None = None, **asked: Any) -> tuple[ByHand, nn.Module]:
    """A finished training whose average was kept."""
    how = AVERAGES[name]
    model = normalized() if model is None else model
    average = how.make(model)
    loop = ByHand(root, model=model, average=average, **asked)
    for k in range(STEPS):
        loop.step()
        how.update(average, loop.model, k)
    return loop, average


@pytest.mark.parametrize("name", AVERAGES)
def test_shares_are_read_from_how_the_average_moves(name: str, tmp_path: Path) -> None:
    loop, average = averaged(tmp_path, name)
    path = loop.close()
    assert torch.allclose(path.averaging, torch.tensor(AVERAGES[name].shares), atol=1e-9)
    if any(AVERAGES[name].shares):
        assert path.average is not None
        assert torch.equal(path.final(), state_of(getattr(average, "module", average)))


@pytest.mark.parametrize("name", list(AVERAGES)[:-1])
def test_the_average_is_the_last_weights_less_what_it_lacks_of_each_step(name: str, tmp_path: Path) -> None:
    """average = w_S - sum_s behind_s D_s, for the weights; running statistics lie where the average has them."""
    loop, average = averaged(tmp_path, name)
    path = loop.close()
    states = torch.stack([path.snapshot(s).state for s in range(STEPS + 1)])
    lacking = (path.behind[:, None] * states.diff(dim=0)).sum(0)
    parameters = sum(p.numel() for p in average.parameters())
    assert torch.allclose(path.final()[:parameters], (states[-1] - lacking)[:parameters], atol=1e-12)


@pytest.mark.parametrize("name", list(AVERAGES)[:-1])
def test_the_account_ends_at_the_averaged_weights(name: str, tmp_path: Path) -> None:
    loop, average = averaged(tmp_path, name)
    path, audited = loop.close(), getattr(average, "module", average)
    subject = loop.subject(model=audited)
    check_path(path, subject)
    assert_replays(path, subject, loop.states)
    ledger = account(path, subject)
    assert torch.allclose(ledger.output, _margins(audited, subject), atol=1e-12)
    assert_adds_up(ledger, residual=1e-4)


@pytest.mark.parametrize("name", ["ema", "swa of the late path"])
def test_the_groups_displacements_lead_to_the_averaged_weights(name: str, tmp_path: Path) -> None:
    loop, average = averaged(tmp_path, name)
    path, subject = loop.close(), loop.subject(model=getattr(average, "module", average))
    parts = list(displaced(path, subject, class_groups(subject), even_cuts(STEPS, 2)))
    assert len(parts) == 3
    total = sum(part.moved.sum(0) for part in parts)
    assert torch.allclose(total, path.final() - path.snapshot(0).state, atol=1e-10)


def _margins(model: nn.Module, subject: Subject) -> Tensor:
    inputs = data(3, seed=50)[0]
    return Pairs.of(subject.predict(inputs)).margin(model.eval()(inputs))


def test_statistics_that_are_found_anew_in_the_end_are_the_audited_ones(tmp_path: Path) -> None:
    loop, average = averaged(tmp_path, "swa of the late path")
    update_bn([loop.inputs], average)
    path, subject = loop.close(), loop.subject(model=average.module)
    check_path(path, subject)
    ledger = account(path, subject)
    assert_adds_up(ledger, residual=1e-2)  # they move far, along one straight line
    assert ledger.buffers.abs().min() > 1e-4


def test_the_last_weights_are_not_what_such_a_path_ends_at(tmp_path: Path) -> None:
    loop, _ = averaged(tmp_path, "ema", tanh())
    path, subject = loop.close(), loop.subject()
    with pytest.raises(PathMismatchError, match=r"its averaged weights \(average=\) differ from them by up to"):
        check_path(path, subject)


def test_the_average_is_not_what_a_path_without_it_ends_at(tmp_path: Path) -> None:
    model = tanh()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    loop = ByHand(tmp_path, model=model)
    for _ in range(4):
        loop.step()
        average.update_parameters(model)
    path, subject = loop.close(), loop.subject(model=average.module)
    with pytest.raises(PathMismatchError, match="must end at the audited weights, its weights differ"):
        check_path(path, subject)


def test_single_precision_and_slow_averages_are_read_as_well(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    model = tanh()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    loop = ByHand(tmp_path, sgd(0.3), model, average=average)
    for _ in range(30):
        loop.step()
        average.update_parameters(model)
    path = loop.close()
    assert path.averaging[0] == 1
    assert torch.allclose(path.averaging[1:], torch.tensor(0.001).double(), rtol=2e-2)


# ------------------------------------------------------------------------------------------------------ refusals


@torch.no_grad()
def towards_older(average: nn.Module, model: nn.Module, k: int) -> None:
    """Weights that are one step old."""
    for mean, new in zip(average.parameters(), model.parameters(), strict=True):
        old = getattr(mean, "waiting", new.clone())
        mean.add_(old - mean, alpha=0.3)
        mean.waiting = new.clone()


@torch.no_grad()
def unevenly(average: nn.Module, model: nn.Module, k: int) -> None:
    for n, (mean, new) in enumerate(zip(average.parameters(), model.parameters(), strict=True)):
        mean.add_(new - mean, alpha=0.1 + 0.2 * n)


@torch.no_grad()
def with_noise(average: nn.Module, model: nn.Module, k: int) -> None:
    for mean, new in zip(average.parameters(), model.parameters(), strict=True):
        mean.add_(new - mean + 0.1 * torch.randn(mean.shape), alpha=0.3)


@pytest.mark.parametrize("update", [towards_older, unevenly, with_noise])
def test_an_average_that_moves_otherwise_is_refused(update: Update, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tanh()
    average = copy.deepcopy(model)
    loop = ByHand(tmp_path, model=model, average=average)

    def train() -> None:
        for k in range(5):
            loop.step()
            update(average, model, k)

    with pytest.raises(UnsupportedError, match=r"avg \+ a \(w - avg\), found another move; update it once after each"):
        train()


def test_an_average_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="average= must hold the model's own 4 parameters, found 6 or other"):
        ByHand(tmp_path, average=copy.deepcopy(normalized()))


def test_an_average_may_be_updated_several_times_between_two_steps(tmp_path: Path) -> None:
    model = tanh()
    average = copy.deepcopy(model)
    loop = ByHand(tmp_path, model=model, average=average)
    for k in range(4):
        loop.step()
        for _ in range(2):
            by_hand(lambda _: 0.5)(average, model, k)
    assert torch.allclose(loop.close().averaging, torch.full((4,), 0.75), atol=1e-9)


def test_a_flush_after_the_update_keeps_the_share(tmp_path: Path) -> None:
    model = tanh()
    average = copy.deepcopy(model)
    loop = ByHand(tmp_path, model=model, average=average)
    for k in range(4):
        loop.step()
        by_hand(lambda _: 0.4)(average, model, k)
        loop.recorder.flush()
    assert torch.allclose(loop.close().averaging, torch.full((4,), 0.4), atol=1e-9)


def test_a_flush_before_the_update_would_lose_the_share_and_is_refused(tmp_path: Path) -> None:
    model = tanh()
    average = copy.deepcopy(model)
    loop = ByHand(tmp_path, model=model, average=average)
    loop.step()
    loop.recorder.flush()
    by_hand(lambda _: 0.4)(average, model, 0)
    with pytest.raises(DataError, match=r"found them updated later; move the call of flush\(\) behind the update"):
        loop.step()


def test_a_path_without_an_average_ends_at_the_last_weights(tmp_path: Path) -> None:
    loop = ByHand(tmp_path)
    loop.steps(2)
    path = loop.close()
    assert path.average is None
    assert torch.equal(path.final(), loop.states[-1])
    assert not list(tmp_path.glob("average*"))

"""The recorder beside a loop: the budget of its files, closures, gradient scalers, wrappers, and what it refuses."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import math
import os
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_hand import ByHand, account, assert_adds_up, assert_recorded, assert_replays, normalized, sgd, tanh
from cases import float64 as float64
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import SGD, Adadelta, Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR

from brittle.errors import DataError, DiskError, NotFiniteError, PathMismatchError, UnsupportedError
from brittle.path import keeping, store
from brittle.path.keeping import BLOCKS_IN_BUDGET
from brittle.path.match import check_path
from brittle.path.recorder import Recorder
from brittle.path.store import PathReader
from brittle.path.training import bare
from brittle.path.writer import AHEAD, Writer

HEADER = 2_000
"""Bytes that a file of states has besides them, at most."""


# -------------------------------------------------------------------------------------------------------- the budget


def size(folder: Path) -> int:
    """Bytes of the files in a folder, which may come and go meanwhile."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size - HEADER
    return total


@pytest.mark.parametrize("states", [20, 45])
def test_states_on_disk_keep_to_the_budget_at_any_time(states: int, tmp_path: Path) -> None:
    """While states are thinned one block is there twice, the second time with half of its states."""
    model = nn.Sequential(nn.Linear(4, 200), nn.Tanh(), nn.Linear(200, 3))
    state = 3 * 8 * sum(p.numel() for p in model.parameters())  # weights and two moments
    loop = ByHand(tmp_path, lambda p: AdamW(p, lr=0.01), model, budget=states * state)
    most, every = 0, []
    for _ in range(120):
        loop.step()
        most = max(most, size(tmp_path / "states"))
        every.append(loop.recorder.every)
    assert states * state / 4 < most <= states * state * (1 + 0.5 / BLOCKS_IN_BUDGET)
    path = loop.close()
    assert sum(path.snapshot(mark).nbytes for mark in path.marks) <= (states + 1) * state
    assert every == sorted(every)
    assert all(b in (a, 2 * a) for a, b in pairwise(every)), "it doubles"
    assert every[-1] == 2 ** round(torch.tensor(every[-1]).log2().item()) > 1
    gaps = torch.tensor(path.marks).diff()
    assert (gaps[:-1] == every[-1]).all()
    assert (path.marks[0], path.marks[-1]) == (0, 120)


@pytest.mark.parametrize("budget", [0, 2000, 20_000])
@pytest.mark.parametrize("steps", [1, 7, 30])
def test_the_first_state_and_the_last_are_never_thinned(steps: int, budget: int, tmp_path: Path) -> None:
    loop = ByHand(tmp_path, budget=budget)
    loop.steps(steps)
    path, subject = loop.close(), loop.subject()
    check_path(path, subject)
    assert_replays(path, subject, loop.states)
    assert (path.marks[0], path.marks[-1]) == (0, steps)
    assert torch.equal(path.snapshot(0).state, loop.states[0])
    bytes_of = path.snapshot(0).nbytes
    assert (len(path.marks) - 1) * bytes_of <= max(budget, 2 * bytes_of)


def test_every_state_is_kept_while_the_budget_allows(tmp_path: Path) -> None:
    loop = ByHand(tmp_path)
    loop.steps(20)
    assert loop.recorder.every == 1
    path = loop.close()
    assert path.marks == list(range(21))
    assert all(torch.equal(path.snapshot(s).state, loop.states[s]) for s in range(21))


def test_a_block_is_written_when_it_has_its_part_of_the_budget(tmp_path: Path) -> None:
    loop = ByHand(tmp_path, budget=BLOCKS_IN_BUDGET * 6_000)
    loop.steps(20)
    loop.close()
    files = sorted((tmp_path / "states").glob("*.safetensors"))
    blocks = [even.stat().st_size + odd.stat().st_size for even, odd in zip(files[::2], files[1::2], strict=False)]
    assert len(blocks) >= 3
    assert all(3_000 < block < 6_000 + 2 * HEADER for block in blocks[:-1]), "states, and what steps hold"


def test_blocks_are_written_after_some_time_whatever_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "BLOCK_SECONDS", 0.0)
    loop = ByHand(tmp_path)
    loop.steps(5)
    assert_recorded(loop)
    assert len(list((tmp_path / "steps").glob("*.safetensors"))) == 5


@pytest.mark.parametrize(("writing", "fewer"), [(1e-9, True), (math.inf, False)])
def test_states_are_kept_less_often_where_writing_takes_too_long(
    writing: float, fewer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "BLOCK_SECONDS", 0.0)
    monkeypatch.setattr(keeping, "LOOK_SECONDS", 0.0)
    loop = ByHand(tmp_path, writing=writing)
    loop.steps(30)
    assert (loop.recorder.every > 1) == fewer
    path, subject = loop.close(), loop.subject()
    assert (len(path.marks) < 31) == fewer
    check_path(path, subject)
    assert_replays(path, subject, loop.states)


def test_inputs_are_described_where_a_state_is_kept_and_replayed_elsewhere(tmp_path: Path) -> None:
    loop = ByHand(tmp_path)
    loop.recorder._keeper.every = 4
    loop.steps(6)
    loop.recorder.flush()  # the state before step 6 is kept
    loop.steps(4)
    path = loop.close()
    described = [step for step in range(10) if not math.isnan(path.step(step).batches[0].seen[0])]
    assert described == [0, 4, 6, 8] == path.marks[:-1]
    subject = loop.subject()
    check_path(path, subject)
    inputs = loop.inputs.clone()
    loop.inputs.mul_(0.9)
    with pytest.raises(PathMismatchError, match="the inputs of step 0 had mean"):
        check_path(path, loop.subject())
    loop.inputs.copy_(inputs)
    first, middle, between = (set(path.step(step).batches[0].ids.tolist()) for step in (0, 4, 5))
    loop.inputs[sorted(between - first - middle)] *= 0.5
    with pytest.raises(PathMismatchError, match="though the inputs are the same"):
        check_path(path, loop.subject())


def test_an_unknown_rule_keeps_every_state_however_long_writing_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "BLOCK_SECONDS", 0.0)
    monkeypatch.setattr(keeping, "LOOK_SECONDS", 0.0)
    loop = ByHand(tmp_path, lambda p: Adadelta(p, lr=0.1), writing=1e-9)
    loop.steps(10)
    assert loop.close().marks == list(range(11))


def test_k_doubles_as_often_as_the_excess_asks(tmp_path: Path) -> None:
    keeper = keeping.Keeper(tmp_path, budget=1 << 30, writes=True, writing=0.1)
    keeper.steps = 1_000
    for busy, every in ((0.5, 1), (5.0, 8), (5.0, 8)):  # of ten seconds: a twentieth, nearly half, nothing more
        keeper._looked, keeper._writer.busy = (time.monotonic() - 10, keeper._looked[1]), busy
        keeper._keep_pace()
        assert keeper.every == every
    keeper.stop()


# --------------------------------------------------------------------------------------------------- what is noted


def test_learning_rates_and_settings_are_noted_step_by_step(tmp_path: Path) -> None:
    loop = ByHand(tmp_path, lambda p: SGD(p, lr=0.1, momentum=0.9))
    schedule, noted = OneCycleLR(loop.optimizer, 0.3, 12), []
    for _ in range(10):
        loop.step()
        noted.append({k: loop.optimizer.param_groups[0][k] for k in ("lr", "momentum")})
        schedule.step()
    path = assert_recorded(loop)
    found = [{"lr": path.step(s).lr[0], "momentum": path.recipe(s).settings[0]["momentum"]} for s in range(10)]
    assert found == noted
    assert len({n["momentum"] for n in noted}) > 5


def test_groups_of_parameters_have_their_own_settings(tmp_path: Path) -> None:
    model = normalized()
    groups = [
        {"params": model[0].parameters(), "lr": 0.2, "weight_decay": 0.1},
        {"params": model[3].parameters(), "lr": 0.05, "nesterov": True},
    ]
    loop = ByHand(tmp_path, optimizer=SGD(groups, lr=1.0, momentum=0.9), model=model)
    loop.steps(4)
    path = assert_recorded(loop)
    assert path.step(2).lr == (0.2, 0.05)
    names = [name for name, _, _ in path.slots]
    owner = dict(zip(names, path.step(2).manner.owner, strict=True))
    assert owner["0.weight"] == owner["0.bias"] == 0
    assert owner["3.weight"] == owner["3.bias"] == 1
    assert owner["1.weight"] == -1, "outside the optimizer"
    assert owner["1.running_mean"] == -1, "a statistic"
    assert [s["nesterov"] for s in path.step(2).manner.settings] == [False, True]


def test_a_step_holds_its_batches_epoch_by_epoch(tmp_path: Path) -> None:
    loop = ByHand(tmp_path)
    for epoch in (0, 0, 3):
        loop.optimizer.zero_grad()
        ids = loop.draw()
        loop.loss(ids).backward()
        loop.recorder.batch(ids, epoch=epoch)
        loop.spend()
    path = loop.close()
    assert [path.step(s).batches[0].epoch for s in range(3)] == [0, 0, 3]


# ----------------------------------------------------------------------------------------------------------- closures


def closure_of(loop: ByHand, ids: Tensor, clip: float | None = None) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        loop.optimizer.zero_grad()
        loss = loop.loss(ids)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(loop.model.parameters(), clip)
        return loss

    return closure


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("told", ["before", "within"])
def test_a_closure_is_followed(told: str, named: bool, clip: float | None, tmp_path: Path) -> None:
    loop, losses, found = ByHand(tmp_path, lambda p: Adam(p, lr=0.02, eps=1e-3), normalized()), [], []
    for _ in range(5):
        ids = loop.draw()
        closure = closure_of(loop, ids, clip)
        if told == "before":
            loop.recorder.batch(ids)
            run = closure
        else:
            run = lambda closure=closure, ids=ids: (loss := closure(), loop.recorder.batch(ids))[0]  # noqa: E731, F841
        losses.append(loop.loss(ids).item())
        loop.model.zero_grad()
        how: dict[str, Any] = {"closure": run} if named else {}
        loop.spend_by(lambda how=how, run=run: found.append(loop.optimizer.step(*([] if how else [run]), **how)))
    assert torch.allclose(torch.stack(found), torch.tensor(losses)), "the loss is handed on"
    assert_recorded(loop)


def test_lbfgs_is_refused_by_name(tmp_path: Path) -> None:
    model = tanh()
    with pytest.raises(UnsupportedError, match="LBFGS cannot be recorded: it takes the loss several times a step"):
        Recorder(model, torch.optim.LBFGS(model.parameters()), tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is begun"


# ---------------------------------------------------------------------------------------------------------- scalers


OVERFLOWS = (4, 7)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("make", ["sgd", "adam", "fused sgd", "fused adam", "fused adamw", "fused adagrad"])
def test_a_gradient_scaler_is_followed_and_its_skipped_steps_are_none(make: str, unscale: bool, tmp_path: Path) -> None:
    """A fused optimizer is given scaled gradients, the scale and whether to skip; others are not called then."""
    makes: dict[str, Any] = {
        "sgd": sgd(momentum=0.9),
        "adam": lambda p: Adam(p, lr=0.02, eps=1e-3),
        "fused sgd": sgd(momentum=0.9, weight_decay=0.1, fused=True),
        "fused adam": lambda p: Adam(p, lr=0.02, eps=1e-3, fused=True),
        "fused adamw": lambda p: AdamW(p, lr=0.02, eps=1e-3, fused=True),
        "fused adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, eps=1e-3, fused=True),
    }
    loop = ByHand(tmp_path, makes[make], normalized())
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    scales = set()
    for k in range(9):
        loop.optimizer.zero_grad()
        ids = loop.draw()
        scales.add(scaler.get_scale())
        scaler.scale(loop.loss(ids, torch.inf if k in OVERFLOWS else 1.0)).backward()
        loop.recorder.batch(ids)
        if unscale:
            scaler.unscale_(loop.optimizer)
        loop.spend_by(lambda: scaler.step(loop.optimizer))
        scaler.update()
    assert len(scales) > 2
    path = assert_recorded(loop, atol=1e-9)
    assert path.steps == 9 - len(OVERFLOWS)


def test_a_skipped_step_leaves_no_trace(tmp_path: Path) -> None:
    """Two trainings, one of which overflows now and then and goes on with the next batch, have the same path."""
    paths = []
    for overflows in ((), (0, 2, 3)):
        loop = ByHand(tmp_path / str(len(overflows)), lambda p: Adam(p, lr=0.02, fused=True))
        scaler, batches = torch.amp.GradScaler("cpu", init_scale=2.0**10), [loop.draw() for _ in range(6)]
        taken = 0
        for k in range(6 + len(overflows)):
            loop.optimizer.zero_grad()
            ids = batches[taken]
            scaler.scale(loop.loss(ids, torch.inf if k in overflows else 1.0)).backward()
            loop.recorder.batch(ids)
            scaler.step(loop.optimizer)
            scaler.update()
            taken += k not in overflows
        loop.recorder.close()
        paths.append(PathReader(loop.root))
    a, b = paths
    assert a.steps == b.steps == 6
    assert all(torch.allclose(a.snapshot(s).state, b.snapshot(s).state, atol=1e-12) for s in range(7))
    assert all(torch.equal(a.step(s).batches[0].ids, b.step(s).batches[0].ids) for s in range(6))


# --------------------------------------------------------------------------------------------------------- wrappers


def test_a_compiled_model_is_recorded_as_the_model_inside(tmp_path: Path) -> None:
    model = normalized()
    compiled = torch.compile(model, backend="eager")
    loop = ByHand(tmp_path, model=compiled)
    loop.steps(4)
    loop.recorder.close()
    path = PathReader(tmp_path)
    assert [name for name, _, _ in path.slots][:2] == ["0.weight", "0.bias"]
    subject = loop.subject(model=model)
    check_path(path, subject)
    assert_adds_up(account(path, subject))


@pytest.mark.parametrize("kind", ["DataParallel", "DistributedDataParallel", "OptimizedModule", "both"])
def test_wrappers_are_taken_off(kind: str) -> None:
    model = tanh()
    if kind == "DataParallel":
        wrapped: nn.Module = nn.DataParallel(model)
    elif kind == "OptimizedModule":
        wrapped = torch.compile(model, backend="eager")
    else:
        wrapped = type("DistributedDataParallel", (nn.DataParallel,), {})(model)
        wrapped = torch.compile(wrapped, backend="eager") if kind == "both" else wrapped
    assert bare(wrapped) is model
    assert bare(model) is model


def test_a_data_parallel_training_is_recorded(tmp_path: Path) -> None:
    model = normalized()
    loop = ByHand(tmp_path, model=nn.DataParallel(model))
    loop.steps(3)
    loop.recorder.close()
    path, subject = PathReader(tmp_path), loop.subject(model=model)
    check_path(path, subject)
    assert_adds_up(account(path, subject))


# ---------------------------------------------------------------------------------------------------------- refusals


class FullyShardedDataParallel(nn.Module):
    """By its name alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class FSDPLinear(nn.Linear):
    """What torch's second FSDP makes of a linear layer."""


class DTensor(nn.Parameter):
    """What its weights are."""


@pytest.mark.parametrize("kind", ["outside", "a block inside", "second version", "sharded weights"])
def test_fsdp_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    model: nn.Module = tanh()
    if kind == "outside":
        model = FullyShardedDataParallel(model)
    elif kind == "a block inside":
        model = nn.Sequential(nn.Linear(4, 4), FullyShardedDataParallel(tanh()))
    elif kind == "second version":
        model[0].__class__ = FSDPLinear  # type: ignore[index]
    else:
        model[0].weight = DTensor(torch.ones(5, 4))  # type: ignore[index]
    with pytest.raises(UnsupportedError, match=r"a model under FSDP cannot be recorded, .*; train it with Distributed"):
        Recorder(model, SGD(model.parameters(), lr=0.1), tmp_path)
    assert not list(tmp_path.iterdir())


def test_spectral_normalization_is_refused_by_name(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), parametrizations.spectral_norm(nn.Linear(4, 3)))
    with pytest.raises(UnsupportedError, match=r"spectral normalization does it in 1.*; take it out, or audit the"):
        Recorder(model, SGD(model.parameters(), lr=0.1), tmp_path)
    assert not list(tmp_path.iterdir())


def test_weight_normalization_is_recorded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))
    loop = ByHand(tmp_path, model=model)
    loop.steps(4)
    path, subject = loop.close(), loop.subject()
    check_path(path, subject)
    assert_adds_up(account(path, subject))


def test_parameters_of_another_model_are_refused(tmp_path: Path) -> None:
    model, stranger = nn.Linear(4, 3), nn.Linear(4, 3)
    with pytest.raises(UnsupportedError, match="must move the model's own parameters only, it holds others besides"):
        Recorder(model, SGD([*model.parameters(), *stranger.parameters()], lr=0.1), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_second_optimizer_is_refused_at_recording(tmp_path: Path) -> None:
    model = tanh()
    first, second = ([p for k, p in enumerate(model.parameters()) if k % 2 == part] for part in (0, 1))
    one, other = SGD(first, lr=0.1), SGD(second, lr=0.1)
    recorder = Recorder(model, one, tmp_path / "path")
    F.cross_entropy(model(torch.randn(6, 4)), torch.arange(6) % 3).backward()
    recorder.batch(torch.arange(6))
    one.step()
    other.step()
    with pytest.raises(UnsupportedError, match=r"one optimizer must move all that is trained, found .+bias moved"):
        recorder.close()


def test_parameters_that_rest_may_belong_to_no_optimizer(tmp_path: Path) -> None:
    model = tanh()
    optimizer = SGD([next(model.parameters())], lr=0.1)
    with Recorder(model, optimizer, tmp_path / "path") as recorder:
        loss = F.cross_entropy(model(torch.randn(6, 4)), torch.arange(6) % 3)
        loss.backward()
        recorder.batch(torch.arange(6))
        optimizer.step()
    assert PathReader(tmp_path / "path").steps == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    loop = ByHand(tmp_path)
    loop.steps(2)
    loop.optimizer.zero_grad()
    loop.backward()
    with torch.no_grad():
        loop.model[0].bias.fill_(value)
    with pytest.raises(NotFiniteError, match="weights must be finite, found NaN or infinity before step 2; the train"):
        loop.spend()


def test_a_training_that_has_begun_is_recorded_and_says_so(tmp_path: Path) -> None:
    """What the optimizer held by then belongs to no recorded example."""
    loop = ByHand(tmp_path / "first")
    loop.steps(3)
    loop.recorder.release()
    later = ByHand(tmp_path / "later", model=loop.model, optimizer=loop.optimizer)
    later.steps(4)
    path, subject = later.close(), later.subject()
    check_path(path, subject)
    [warning] = path.warnings
    assert "begins in mid-training" in warning
    ledger = account(path, subject)
    learned = (ledger.output - ledger.start).abs().mean()
    assert ledger.unexplained.abs().max() > 1e-3 * learned
    assert torch.allclose(ledger.total(), ledger.output, atol=1e-12)
    assert ledger.residual.abs().max() < 1e-6


def test_a_training_from_its_beginning_warns_of_nothing(tmp_path: Path) -> None:
    loop = ByHand(tmp_path)
    loop.step()
    assert loop.close().warnings == []


# ------------------------------------------------------------------------------------------------- the writer's thread


def test_writes_are_done_in_order_and_never_far_behind() -> None:
    writer, done, gate = Writer(), [], threading.Event()
    writer.submit(gate.wait)
    for k in range(AHEAD):
        writer.submit(done.append, k)
    waits = threading.Thread(target=writer.submit, args=(done.append, AHEAD))
    waits.start()
    waits.join(0.2)
    assert waits.is_alive(), "it waits for the first"
    assert done == []
    gate.set()
    waits.join()
    writer.wait()
    assert done == list(range(AHEAD + 1))


def test_what_a_write_raises_is_raised_by_the_next_and_what_waits_is_given_up() -> None:
    writer, done, gate = Writer(), [], threading.Event()

    def fail() -> None:
        gate.wait()
        raise DiskError("full")

    writer.submit(fail)
    writer.submit(done.append, 1)
    gate.set()
    with pytest.raises(DiskError, match="full"):
        writer.wait()
    writer.stop()
    assert done == [], "what waited is given up"


@pytest.mark.parametrize("moment", ["while it trains", "at the end"])
def test_a_disk_that_is_full_ends_the_training_by_name(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails beside the training is raised in it, at a later step or when the path is closed."""
    monkeypatch.setattr(keeping, "BLOCK_SECONDS", 0.0 if moment == "while it trains" else 1e9)
    loop = ByHand(tmp_path)
    loop.steps(2)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DiskError, match="no space is left; free space or name another folder, then run again"):
        loop.steps(30) if moment == "while it trains" else loop.recorder.close()


def test_a_write_that_fails_is_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a path would be marked as finished that lacks steps; so it can be taken up where it is whole."""
    loop = ByHand(tmp_path)
    loop.steps(2)
    safe = loop.recorder.flush()
    saved = [copy.deepcopy(part.state_dict()) for part in (loop.model, loop.optimizer)]
    loop.steps(2)
    plain = os.replace

    def full_for_a_moment(source: Path, target: Path) -> None:
        if Path(target).parent.name == "steps":
            raise OSError(errno.ENOSPC, "no space left on device")
        plain(source, target)

    with monkeypatch.context() as disk:
        disk.setattr(os, "replace", full_for_a_moment)
        with pytest.raises(DiskError, match="no space is left"):
            loop.recorder.close()
    time.sleep(0.2)
    assert not (tmp_path / "end.json").exists()
    model = tanh()
    optimizer = sgd(momentum=0.9)(model.parameters())
    for part, state in zip((model, optimizer), saved, strict=True):
        part.load_state_dict(state)
    again = ByHand(tmp_path, model=model, optimizer=optimizer, resume=safe)
    again.states = loop.states[:safe]
    again.steps(2)
    assert_recorded(again)


def test_a_recorder_that_was_let_go_writes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder may be another training's by now."""
    monkeypatch.setattr(keeping, "BLOCK_SECONDS", 0.0)
    plain = store.write_states
    with monkeypatch.context() as slow:
        slow.setattr(store, "write_states", lambda *args: (time.sleep(0.05), plain(*args)))
        loop = ByHand(tmp_path)
        loop.steps(4)
        loop.recorder.release()
        again = ByHand(tmp_path)
    again.steps(2)
    time.sleep(0.3)
    path = assert_recorded(again)
    assert path.steps == 2
    assert path.marks == [0, 1, 2]


# ------------------------------------------------------------------------------------------------- beginning and end


def test_a_path_without_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"at least one optimizer\.step\(\) between Recorder\(\.\.\.\) and close\(\)"):
        ByHand(tmp_path).recorder.close()


def test_an_error_in_the_loop_lets_model_and_optimizer_go(tmp_path: Path) -> None:
    loop = ByHand(tmp_path)

    def train() -> None:
        with loop.recorder:
            loop.step()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    loop.optimizer.zero_grad()
    loop.loss(loop.draw()).backward()
    loop.optimizer.step()  # without ids
    assert not (tmp_path / "end.json").exists()
    assert loop.recorder.steps == 1


def test_closing_twice_is_closing_once(tmp_path: Path) -> None:
    loop = ByHand(tmp_path)
    with loop.recorder:
        loop.step()
        loop.recorder.close()
    assert PathReader(tmp_path).steps == 1


def test_the_trained_model_is_free_of_the_recorder(tmp_path: Path) -> None:
    loop = ByHand(tmp_path, model=normalized())
    plain = copy.deepcopy(normalized())
    loop.step()
    loop.close()
    for module, other in zip(loop.model.modules(), plain.modules(), strict=True):
        assert len(module._forward_hooks) == len(other._forward_hooks) == 0
        assert len(module._forward_pre_hooks) == 0
    assert not any(p._backward_hooks for p in loop.model.parameters())
    copy.deepcopy(loop.model)


def test_the_header_names_the_model_and_the_optimizer(tmp_path: Path) -> None:
    loop = ByHand(tmp_path, lambda p: AdamW(p, lr=0.1), normalized())
    loop.step()
    path = loop.close()
    header = json.loads((tmp_path / "path.json").read_text())
    assert (path.optimizer, path.optimizer_name) == ("AdamW", "AdamW")
    assert header["torch"] == torch.__version__
    assert path.slots[0] == ("0.weight", (5, 4), False)
    assert path.slots[-1] == ("1.running_var", (5,), True)


def test_a_model_of_integers_besides_is_recorded(tmp_path: Path) -> None:
    """Only what has fractions is a part of the state: a count of batches is not."""
    loop = ByHand(tmp_path, model=normalized())
    loop.step()
    assert not any("num_batches" in name for name, _, _ in loop.close().slots)


def test_three_lines_are_enough(tmp_path: Path) -> None:
    """The loop of the module's docstring."""
    model = tanh()
    optimizer = SGD(model.parameters(), lr=0.1)
    inputs, targets = torch.rand(6, 4), torch.arange(6) % 3
    recorder = Recorder(model, optimizer, tmp_path)
    for ids in torch.arange(6).split(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs[ids]), targets[ids])
        recorder.batch(ids)
        loss.backward()
        optimizer.step()
    recorder.close()
    assert PathReader(tmp_path).steps == 3

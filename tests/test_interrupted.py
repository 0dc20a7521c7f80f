"""A training that is killed at any moment goes on from the user's checkpoint, and its path is that of one training."""

from __future__ import annotations

import copy
import io
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_hand import BATCH, COUNT, ByHand, account, assert_adds_up, assert_replays, data, normalized, sgd, tanh
from cases import float64 as float64
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from brittle.errors import DataError, PathMismatchError
from brittle.path.flat import FlatModel, state_of
from brittle.path.match import check_path
from brittle.path.recorder import Recorder
from brittle.path.replay import retrace, walk
from brittle.path.store import PathReader
from brittle.subject import Subject

STEPS, FLUSHED = 10, 3
BUDGET = 8 * 3 * 8 * 50
"""Bytes that a few states of the network below take, with what AdamW holds."""


class Killed(BaseException):
    """The process is gone: nothing that it would still have done reaches the disk."""


@dataclass
class Disk:
    """Counts what happens to files, and stops everything before operation number `at`."""

    at: int
    count: int = 0

    def before(self) -> None:
        self.count += 1
        if self.count > self.at:
            raise Killed


@contextmanager
def stopping(disk: Disk) -> Iterator[None]:
    """Renaming and deleting of files counts, and fails when the process is gone. Nothing is flushed, for speed."""
    replace, unlink, fsync = os.replace, Path.unlink, os.fsync

    def counted_replace(*args: Any) -> None:
        disk.before()
        replace(*args)

    def counted_unlink(path: Path, missing_ok: bool = False) -> None:
        if path.exists() or not missing_ok:
            disk.before()
        unlink(path, missing_ok)

    os.replace, Path.unlink, os.fsync = counted_replace, counted_unlink, lambda _: None  # type: ignore[assignment]
    try:
        yield
    finally:
        os.replace, Path.unlink, os.fsync = replace, unlink, fsync  # type: ignore[method-assign]


@dataclass
class User:
    """A training with checkpoints: what survives a crash is `saved`, and the states that were passed by then.

    Each attempt draws other batches, as trainings do that do not restore their loader.
    """

    root: Path
    budget: int = BUDGET
    attempt: int = 0
    model: nn.Sequential = field(default_factory=normalized)
    states: list[Tensor] = field(default_factory=list)
    saved: dict[str, Any] | None = None

    def run(self, steps: int = STEPS) -> None:
        """Train to the end, from the last checkpoint if there is one."""
        self.attempt += 1
        self.model = normalized()
        optimizer: Optimizer = AdamW(self.model.parameters(), lr=0.02, eps=1e-3)
        self.states, begun = [], None
        if self.saved is not None:
            self.model.load_state_dict(self.saved["model"])
            optimizer.load_state_dict(copy.deepcopy(self.saved["optimizer"]))
            self.states, begun = list(self.saved["states"]), self.saved["steps"]
        inputs, targets = data()
        order = torch.Generator().manual_seed(self.attempt)
        with self.recorder(optimizer, begun) as recorder:
            for step in range(begun or 0, steps):
                ids = torch.randperm(COUNT, generator=order)[:BATCH]
                before = state_of(self.model)
                optimizer.zero_grad()
                F.cross_entropy(self.model(inputs[ids]), targets[ids]).backward()
                recorder.batch(ids)
                optimizer.step()
                self.states.append(before)
                if step % FLUSHED == 1:
                    safe = recorder.flush()
                    parts = {"model": self.model.state_dict(), "optimizer": optimizer.state_dict()}
                    self.saved = copy.deepcopy(parts) | {"states": list(self.states), "steps": safe}
        self.states.append(state_of(self.model))

    @contextmanager
    def recorder(self, optimizer: Optimizer, begun: int | None) -> Iterator[Recorder]:
        """Whatever happens, its thread ends with it, as it does with the process."""
        recorder = Recorder(self.model, optimizer, self.root, self.budget, resume=begun)
        try:
            with recorder:
                yield recorder
        finally:
            recorder.release()

    def subject(self) -> Subject:
        return Subject(self.model.eval(), data(), data(seed=9))


def assert_whole(user: User) -> PathReader:
    """The path on disk is the training that reached the end: every state of it, stored or replayed."""
    path, subject = PathReader(user.root), user.subject()
    assert path.steps == len(user.states) - 1
    assert path.marks[0] == 0
    assert len(set(path.marks)) == len(path.marks)
    assert path.marks == sorted(path.marks)
    for mark in path.marks:
        assert torch.equal(path.snapshot(mark).state, user.states[mark]), mark
    passed = [state for interval in walk(path, subject, FlatModel(subject.model)) for state in interval.states()[:-1]]
    assert torch.allclose(torch.stack(passed), torch.stack(user.states[:-1]), atol=1e-9)
    return path


def operations(root: Path, budget: int) -> int:
    """How often files are renamed or deleted in a training that nothing stops."""
    user, disk = User(root, budget), Disk(at=1 << 30)
    with stopping(disk):
        user.run()
    path = assert_whole(user)
    assert 2 < len(path.marks) < STEPS, "states are thinned"
    return disk.count


def test_a_training_that_is_killed_before_any_file_operation_goes_on_as_one(tmp_path: Path) -> None:
    count = operations(tmp_path / "whole", BUDGET)
    assert count > 35
    resumed = 0
    for at in range(count):
        user = User(tmp_path / str(at))
        with stopping(Disk(at)), pytest.raises(Killed):
            user.run()
        resumed += user.saved is not None
        with stopping(Disk(1 << 30)):
            user.run()
        assert_whole(user)
    assert resumed > count / 2


def test_a_training_that_is_killed_again_while_it_is_taken_up_goes_on_as_one(tmp_path: Path) -> None:
    count = operations(tmp_path / "whole", BUDGET)
    for first in (count // 2, 3 * count // 4):
        begun = User(tmp_path / f"begun {first}")
        with stopping(Disk(first)), pytest.raises(Killed):
            begun.run()
        assert begun.saved is not None
        for second in range(0, 14, 2):
            user = copy.deepcopy(begun)
            user.root = tmp_path / f"{first} {second}"
            _copy(begun.root, user.root)
            for at in (second, second // 2):
                with stopping(Disk(at)), pytest.raises(Killed):
                    user.run()
            with stopping(Disk(1 << 30)):
                user.run()
            assert_whole(user)


def _copy(source: Path, target: Path) -> None:
    for file in source.rglob("*"):
        if file.is_file():
            (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / file.relative_to(source)).write_bytes(file.read_bytes())


def test_the_account_of_a_resumed_training_closes(tmp_path: Path) -> None:
    user = User(tmp_path)
    for at in (35, 8):
        with stopping(Disk(at)), pytest.raises(Killed):
            user.run()
        assert user.saved is not None
    user.run()
    path = assert_whole(user)
    check_path(path, user.subject())
    ledger = account(path, user.subject())
    assert_adds_up(ledger, unexplained=1e-7)


# ------------------------------------------------------------------------------------------------- a real kill -9


LONG = 120


def long_training(root: Path) -> None:
    """A training that saves a checkpoint now and then, and takes itself up from it."""
    if (root / "trained.pt").exists():
        return
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    model = tanh()
    optimizer = AdamW(model.parameters(), lr=0.02, eps=1e-3)
    order, file, begun = torch.Generator().manual_seed(0), root / "checkpoint.pt", None
    if file.exists():
        saved = torch.load(io.BytesIO(file.read_bytes()))
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        order.set_state(saved["order"])
        begun = saved["steps"]
    inputs, targets = data()
    with Recorder(model, optimizer, root / "path", 30_000, resume=begun) as recorder:
        for step in range(begun or 0, LONG):
            ids = torch.randperm(COUNT, generator=order)[:BATCH]
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[ids]), targets[ids]).backward()
            recorder.batch(ids)
            optimizer.step()
            if step % 7 == 6:
                parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "order": order.get_state()}
                torch.save(parts | {"steps": recorder.flush()}, root / "new.pt")
                os.replace(root / "new.pt", file)
    torch.save(model.state_dict(), root / "trained.pt")


def serve() -> None:
    """In a process that has imported all: one more process for each training that is asked for, by folder."""
    AdamW(tanh().parameters())  # imports what torch imports late
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            long_training(Path(line.strip()))
            os._exit(0)
        print(pid, flush=True)
        os.waitpid(pid, 0)
        print("gone", flush=True)


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", "import test_interrupted; test_interrupted.serve()"]
    with subprocess.Popen(
        command, cwd=Path(__file__).parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


def train_for(server: subprocess.Popen[str], folder: Path, patience: float | None) -> bool:
    """Let a training run, for so many seconds at most; whether it was killed."""
    assert server.stdin is not None
    assert server.stdout is not None
    print(folder, file=server.stdin, flush=True)
    pid = int(server.stdout.readline())
    ended, _, _ = select.select([server.stdout], [], [], patience)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    assert server.stdout.readline() == "gone\n"
    return not ended


def test_kill_9_at_random_moments_leaves_the_path_of_one_training(
    server: subprocess.Popen[str], tmp_path: Path
) -> None:
    moments = random.Random(0)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (killed, whole):
        folder.mkdir()
    begun = time.monotonic()
    assert not train_for(server, whole, None)
    duration, kills = time.monotonic() - begun, 0
    for _ in range(12):
        kills += train_for(server, killed, moments.uniform(0.02, 0.2) * duration)
    assert not train_for(server, killed, None)
    assert kills >= 3
    a, b = PathReader(killed / "path"), PathReader(whole / "path")
    assert a.steps == b.steps == LONG
    for s in range(LONG):
        assert torch.equal(a.step(s).batches[0].ids, b.step(s).batches[0].ids)
    common = sorted(set(a.marks) & set(b.marks))
    assert len(common) >= 3
    for mark in common:
        assert torch.equal(a.snapshot(mark).state, b.snapshot(mark).state)
    model = tanh()
    model.load_state_dict(torch.load(killed / "trained.pt"))
    subject = Subject(model.eval(), data(), data(seed=9))
    check_path(a, subject)
    steps, drift = retrace(a, subject, FlatModel(model), a.snapshot(0), a.snapshot(LONG))
    assert drift < 1e-6
    for step in steps:
        if step.index in b.marks:
            assert torch.allclose(step.state, b.snapshot(step.index).state, atol=1e-7)


# --------------------------------------------------------------------------------------------------------- refusals


def begun(root: Path, steps: int = 5) -> tuple[ByHand, int]:
    """A training that was cut off after a flush."""
    loop = ByHand(root)
    loop.steps(steps)
    safe = loop.recorder.flush()
    loop.recorder.release()
    return loop, safe


def files(root: Path) -> dict[Path, bytes]:
    return {file.relative_to(root): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("at", [6, 100, -1])
def test_resuming_behind_what_is_safe_is_refused_and_leaves_the_path_alone(at: int, tmp_path: Path) -> None:
    loop, safe = begun(tmp_path)
    assert safe == 5
    before = files(tmp_path)
    with pytest.raises(PathMismatchError, match=rf"resume={at} must lie on the recorded path, .* holds 5 whole steps"):
        ByHand(tmp_path, model=loop.model, optimizer=loop.optimizer, resume=at)
    assert files(tmp_path) == before


@pytest.mark.parametrize("at", [5, 3])
def test_resuming_with_other_weights_is_refused_and_leaves_the_path_alone(at: int, tmp_path: Path) -> None:
    loop, _ = begun(tmp_path)
    before = files(tmp_path)
    with torch.no_grad():
        loop.model[0].weight[0, 0] += 1e-3
    rule = rf"resume={at} must find the model as it was after {at} steps, its weights differ .*; load the checkpoint"
    with pytest.raises(PathMismatchError, match=rule):
        ByHand(tmp_path, model=loop.model, optimizer=loop.optimizer, resume=at)
    assert files(tmp_path) == before


@pytest.mark.parametrize("other", ["model", "optimizer"])
def test_resuming_with_another_model_or_optimizer_is_refused_and_leaves_the_path_alone(
    other: str, tmp_path: Path
) -> None:
    loop, _ = begun(tmp_path)
    before = files(tmp_path)
    model = normalized() if other == "model" else loop.model
    make = AdamW if other == "optimizer" else SGD
    with pytest.raises(PathMismatchError, match=r"must go on with the model and the optimizer of the path in .*found"):
        ByHand(tmp_path, model=model, optimizer=make(model.parameters(), lr=0.1), resume=5)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("make", "differ"), [(sgd(momentum=0.9), "momentum_buffer"), (AdamW, "exp_avg, exp_avg_sq, step")]
)
def test_resuming_with_an_optimizer_that_was_not_loaded_is_refused_and_leaves_the_path_alone(
    make: Any, differ: str, tmp_path: Path
) -> None:
    """Its momentum would begin anew, and the steps before would be credited as if it went on."""
    loop = ByHand(tmp_path, make)
    loop.steps(3)
    loop.recorder.flush()
    loop.recorder.release()
    before = files(tmp_path)
    with pytest.raises(
        PathMismatchError, match=f"the optimizer as it was after 3 steps, its {differ} differ from what"
    ):
        ByHand(tmp_path, model=loop.model, optimizer=make(loop.model.parameters()), resume=3)
    assert files(tmp_path) == before
    ByHand(tmp_path, model=loop.model, optimizer=loop.optimizer, resume=3).recorder.release()


def test_resuming_where_nothing_is_recorded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PathMismatchError, match=r"has no path\.json"):
        ByHand(tmp_path / "nothing", resume=0)


@pytest.mark.parametrize("at", [6, 4])
@pytest.mark.parametrize("average", [False, True])
def test_a_finished_path_is_kept_and_may_be_made_longer(at: int, average: bool, tmp_path: Path) -> None:
    saved, models = {}, []

    def made(**asked: Any) -> tuple[ByHand, nn.Module | None]:
        model = tanh()
        models.append(AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.6)) if average else None)
        return ByHand(tmp_path, model=model, average=models[-1], **asked), models[-1]

    loop, mean = made()
    for k in range(1, 7):
        loop.step()
        if mean is not None:
            mean.update_parameters(loop.model)
        parts = (loop.model, loop.optimizer, mean)
        saved[k] = [copy.deepcopy(part.state_dict()) for part in parts if part is not None]
    loop.close()
    before = files(tmp_path)
    with pytest.raises(DataError, match="already holds a finished path; name another folder, delete it, or go on with"):
        ByHand(tmp_path)
    assert files(tmp_path) == before
    model = tanh()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.6)) if average else None
    for part, state in zip((model, optimizer, mean), saved[at], strict=False):
        part.load_state_dict(state)
    longer = ByHand(tmp_path, model=model, optimizer=optimizer, average=mean, resume=at)
    longer.states = loop.states[:at]
    with pytest.raises(PathMismatchError, match="must be finished"):
        PathReader(tmp_path)
    for _ in range(3):
        longer.step()
        if mean is not None:
            mean.update_parameters(model)
    path = longer.close()
    subject = longer.subject(model=model if mean is None else mean.module)
    assert path.steps == at + 3
    check_path(path, subject)
    assert_replays(path, subject, longer.states)
    assert_adds_up(account(path, subject))


def test_what_is_kept_is_not_written_anew(tmp_path: Path) -> None:
    """Not even a block of which only the first steps count."""
    loop = ByHand(tmp_path / "path")
    for _ in range(3):
        loop.steps(4)
        loop.recorder.flush()
    loop.recorder.release()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "path").rglob("*") if file.is_file()}
    same = ByHand(tmp_path / "elsewhere")
    same.steps(6)
    same.recorder.release()
    ByHand(tmp_path / "path", model=same.model, optimizer=same.optimizer, resume=6).recorder.release()
    assert all(file.stat().st_mtime_ns == at for file, at in before.items() if file.exists())
    dropped = {file.name.partition(".")[0] for file in before if not file.exists()}
    assert dropped == {"00000008", "00000006-2", "00000009-2", "00000010-2"}


def test_a_training_without_resume_begins_anew(tmp_path: Path) -> None:
    begun(tmp_path, steps=9)
    loop = ByHand(tmp_path)
    loop.steps(3)
    path = loop.close()
    assert path.steps == 3
    assert path.marks == [0, 1, 2, 3]
    assert all(torch.equal(path.snapshot(s).state, loop.states[s]) for s in range(4))


def test_an_interrupted_path_is_not_read(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(PathMismatchError, match=r"must be finished, it has no end\.json; let the training run to"):
        PathReader(tmp_path)


def test_flush_says_how_many_steps_are_safe_and_they_are(tmp_path: Path) -> None:
    loop = ByHand(tmp_path)
    assert loop.recorder.flush() == 0
    for k in range(1, 6):
        loop.step()
        assert loop.recorder.flush() == k
        assert loop.recorder.steps == k
    loop.recorder.release()
    again = ByHand(tmp_path, model=loop.model, optimizer=loop.optimizer, resume=5)
    assert again.recorder.steps == 5
    again.steps(2)
    assert again.close().steps == 7


@pytest.mark.parametrize("kind", ["sgd", "adam", "nadam", "rmsprop", "adagrad", "adadelta"])
def test_every_optimizer_is_taken_up_as_it_was(kind: str, tmp_path: Path) -> None:
    make = {
        "sgd": sgd(momentum=0.9, dampening=0.3),
        "adam": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True),
        "nadam": lambda p: torch.optim.NAdam(p, lr=0.02),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
        "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    }[kind]
    plain = ByHand(tmp_path / "plain", make)
    plain.steps(8)
    expected = plain.close()
    loop = ByHand(tmp_path / "cut", make)
    loop.steps(5)
    parts = [copy.deepcopy(part.state_dict()) for part in (loop.model, loop.optimizer)]
    safe = loop.recorder.flush()
    loop.steps(2)
    loop.recorder.release()
    model = tanh()
    optimizer = make(model.parameters())
    model.load_state_dict(parts[0])
    optimizer.load_state_dict(parts[1])
    again = ByHand(tmp_path / "cut", model=model, optimizer=optimizer, resume=safe)
    again.order = torch.Generator().manual_seed(0)
    for _ in range(5):
        again.draw()
    again.steps(3)
    path = again.close()
    assert path.warnings == expected.warnings
    assert path.marks == expected.marks
    for s in range(9):
        a, b = path.snapshot(s), expected.snapshot(s)
        assert torch.equal(a.state, b.state)
        assert kind == "sgd" or torch.equal(a.counts, b.counts)  # SGD itself does not count
        assert torch.equal(a.extra, b.extra)
        assert a.buffers.keys() == b.buffers.keys()
        assert all(torch.equal(a.buffers[name], b.buffers[name]) for name in a.buffers), s
    for s in range(8):
        assert torch.equal(path.step(s).extra, expected.step(s).extra)

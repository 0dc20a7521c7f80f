"""The recorded path: it equals the training, is whole on disk, replays, and is refused where it does not fit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import BATCH, CASES, COUNT, RECIPES, STEPS, Training, train
from cases import float64 as float64
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from brittle.errors import DamagedFileError, DataError, NotFiniteError, PathMismatchError, UnsupportedError
from brittle.path import recorder as recording
from brittle.path.flat import FlatModel, layout, state_of
from brittle.path.recorder import Recorder
from brittle.path.replay import _run, batch_gradient, check_path, drift_of, replay, walk
from brittle.path.store import PathReader
from brittle.shards import whole
from brittle.subject import Subject

EVERY_OTHER = 3000
"""A budget that keeps a few states of the small cases only."""


# ------------------------------------------------------------------------------------------------- equals the training


@pytest.mark.parametrize("case", CASES)
def test_the_path_is_the_training(case: str, tmp_path: Path) -> None:
    training = train(case, "groups", tmp_path)
    path, seen = training.path, training.seen
    assert path.steps == STEPS
    assert path.marks == list(range(STEPS + 1))
    for s in range(STEPS + 1):
        assert torch.equal(path.snapshot(s).state, reference.flat(seen.state(s), seen))
    for s, step in enumerate(seen.steps):
        assert torch.equal(path.step(s).ids, step.ids)
        assert path.step(s).lr == (0.2, 0.05, 0.1)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("budget", [1 << 30, EVERY_OTHER])
def test_every_optimizer_replays(recipe: str, budget: int, tmp_path: Path) -> None:
    training = train("tanh", recipe, tmp_path, budget=budget)
    check_path(training.path, training.subject)
    states, flat = [], FlatModel(training.subject.model)
    for interval in walk(training.path, training.subject, flat):
        assert interval.drift < 1e-9
        states += interval.states()[:-1]
    states.append(interval.end)
    expected = torch.stack([reference.flat(training.seen.state(s), training.seen) for s in range(STEPS + 1)])
    assert torch.allclose(torch.stack(states), expected, atol=1e-10)
    for s, step in enumerate(training.seen.steps):
        assert training.path.step(s).clip == pytest.approx(step.clip, rel=1e-6)


@pytest.mark.parametrize("case", ["batch norm", "cnn batch norm"])
def test_running_statistics_replay_with_the_weights(case: str, tmp_path: Path) -> None:
    training = train(case, "momentum", tmp_path, budget=EVERY_OTHER)
    check_path(training.path, training.subject)
    assert len(training.path.marks) < STEPS
    flat = FlatModel(training.subject.model)
    steps = [step for interval in walk(training.path, training.subject, flat) for step in interval.steps]
    for step in steps:
        before = training.seen.steps[step.index].before
        assert torch.allclose(step.state, reference.flat(before, training.seen), atol=1e-10)


@pytest.mark.parametrize("recipe", ["momentum l2", "nesterov l2", "adamw", "groups", "one cycle adam"])
def test_replayed_steps_are_the_trainings_to_the_last_bit(recipe: str, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    training = train("cnn batch norm", recipe, tmp_path, budget=3000)
    [(start, stop), *_] = pairwise(training.path.marks)
    assert stop - start >= 8
    interval = replay(training.path, training.subject, FlatModel(training.subject.model), start, stop)
    for step in interval.steps:
        assert torch.equal(step.state, reference.flat(training.seen.state(step.index), training.seen))
    assert interval.drift == 0


def test_noise_that_adam_blows_up_on_another_machine_is_no_drift(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bias before the normalization has no gradient but for rounding, and Adam moves it all the same."""
    training = train(
        "batch norm", replace(RECIPES["adamw"], optimizer=lambda m: AdamW(m.parameters(), eps=1e-16)), tmp_path
    )
    generator = torch.Generator().manual_seed(0)

    def elsewhere(subject: Subject, flat: FlatModel, ids: Tensor) -> Tensor:
        gradient = batch_gradient(subject, flat, ids)
        return gradient + 1e-12 * gradient.abs().max() * torch.randn(gradient.shape, generator=generator)

    path, flat = training.path, FlatModel(training.subject.model)
    monkeypatch.setattr("brittle.path.replay.batch_gradient", elsewhere)
    check_path(path, training.subject)
    states = [path.snapshot(s).state for s in (0, 1)]
    _, reached = _run(path, training.subject, flat, path.snapshot(0), 1)
    assert drift_of(states[0], reached, states[1], flat.parameters) > 0.05, "it would count otherwise"


def test_the_walk_back_is_the_walk_reversed(tmp_path: Path) -> None:
    training = train("tanh", "adam", tmp_path, budget=EVERY_OTHER)
    forth, back = (
        list(walk(training.path, training.subject, FlatModel(training.subject.model), reverse=reverse))
        for reverse in (False, True)
    )
    assert [i.steps[0].index for i in forth] == [i.steps[0].index for i in back[::-1]]
    for a, b in zip(forth, back[::-1], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.states(), b.states(), strict=True))


def test_recording_does_not_change_the_training(tmp_path: Path) -> None:
    case, ends = CASES["cnn batch norm"], []
    for record in (False, True):
        model = case.model()
        optimizer = AdamW(model.parameters(), lr=0.05)
        inputs, targets = case.data(COUNT, seed=0)
        recorder = Recorder(model, optimizer, tmp_path) if record else None
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            if recorder:
                recorder.batch(range(COUNT))
            optimizer.step()
        ends.append(state_of(model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("budget", [2000, 5000, 20_000])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_thinned_states_keep_to_the_budget_and_both_ends(steps: int, budget: int, tmp_path: Path) -> None:
    training = train("tanh", "momentum", tmp_path, steps=steps, budget=budget)
    marks, size = training.path.marks, training.path.snapshot(0).nbytes
    assert (marks[0], marks[-1]) == (0, steps)
    gaps = torch.tensor(marks).diff()
    if len(gaps) > 1:
        assert (gaps[:-1] == gaps[0]).all(), "as many steps between any two states"
        assert int(gaps[0]).bit_count() == 1, "a power of two"
    assert (len(marks) - 1) * size <= max(budget, 2 * size)
    assert [training.path.step(s).ids.tolist() for s in range(steps)] == [s.ids.tolist() for s in training.seen.steps]


def test_blocks_are_written_after_some_time_whatever_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "BLOCK_SECONDS", 0.0)
    training = train("tanh", "momentum", tmp_path, budget=EVERY_OTHER)
    assert len(list((tmp_path / "blocks").glob("*.safetensors"))) == STEPS + 1
    assert len(training.path.marks) < STEPS / 2
    check_path(training.path, training.subject)


def test_settings_are_noted_step_by_step(tmp_path: Path) -> None:
    training = train("tanh", "one cycle", tmp_path)
    for s, step in enumerate(training.seen.steps):
        held = next(iter(step.settings.values()))
        [settings] = training.path.recipe(s).settings
        assert training.path.step(s).lr == (pytest.approx(held["lr"]),)
        assert settings["momentum"] == pytest.approx(held["momentum"])
    assert len({step.settings["0.weight"]["momentum"] for step in training.seen.steps}) > 5


# ------------------------------------------------------------------------------------------------------------ the files

SCRIPT = """
import sys, time, torch, torch.nn.functional as F
from brittle.path import recorder as recording
recording.BLOCK_SECONDS = 0.0
model = torch.nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
recorder = recording.Recorder(model, optimizer, sys.argv[1])
x, y = torch.rand(6, 4), torch.arange(6) % 3
while True:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    recorder.batch(range(6))
    optimizer.step()
"""


def test_a_training_that_is_killed_leaves_whole_blocks_and_an_unfinished_path(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        until = time.monotonic() + 60
        while len(list((tmp_path / "blocks").glob("*.sha256"))) < 5 and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    blocks = sorted((tmp_path / "blocks").glob("*.safetensors"))
    assert len(blocks) >= 5
    assert all(whole(block) for block in blocks[:-1]), "only the last may lack its checksum"
    with pytest.raises(PathMismatchError, match=r"must be finished, it has no end\.json; let the training run"):
        PathReader(tmp_path)
    training = train("tanh", "momentum", tmp_path)  # the next one begins anew
    assert training.path.marks == list(range(STEPS + 1))


def damaged(root: Path, damage: Callable[[Path], None], pattern: str) -> None:
    damage(sorted(root.glob(pattern))[0])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a flipped bit": flip,
    "a cut": lambda file: os.truncate(file, file.stat().st_size - 1),
    "nothing left": lambda file: os.truncate(file, 0),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pattern", ["blocks/0*4.safetensors", "blocks/0*0.safetensors", "blocks/0*12.safetensors"])
def test_a_damaged_block_is_found_when_the_path_is_opened(
    damage: str, pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "BLOCK_BYTES", 1000)
    train("tanh", "momentum", tmp_path)
    assert PathReader(tmp_path).steps == STEPS
    damaged(tmp_path, DAMAGES[damage], pattern)
    with pytest.raises(DamagedFileError, match=str(tmp_path)):
        PathReader(tmp_path)


@pytest.mark.parametrize("damage", list(DAMAGES)[:3])
@pytest.mark.parametrize("file", ["path.json", "end.json"])
def test_a_damaged_document_is_found(damage: str, file: str, tmp_path: Path) -> None:
    train("tanh", "momentum", tmp_path)
    damaged(tmp_path, DAMAGES[damage], file)
    with pytest.raises(DamagedFileError, match=file):
        PathReader(tmp_path)


def test_what_is_no_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PathMismatchError, match=r"must name a folder that a Recorder wrote, .* has no path\.json"):
        PathReader(tmp_path)


def test_a_path_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train("tanh", "momentum", tmp_path)
    monkeypatch.setattr("brittle.path.store.FORMAT", 2)
    with pytest.raises(PathMismatchError, match="has format 1, this version reads 2; record it again"):
        PathReader(tmp_path)


def test_a_finished_path_is_not_overwritten(tmp_path: Path) -> None:
    train("tanh", "momentum", tmp_path)
    before = (tmp_path / "path.json").read_bytes()
    with pytest.raises(DataError, match="already holds a finished path; name another folder or delete it"):
        train("cnn", "momentum", tmp_path)
    assert (tmp_path / "path.json").read_bytes() == before


def test_the_header_says_which_group_moves_which_tensor(tmp_path: Path) -> None:
    train("batch norm", "frozen", tmp_path)
    header = json.loads((tmp_path / "path.json").read_text())
    owners = dict(zip([name for name, _, _ in header["slots"]], header["owner"], strict=True))
    assert owners["0.weight"] == -1, "frozen"
    assert owners["3.bias"] == -1, "outside the optimizer"
    assert owners["1.running_mean"] == -1, "a statistic"
    assert owners["3.weight"] == 0


# --------------------------------------------------------------------------------------------- another model's training


def other(training: Training, **changes: Any) -> Subject:
    """The same subject but for some fields."""
    fields = {name: getattr(training.subject, name) for name in ("model", "train", "test", "path", "loss")} | changes
    return Subject(**fields)


def permuted(training: Training) -> tuple[Tensor, Tensor]:
    order = torch.arange(COUNT).roll(1)
    return training.seen.inputs[order], training.seen.targets[order]


MISMATCHES: dict[str, Callable[[Training], dict[str, Any]]] = {
    "other data": lambda t: {"train": CASES["tanh"].data(COUNT, seed=9)},
    "other order": lambda t: {"train": permuted(t)},
    "other labels": lambda t: {"train": (t.seen.inputs, (t.seen.targets + 1) % 3)},
    "other loss": lambda t: {"loss": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1)},
    "a sum for a mean": lambda t: {"loss": lambda z, y: F.cross_entropy(z, y, reduction="sum")},
    "other normalization": lambda t: {"normalize": (0.1, 0.9)},
}


@pytest.mark.parametrize("difference", MISMATCHES)
@pytest.mark.parametrize("budget", [1 << 30, EVERY_OTHER])
def test_a_path_of_another_training_is_refused_with_the_remedy(difference: str, budget: int, tmp_path: Path) -> None:
    training = train("tanh", "momentum", tmp_path, budget=budget)
    subject = other(training, **MISMATCHES[difference](training))
    with pytest.raises(PathMismatchError, match=r"the training data, their order \(ids\), the loss or the norm"):
        check_path(training.path, subject)
    longest = max(pairwise(training.path.marks), key=lambda pair: pair[1] - pair[0])
    if longest[1] - longest[0] > 1:
        with pytest.raises(PathMismatchError, match=f"must replay: from step {longest[0]} to {longest[1]}"):
            replay(training.path, subject, FlatModel(subject.model), *longest)


def test_fewer_examples_than_the_path_names_are_refused(tmp_path: Path) -> None:
    training = train("tanh", "momentum", tmp_path)
    subject = other(training, train=training.subject.train[: COUNT // 2])
    with pytest.raises(PathMismatchError, match=r"positions in the 5 training examples, it names 9; pass the data"):
        check_path(training.path, subject)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    training = train("tanh", "momentum", tmp_path)
    wider = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    with pytest.raises(PathMismatchError, match=r"recorded with 4 tensors.*; audit it with the model it was recorded"):
        check_path(training.path, other(training, model=wider))


def test_other_final_weights_are_refused(tmp_path: Path) -> None:
    training = train("tanh", "momentum", tmp_path)
    with torch.no_grad():
        training.subject.model[2].bias[1] += 0.01
    with pytest.raises(
        PathMismatchError, match=r"must end at the audited weights, they differ by up to 0\.01; load the"
    ):
        check_path(training.path, training.subject)


def test_training_that_moves_weights_besides_the_optimizer_is_refused(tmp_path: Path) -> None:
    case = CASES["tanh"]
    model, (inputs, targets) = case.model(), case.data(COUNT, seed=0)
    optimizer = SGD(model.parameters(), lr=0.1)
    with Recorder(model, optimizer, tmp_path) as recorder:
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            recorder.batch(range(COUNT))
            optimizer.step()
            with torch.no_grad():
                model[0].weight.clamp_(-0.1, 0.1)
    subject = Subject(model.eval(), (inputs, targets), (inputs, targets), path=tmp_path)
    with pytest.raises(PathMismatchError, match="recomputing step 0 must reproduce the recorded weights"):
        check_path(PathReader(tmp_path), subject)


def test_weights_rounded_to_single_precision_still_belong_to_the_path(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    training = train("cnn batch norm", "cosine", tmp_path, budget=EVERY_OTHER)
    check_path(training.path, training.subject)
    torch.set_default_dtype(torch.float64)
    double = Subject(training.subject.model.double(), training.subject.train, training.subject.test, path=tmp_path)
    check_path(training.path, double)


def test_drift_is_the_larger_of_weights_and_statistics_beyond_rounding() -> None:
    before, after = torch.zeros(4), torch.tensor([1.0, 0.0, 100.0, 0.0])
    off = torch.tensor([0.0, 0.1, 0.0, 0.0])
    assert drift_of(before, after + off, after, 2) == pytest.approx(0.1)
    assert drift_of(before, after + off, after, 4) == pytest.approx(0.001, rel=1e-3)
    assert drift_of(before, after + off.roll(2), after, 2) == pytest.approx(0.001)
    assert drift_of(after, after, after, 2) == 0
    tiny = torch.tensor([1e-17, 0.0, 0.0, 0.0])
    assert drift_of(after, after + tiny, after, 2) == 0, "a step shorter than rounding cannot be told apart"
    assert not drift_of(before, after * torch.nan, after, 2) <= 1e9
    noise = torch.tensor([False, True, False, False])
    assert drift_of(before, after + off, after, 2, noise) == 0


# ------------------------------------------------------------------------------------------------------------ refusals


class Loop:
    """A little training loop with one thing changed."""

    def __init__(self, root: Path, optimizer: Callable[..., Optimizer] = SGD, model: nn.Module | None = None) -> None:
        self.model = CASES["batch norm"].model() if model is None else model
        self.inputs, self.targets = CASES["batch norm"].data(COUNT, seed=0)
        self.optimizer = optimizer(self.model.parameters(), lr=0.1)
        self.recorder = Recorder(self.model, self.optimizer, root)

    def backward(self, zero: bool = True) -> None:
        if zero:
            self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.inputs[:BATCH]), self.targets[:BATCH]).backward()

    def step(self, between: Callable[[], object] = lambda: None, **how: Any) -> None:
        self.backward(**how)
        between()
        self.recorder.batch(range(BATCH))
        self.optimizer.step()


def named(model: nn.Module, name: str) -> nn.Parameter:
    return dict(model.named_parameters())[name]


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (lambda: nn.Dropout(0.3), r"1 has p=0\.3; set it to 0"),
        (lambda: nn.AlphaDropout(0.1), r"1 has p=0\.1"),
        (lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.2), r"1\.self_attn has p=0\.2"),
        (lambda: nn.LSTM(4, 4, num_layers=2, dropout=0.4), r"1 has p=0\.4"),
        (nn.RReLU, "draw random numbers cannot be replayed, 1 is RReLU"),
        (lambda: nn.BatchNorm1d(4, momentum=None), r"1 has momentum=None; set it to 0\.1"),
        (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), "spectral normalization does it in 1"),
    ],
)
def test_modules_that_cannot_be_replayed_are_refused_by_name(
    layer: Callable[[], nn.Module], found: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer())
    with pytest.raises(UnsupportedError, match=found) as caught:
        Recorder(model, SGD(model.parameters(), lr=0.1), tmp_path)
    assert "without a path" in str(caught.value)
    assert not list(tmp_path.iterdir()), "nothing is begun"


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (RMSprop, "found RMSprop"),
        (lambda p, lr: Adam(p, lr, amsgrad=True), "amsgrad"),
        (torch.optim.Adagrad, "Adagrad"),
    ],
)
def test_optimizers_that_are_not_known_are_refused(make: Any, found: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=found):
        Loop(tmp_path, make)


def test_a_training_that_has_begun_is_refused(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "first", lambda p, lr: SGD(p, lr, momentum=0.9))
    loop.step()
    with pytest.raises(UnsupportedError, match="must begin with the optimizer's first step"):
        Recorder(loop.model, loop.optimizer, tmp_path / "second")


def test_parameters_of_another_model_are_refused(tmp_path: Path) -> None:
    model, stranger = nn.Linear(4, 3), nn.Linear(4, 3)
    with pytest.raises(UnsupportedError, match="the model's own parameters only"):
        Recorder(model, SGD([*model.parameters(), *stranger.parameters()], lr=0.1), tmp_path)


def test_a_step_without_its_ids_is_refused(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.step()
    loop.backward()
    with pytest.raises(DataError, match=r"call recorder\.batch\(ids\) before every optimizer\.step\(\)"):
        loop.optimizer.step()


@pytest.mark.parametrize("ids", [[], [0, -1], torch.tensor([-3])])
def test_ids_are_positions(ids: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="positions of the batch's examples, counted from 0"):
        Loop(tmp_path).recorder.batch(ids)


def test_accumulation_is_refused_where_both_batches_are_told(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.recorder.batch(range(BATCH))
    with pytest.raises(UnsupportedError, match="gradient accumulation cannot be accounted for yet"):
        loop.recorder.batch(range(BATCH))


def test_accumulation_is_refused_where_only_one_batch_is_told(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.inputs = loop.inputs.roll(1, 0)
    with pytest.raises(UnsupportedError, match=r"one factor .* gradient accumulation"):
        loop.step(between=lambda: (setattr(loop, "inputs", loop.inputs.roll(2, 0)), loop.backward(zero=False)))


def test_gradients_that_are_never_zeroed_are_refused(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.step()
    with pytest.raises(UnsupportedError, match="gradient accumulation"):
        loop.step(zero=False)


def test_clipping_by_value_is_refused(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    with pytest.raises(UnsupportedError, match=r"one factor .* found factors from .* clipping by value"):
        loop.step(between=lambda: nn.utils.clip_grad_value_(loop.model.parameters(), 0.01))


def test_clipping_each_tensor_by_its_own_norm_is_refused(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    with pytest.raises(UnsupportedError, match="one factor"):
        loop.step(between=lambda: [nn.utils.clip_grad_norm_([p], 0.01) for p in loop.model.parameters()])


def test_clipping_a_single_tensor_by_value_is_refused(tmp_path: Path) -> None:
    loop = Loop(tmp_path, model=nn.Linear(4, 3, bias=False))
    with pytest.raises(UnsupportedError, match="one factor"):
        loop.step(between=lambda: nn.utils.clip_grad_value_(loop.model.parameters(), 0.05))


def test_clipping_by_norm_is_one_factor_even_when_it_does_nothing(tmp_path: Path) -> None:
    loop, norms = Loop(tmp_path), []
    for limit in (1e9, 0.1, 1e9):
        loop.step(between=lambda limit=limit: norms.append(nn.utils.clip_grad_norm_(loop.model.parameters(), limit)))
    loop.recorder.close()
    path = PathReader(tmp_path)
    assert [path.step(s).clip for s in (0, 2)] == [1.0, 1.0]
    assert path.step(1).clip == pytest.approx(0.1 / (norms[1].item() + 1e-6), rel=1e-9)


def test_a_step_that_was_skipped_leaves_no_trace(tmp_path: Path) -> None:
    """A loop that leaves out a step, as a gradient scaler does, and goes on with the next batch."""
    loop = Loop(tmp_path)
    loop.backward()
    loop.step()
    loop.recorder.close()
    assert PathReader(tmp_path).steps == 1


def test_a_parameter_without_a_gradient_is_refused_by_name(tmp_path: Path) -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(UnsupportedError, match=r"spare\.weight has none; freeze it with requires_grad_\(False\)"):
        Loop(tmp_path, model=Spare()).step()


def test_sparse_gradients_are_refused_by_name(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(6, 5, sparse=True), nn.Flatten(), nn.Linear(20, 3))
    loop = Loop(tmp_path, model=model)
    loop.inputs = (loop.inputs * 5.99).long()
    with pytest.raises(UnsupportedError, match=r"sparse gradients .* 0\.weight; use sparse=False"):
        loop.step()


def test_gradients_and_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    with pytest.raises(NotFiniteError, match="gradients must be finite, found NaN"):
        loop.step(between=lambda: named(loop.model, "0.bias").grad.fill_(torch.nan))
    with torch.no_grad():
        named(loop.model, "0.bias").fill_(torch.inf)
    loop.recorder._ids = None
    with pytest.raises(NotFiniteError, match="weights must be finite, found NaN or infinity before step 0"):
        loop.step()


def test_layers_frozen_in_mid_training_are_refused_by_name(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.step()
    named(loop.model, "0.weight").requires_grad_(False)
    with pytest.raises(UnsupportedError, match=r"may not change in mid-training .* 0\.weight before step 1"):
        loop.step()


def test_groups_added_in_mid_training_are_refused(tmp_path: Path) -> None:
    model = CASES["batch norm"].model()
    loop = Loop(tmp_path, lambda p, lr: SGD(list(p)[:-1], lr), model)
    loop.step()
    loop.optimizer.add_param_group({"params": [named(model, "3.bias")]})
    with pytest.raises(UnsupportedError, match=r"may not change in mid-training .* 3\.bias before step 1"):
        loop.step()


def test_momentum_switched_on_is_refused(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.step()
    loop.optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(UnsupportedError, match="momentum may not be switched on or off"):
        loop.step()


def test_normalization_in_evaluation_mode_is_refused_by_name(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.step()
    loop.model[1].eval()
    with pytest.raises(UnsupportedError, match=r"1 is in evaluation mode; call model\.train\(\) before the step"):
        loop.step()


def test_a_closure_is_refused(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.backward()
    loop.recorder.batch(range(BATCH))
    with pytest.raises(UnsupportedError, match=r"optimizer\.step\(closure\) cannot be recorded"):
        loop.optimizer.step(lambda: torch.tensor(0.0))


def test_a_path_without_a_step_is_refused(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    with pytest.raises(DataError, match="needs at least one optimizer"):
        loop.recorder.close()


def test_an_interrupted_recording_lets_the_optimizer_go(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.step()
    loop.recorder.__exit__(KeyboardInterrupt, None, None)
    loop.backward()
    loop.optimizer.step()  # without ids
    assert not (tmp_path / "end.json").exists()


def test_closing_twice_is_closing_once(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    with loop.recorder:
        loop.step()
        loop.recorder.close()
    assert PathReader(tmp_path).steps == 1


# ------------------------------------------------------------------------------------------------------- the flat model


@pytest.mark.parametrize("case", CASES)
def test_a_flat_model_is_the_model_at_any_point(case: str) -> None:
    model = CASES[case].model().eval()
    flat = FlatModel(model)
    inputs, _ = CASES[case].data(3, seed=1)
    assert torch.allclose(reference.logits_in(flat.eval()(inputs)), reference.logits_in(model(inputs)))
    assert len(flat) == sum(slot.shape.numel() for slot in layout(model))
    point = state_of(model) + 0.1 * torch.rand(len(flat))
    flat.load(point)
    assert torch.equal(state_of(flat.model), point)
    with torch.no_grad():
        for slot in layout(model):
            tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            tensors[slot.name].copy_(point[slot.start : slot.stop].view(slot.shape))
    assert torch.allclose(reference.logits_in(flat.eval()(inputs)), reference.logits_in(model(inputs)))


def test_tied_tensors_move_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
            self.second.weight = self.first.weight
            self.second.running_mean = self.first.running_mean

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    flat = FlatModel(Tied().eval())
    assert [slot.name for slot in flat.slots if "second" in slot.name] == ["second.bias", "second.running_var"]
    flat.load(torch.rand(len(flat)))
    assert torch.equal(flat.model.first.weight, flat.model.second.weight)
    assert torch.equal(flat.model.first.running_mean, flat.model.second.running_mean)
    assert flat.columns["second.weight"] == flat.columns["first.weight"]


def test_the_plain_gradient_leaves_no_trace() -> None:
    flat = FlatModel(CASES["batch norm"].model())
    inputs, targets = CASES["batch norm"].data(4, seed=1)
    found = flat.gradient(lambda: F.cross_entropy(flat.train()(inputs), targets))
    assert found.shape == (len(flat),)
    assert (found[flat.parameters :] == 0).all()
    assert not any(p.requires_grad or p.grad is not None for p in flat.model.parameters())


def test_a_recipe_without_momentum_needs_no_buffer(tmp_path: Path) -> None:
    training = train("tanh", replace(RECIPES["sgd"], clip=0.5), tmp_path)
    assert (training.path.snapshot(5).buffers["momentum_buffer"] == 0).all()

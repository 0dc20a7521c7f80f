"""What a forward pass is repeated from: random state, precision, modules at rest, and what came in."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_hand import ByHand, account, assert_adds_up, assert_recorded, data, normalized, seeded, sgd, tanh
from cases import float64 as float64
from torch import Tensor, nn

from brittle.path.flat import FlatModel, state_of, statistics_of
from brittle.path.forwards import ForwardWatch, described, random_state, repeated
from brittle.path.match import check_path
from brittle.path.observed import AUTOCAST, Batch
from brittle.path.rerun import batch_gradient, training_loss
from brittle.path.store import PathReader
from brittle.path.training import counts_batches


def dropped(*more: nn.Module) -> nn.Sequential:
    """A network that draws random numbers in training."""
    return seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3), *more))


# ---------------------------------------------------------------------------------------------------- random numbers


def test_dropout_is_drawn_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    loop = ByHand(tmp_path, model=dropped())
    loop.steps(6)
    path = assert_recorded(loop)
    assert all(path.step(s).batches[0].random is not None for s in range(6))


def test_another_random_state_is_another_training(tmp_path: Path) -> None:
    """Without the noted state the replay would end elsewhere: it is what makes the test above true."""
    torch.manual_seed(0)
    loop = ByHand(tmp_path, model=dropped())
    loop.steps(1)
    [batch] = loop.close().step(0).batches
    subject = loop.subject()
    flat = FlatModel(subject.model)
    flat.load(loop.states[0])
    first, again = (batch_gradient(subject, flat, batch) for _ in range(2))
    assert torch.equal(first, again)
    other = Batch(batch.ids, random=torch.manual_seed(7).get_state())
    assert (batch_gradient(subject, flat, other) - first).norm() > 0.1 * first.norm()


def test_random_state_is_kept_only_where_a_pass_drew_numbers(tmp_path: Path) -> None:
    model = dropped()
    loop = ByHand(tmp_path, model=model)
    for probability in (0.4, 0.0, 0.4):
        model[2].p = probability
        loop.step()
    model[2].eval()
    loop.step()
    torch.rand(3)  # between passes
    loop.step()
    loop.recorder.close()
    path = PathReader(tmp_path)
    kept = [path.step(s).batches[0].random for s in range(5)]
    assert [random is not None for random in kept] == [True, False, True, False, False]


def test_a_pass_is_repeated_with_the_numbers_that_it_drew_and_the_world_outside_does_not_notice() -> None:
    torch.manual_seed(3)
    before = random_state(torch.device("cpu"))
    drawn = torch.rand(4)
    world = torch.get_rng_state()
    with repeated(before, torch.device("cpu")):
        assert torch.equal(torch.rand(4), drawn)
    assert torch.equal(torch.get_rng_state(), world)
    with repeated(None, torch.device("cpu")):
        torch.rand(4)
    assert not torch.equal(torch.get_rng_state(), world)


def test_replaying_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    loop = ByHand(tmp_path, model=dropped())
    loop.steps(3)
    path, subject = loop.close(), loop.subject()
    before = torch.get_rng_state()
    check_path(path, subject)
    account(path, subject)
    assert torch.equal(torch.get_rng_state(), before)


class Noisy(nn.Module):
    """Draws numbers by a module of its own, and in evaluation mode not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(torch.tanh(h + 0.3 * torch.randn_like(h) * self.training))


@pytest.mark.parametrize("build", [Noisy, lambda: nn.Sequential(nn.Linear(4, 5), nn.RReLU(), nn.Linear(5, 3))])
def test_any_random_numbers_of_torchs_generator_are_drawn_again(build: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    loop = ByHand(tmp_path, model=build())
    loop.steps(4)
    path, subject = loop.close(), loop.subject()
    check_path(path, subject)
    assert_adds_up(account(path, subject), residual=1)


def test_dropout_under_accumulation_is_drawn_pass_by_pass(tmp_path: Path) -> None:
    torch.manual_seed(0)
    loop = ByHand(tmp_path, model=dropped(nn.Dropout(0.2)))
    for _ in range(4):
        loop.optimizer.zero_grad()
        for _ in range(3):
            loop.backward(part=1 / 3)
        loop.spend()
    path = assert_recorded(loop)
    states = [batch.random for batch in path.step(0).batches]
    assert not torch.equal(states[0], states[1])


# ------------------------------------------------------------------------------------------------- modules at rest


def test_modules_at_rest_are_at_rest_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = seeded(lambda: nn.Sequential(*normalized(), nn.Dropout(0.3), nn.Sequential(nn.Tanh(), nn.Dropout(0.3))))
    loop = ByHand(tmp_path, model=model)
    loop.steps(2)
    model[1].eval()  # its statistics now count as in evaluation mode
    loop.steps(2)
    model[5].eval()
    loop.steps(2)
    model.train()
    loop.steps(1)
    path = assert_recorded(loop)
    rest = [path.step(s).manner.resting for s in (0, 2, 4, 6)]
    assert rest == [(), ("1",), ("1", "5", "5.0", "5.1"), ()]


def test_a_model_that_is_trained_in_evaluation_mode_is_replayed_in_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    loop = ByHand(tmp_path, model=dropped())
    loop.model.eval()
    loop.steps(3)
    path = assert_recorded(loop)
    assert "" in path.step(0).manner.resting


def test_running_statistics_that_forward_passes_besides_moved_are_kept(tmp_path: Path) -> None:
    """Where a step's own passes alone moved them a replay finds them, and they are not kept."""
    loop = ByHand(tmp_path, model=normalized())
    for k in range(6):
        loop.step()
        if k == 2:
            with torch.no_grad():
                loop.model(loop.inputs)
        if k == 4:
            loop.model(loop.inputs)  # with gradients that nobody takes
    path = assert_recorded(loop)
    assert [path.step(s).statistics is not None for s in range(6)] == [False, False, False, True, False, True]


def test_normalization_that_counts_its_batches_is_recorded(tmp_path: Path) -> None:
    """With momentum=None the running mean is over all batches so far, and the number of these is no part of a state."""
    model = normalized()
    model[1].momentum = None
    loop = ByHand(tmp_path, model=model)
    assert counts_batches(model)
    assert not counts_batches(normalized())
    loop.steps(5)
    path = assert_recorded(loop, residual=0.1)  # the first step takes the statistics all the way
    assert torch.equal(path.snapshot(5).state[-10:], statistics_of(model))


def test_evaluation_in_between_does_not_disturb(tmp_path: Path) -> None:
    states = []
    for disturbed in (False, True):
        torch.manual_seed(0)
        loop = ByHand(tmp_path / str(disturbed), model=seeded(lambda: nn.Sequential(*normalized(), nn.Dropout(0.2))))
        for _ in range(4):
            loop.step()
            if disturbed:
                with torch.no_grad():
                    loop.model.eval()(loop.inputs)
                with torch.inference_mode():
                    loop.model(loop.inputs)
                loop.model(loop.inputs).sum()
                loop.model.train()
        path = assert_recorded(loop)
        states.append([path.snapshot(s).state for s in range(5)])
        assert all(path.step(s).statistics is None for s in range(4))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_recording_does_not_change_the_training(tmp_path: Path) -> None:
    ends = []
    for record in (False, True):
        torch.manual_seed(0)
        loop = ByHand(tmp_path / str(record), model=seeded(lambda: nn.Sequential(*normalized(), nn.Dropout(0.2))))
        if not record:
            loop.recorder.release()
        for _ in range(4):
            loop.optimizer.zero_grad()
            loop.backward()
            loop.optimizer.step()
        ends.append(state_of(loop.model))
    assert torch.equal(*ends)


# -------------------------------------------------------------------------------------------------------- precision


def test_half_precision_is_taken_again(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    loop = ByHand(tmp_path, sgd(0.5), tanh())
    for k in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=k != 2):
            loss = F.cross_entropy(loop.model(loop.inputs), loop.targets)
        loop.optimizer.zero_grad()
        loss.backward()
        loop.recorder.batch(range(10))
        loop.spend()
    path, subject = loop.close(), loop.subject()
    check_path(path, subject)
    assert path.autocast
    kinds = [AUTOCAST[path.step(s).batches[0].autocast] for s in range(4)]
    assert kinds == [torch.bfloat16, torch.bfloat16, None, torch.bfloat16]
    flat = FlatModel(subject.model)
    flat.load(path.snapshot(0).state)
    [batch] = path.step(0).batches
    exact = batch_gradient(subject, flat, Batch(batch.ids))
    rounded = batch_gradient(subject, flat, batch)
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.05
    ledger = account(path, subject)
    assert torch.allclose(ledger.total(), ledger.output, atol=1e-5)
    learned = (ledger.output - ledger.start).abs().mean()
    assert ledger.unexplained.abs().max() < 0.05 * learned


def test_a_training_without_autocast_says_so(tmp_path: Path) -> None:
    loop = ByHand(tmp_path)
    loop.step()
    assert not loop.close().autocast


# ------------------------------------------------------------------------------------------------------ what came in


def test_a_batch_is_described_by_three_numbers_that_tell_order_and_scale() -> None:
    x = torch.rand(6, 2, 3, generator=torch.Generator().manual_seed(0))
    mean, root, ordered = described([torch.arange(6), x])
    assert mean == pytest.approx(x.mean().item())
    assert root == pytest.approx(x.square().mean().sqrt().item())
    assert ordered == pytest.approx((x.flatten() * torch.linspace(0, 1, 36)).mean().item())
    for axis in (0, 1, 2):
        turned = described([x.flip(axis)])
        assert turned[:2] == pytest.approx((mean, root))
        assert abs(turned[2] - ordered) > 1e-3 * root, "examples, channels or pixels in another order"
    assert all(map(math.isnan, described([torch.arange(6)]))), "token ids are not described"
    assert all(map(math.isnan, described([])))
    half = described([x.to(torch.bfloat16)])
    assert half == pytest.approx((mean, root, ordered), rel=1e-2)


def test_a_watch_notes_the_last_pass_that_can_be_trained_from_and_counts_those_in_training_mode() -> None:
    model, entered = normalized(), []
    watch = ForwardWatch(model, lambda: entered.append(1))
    x, _ = data()
    assert (watch.last, watch.count) == (None, 0)
    model(x)
    assert watch.last is not None
    assert (watch.last.rows, watch.count, watch.last.resting) == (10, 1, ())
    model[1].eval()
    model(input=x[:3])
    assert (watch.last.rows, watch.count, watch.last.resting) == (3, 2, ("1",))
    first = watch.last
    with torch.no_grad():
        model(x)
    assert watch.last is first
    assert watch.count == 3, "it moved running statistics"
    model.eval()(x)
    assert (watch.last.rows, watch.count) == (10, 3)
    assert len(entered) == 3
    watch.forget()
    assert (watch.last, watch.count) == (None, 0)
    model.train()(x)
    watch.close()
    model(x)
    assert (watch.count, len(entered)) == (1, 4)


def test_a_replayed_pass_moves_the_running_statistics_as_the_first_did(tmp_path: Path) -> None:
    loop = ByHand(tmp_path, model=normalized())
    loop.steps(1)
    path, subject = loop.close(), loop.subject()
    flat = FlatModel(subject.model)
    flat.load(path.snapshot(0).state)
    training_loss(subject, flat, path.step(0).batches[0])
    assert torch.equal(flat.state[flat.parameters :], path.snapshot(1).state[flat.parameters :])

"""The recorded path: it equals the training, replays to the last bit, and is found out where it does not."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import reference
import torch
import torch.nn.functional as F
from by_hand import ByHand, assert_replays, data, normalized
from cases import CASES, RECIPES, STEPS, train
from cases import float64 as float64
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import AdamW

from brittle.errors import PathMismatchError
from brittle.path.flat import FlatModel, layout, parameters_of, state_of, statistics_of
from brittle.path.match import check_path
from brittle.path.observed import Batch, Manner, Step
from brittle.path.recipe import Recipe
from brittle.path.replay import clipped, drift_of, intervals, known, replay, retrace, walk
from brittle.path.rerun import batch_gradient
from brittle.path.walked import plain_share, share_of
from brittle.subject import Subject

FEW_STATES = 3000
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
        [batch] = path.step(s).batches
        assert torch.equal(batch.ids, step.ids)
        assert path.step(s).lr == (0.2, 0.05, 0.1)


EXACT = ["momentum l2", "nesterov l2", "adamw", "groups", "one cycle adam", "nadam l2", "adagrad l2", "radam l2"]
EXACT += ["adamax l2", "rmsprop centered momentum", "amsgrad"]


@pytest.mark.parametrize("recipe", EXACT)
def test_replayed_steps_are_the_trainings_to_the_last_bit(recipe: str, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    training = train("cnn batch norm", recipe, tmp_path, budget=FEW_STATES)
    [(start, stop), *_] = pairwise(training.path.marks)
    assert stop - start >= 8
    interval = replay(training.path, training.subject, FlatModel(training.subject.model), start, stop)
    for step in interval.steps:
        assert torch.equal(step.state, reference.flat(training.seen.state(step.index), training.seen))
    assert interval.drift == 0


def test_running_statistics_replay_with_the_weights(tmp_path: Path) -> None:
    loop = ByHand(tmp_path, model=normalized(), budget=FEW_STATES)
    loop.steps(12)
    path, subject = loop.close(), loop.subject()
    assert len(path.marks) < 12
    flat = FlatModel(subject.model)
    steps = [step for interval in walk(path, subject, flat) for step in interval.steps]
    assert len(steps) == 12
    for step in steps:
        own = step.state[flat.parameters :]
        assert torch.allclose(own, _statistics_before(loop, step.index), atol=1e-12)


def _statistics_before(loop: ByHand, step: int) -> Tensor:
    """The running statistics that the step before left behind, in a training of its own."""
    again = ByHand(loop.root / f"again {step}", model=normalized())
    again.steps(step)
    return statistics_of(again.model)


def test_the_walk_back_is_the_walk_reversed(tmp_path: Path) -> None:
    loop = ByHand(tmp_path, lambda p: AdamW(p, lr=0.02), budget=FEW_STATES)
    loop.steps(16)
    path, subject = loop.close(), loop.subject()
    forth, back = (list(walk(path, subject, FlatModel(subject.model), reverse)) for reverse in (False, True))
    assert [i.steps[0].index for i in forth] == [i.steps[0].index for i in back[::-1]]
    assert intervals(path, reverse=True) == intervals(path)[::-1]
    for a, b in zip(forth, back[::-1], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.states(), b.states(), strict=True))


def test_a_path_may_be_retraced_between_any_two_states(tmp_path: Path) -> None:
    loop = ByHand(tmp_path, lambda p: AdamW(p, lr=0.02))
    loop.steps(7)
    path, subject = loop.close(), loop.subject()
    assert_replays(path, subject, loop.states)
    for start, stop in ((0, 3), (2, 6), (5, 7)):
        steps, drift = retrace(path, subject, FlatModel(subject.model), path.snapshot(start), path.snapshot(stop))
        assert drift < 1e-12
        assert [step.index for step in steps] == list(range(start, stop))
        for step in steps:
            assert torch.allclose(step.state, loop.states[step.index], atol=1e-13)


def test_a_single_step_needs_no_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end is stored, and with it what the optimizer holds."""
    loop = ByHand(tmp_path, lambda p: AdamW(p, lr=0.02))
    loop.steps(3)
    path, subject = loop.close(), loop.subject()
    monkeypatch.setattr("brittle.path.replay.batch_gradient", None)
    for start in range(3):
        interval = replay(path, subject, FlatModel(subject.model), start, start + 1)
        [step] = interval.steps
        assert torch.equal(step.state, loop.states[start])
        assert torch.equal(interval.end, loop.states[start + 1])


# ---------------------------------------------------------------------------------------------------------------- drift


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


def test_a_path_that_does_not_meet_its_next_state_is_refused(tmp_path: Path) -> None:
    loop = ByHand(tmp_path, budget=FEW_STATES)
    loop.steps(16)
    path, subject = loop.close(), loop.subject(loss=lambda z, y: F.cross_entropy(z, y, label_smoothing=0.2))
    start, stop = max(pairwise(path.marks), key=lambda pair: pair[1] - pair[0])
    rule = (
        rf"the path must replay: from step {start} to {stop} it ends \d+\.\d\d% of the way off; the model, loss, train"
    )
    with pytest.raises(PathMismatchError, match=rule):
        replay(path, subject, FlatModel(subject.model), start, stop)


def test_noise_that_adam_blows_up_on_another_machine_is_no_drift(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bias before the normalization has no gradient but for rounding, and Adam moves it all the same."""
    training = train(
        "batch norm", replace(RECIPES["adamw"], optimizer=lambda m: AdamW(m.parameters(), eps=1e-16)), tmp_path
    )
    generator = torch.Generator().manual_seed(0)

    def elsewhere(subject: Subject, flat: FlatModel, batch: Batch, resting: tuple[str, ...] = ()) -> Tensor:
        gradient = batch_gradient(subject, flat, batch, resting)
        return gradient + 1e-12 * gradient.abs().max() * torch.randn(gradient.shape, generator=generator)

    path, flat = training.path, FlatModel(training.subject.model)
    monkeypatch.setattr("brittle.path.replay.batch_gradient", elsewhere)
    check_path(path, training.subject)
    before, after = path.snapshot(0), path.snapshot(1)
    steps, drift = retrace(path, training.subject, flat, before, after)
    assert drift < 1e-6
    assert drift_of(steps[0].state, flat.state, after.state, flat.parameters) > 0.05, "it would count otherwise"


# -------------------------------------------------------------------------------------- what a batch had in its step


def step_of(sizes: tuple[int, ...], norm: float = 1.0, autocast: int = 0) -> Step:
    batches = tuple(Batch(torch.arange(size), norm=norm, autocast=autocast) for size in sizes)
    nothing = torch.zeros(1)
    return Step(batches, (0.1,), Manner((0,), ({},)), torch.zeros(1).long(), nothing + 1, nothing + math.inf, nothing)


@given(st.sampled_from([(4,), (4, 4, 4), (5, 1, 3)]), st.integers(0, 4), st.integers(-20, 20), st.floats(-9e-4, 9e-4))
def test_shares_are_put_to_what_loops_do(sizes: tuple[int, ...], kind: int, power: int, off: float) -> None:
    """Means, means over all batches, over all rows, sums: each times a scaler's power of two, and a little rounding."""
    plain = [1.0, 1 / len(sizes), sizes[0] / sum(sizes), float(sizes[0]), 1 / sum(sizes) * sizes[0]][kind]
    value = plain * 2.0**power
    step = step_of(sizes, norm=value * (1 + off))
    assert share_of(step, step.batches[0], 1.0) == pytest.approx(value, rel=2e-3)
    if kind < 4 and len(sizes) == 1:
        assert share_of(step, step.batches[0], 1.0) == value


def test_a_share_that_is_none_of_these_is_taken_as_it_is() -> None:
    step = step_of((4,), norm=0.7)
    assert plain_share(step, step.batches[0], 0.7) is None
    assert share_of(step, step.batches[0], 1.0) == 0.7
    assert share_of(step, step.batches[0], 2.0) == 0.35
    half = step_of((4,), norm=1.02, autocast=1)
    assert share_of(half, half.batches[0], 1.0) == 1.0, "half precision lies further beside"
    assert share_of(step, step.batches[0], 0.0) == 1.0, "nothing of nothing"


# ------------------------------------------------------------------------------------------------------ clipped again


def recipe_of(factors: Tensor) -> Recipe:
    sizes = torch.tensor([3, 4])
    return Recipe(
        "SGD",
        sizes,
        torch.zeros(2).long(),
        torch.zeros(2).long(),
        factors,
        torch.zeros(2),
        (0.1,),
        ({},),
        torch.float64,
    )


@pytest.mark.parametrize("factor", [0.037, 1.0, 2.0**-12, 13.0])
def test_the_factor_that_clipping_by_value_hides_is_found_from_the_length(factor: float) -> None:
    """|clamp(c g, -v, v)| grows with c as long as any entry is below the bound."""
    gradient = torch.randn(7, generator=torch.Generator().manual_seed(0))
    bound = (gradient.abs() * factor).quantile(0.5).item()
    given_ = (factor * gradient).clamp(-bound, bound)
    seen = replace(step_of((4,)), bounds=torch.full((2,), bound), length=given_.norm().item())
    recipe = recipe_of(torch.ones(2))
    assert torch.allclose(clipped(known(recipe, seen, gradient), seen, gradient), given_, rtol=1e-7)
    assert known(recipe, replace(seen, length=0.0), gradient) is recipe


def test_each_tensor_is_multiplied_and_clipped_by_its_own() -> None:
    gradient = torch.tensor([1.0, -2.0, 3.0, 1.0, -2.0, 3.0, 0.5])
    seen = replace(step_of((4,)), bounds=torch.tensor([math.inf, 0.25]))
    found = clipped(recipe_of(torch.tensor([0.5, 0.2])), seen, gradient)
    assert found.tolist() == pytest.approx([0.5, -1.0, 1.5, 0.2, -0.25, 0.25, 0.1])


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


def test_a_state_is_parameters_and_running_statistics() -> None:
    model = normalized()
    assert torch.equal(state_of(model), torch.cat([parameters_of(model), statistics_of(model)]))
    assert [slot.buffer for slot in layout(model)] == [False] * 6 + [True] * 2
    assert [(slot.start, slot.stop) for slot in layout(model)][:2] == [(0, 20), (20, 25)]
    assert statistics_of(nn.Linear(2, 2)).numel() == 0


def test_the_users_model_is_never_touched() -> None:
    model = normalized()
    model[0].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flat = FlatModel(model)
    flat.load(torch.rand(len(flat)))
    flat.gradient(lambda: F.cross_entropy(flat.train()(data()[0]), data()[1]))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5

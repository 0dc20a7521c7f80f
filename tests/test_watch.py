"""What happens to gradients between backward and step: multiplied and clipped they are followed, otherwise refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_hand import ByHand, assert_recorded, normalized, seeded, sgd
from cases import float64 as float64
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, Adam, AdamW
from torch.utils.checkpoint import checkpoint

from brittle.errors import NotFiniteError, UnsupportedError

Change = Callable[[nn.Module], object]


def named(model: nn.Module, name: str) -> nn.Parameter:
    return dict(model.named_parameters())[name]


def gradient(model: nn.Module, name: str) -> Tensor:
    found = named(model, name).grad
    assert found is not None
    return found


def each(model: nn.Module, change: Callable[[Tensor], object]) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            change(parameter.grad)


def in_turn(*changes: Change) -> Change:
    return lambda model: [change(model) for change in changes]


def first_two(model: nn.Module) -> list[nn.Parameter]:
    return list(model.parameters())[:2]


def last_two(model: nn.Module) -> list[nn.Parameter]:
    return list(model.parameters())[2:]


FOLLOWED: dict[str, Change] = {
    "nothing": lambda m: None,
    "by norm": lambda m: clip_grad_norm_(m.parameters(), 0.1),
    "by norm without effect": lambda m: clip_grad_norm_(m.parameters(), 1e9),
    "by the largest entry": lambda m: clip_grad_norm_(m.parameters(), 0.02, norm_type=torch.inf),
    "each tensor by its norm": lambda m: [clip_grad_norm_(p, 0.05) for p in m.parameters()],
    "some tensors by norm": lambda m: clip_grad_norm_(first_two(m), 0.02),
    "by value": lambda m: clip_grad_value_(m.parameters(), 0.05),
    "by value without effect": lambda m: clip_grad_value_(m.parameters(), 1e9),
    "by value, every tensor": lambda m: clip_grad_value_(m.parameters(), 1e-3),
    "by value, every entry": lambda m: clip_grad_value_(m.parameters(), 1e-5),
    "the smaller tensors by value": lambda m: clip_grad_value_(first_two(m), 0.01),
    "the larger tensors by value": lambda m: clip_grad_value_(last_two(m), 0.05),
    "by norm, then by value": in_turn(
        lambda m: clip_grad_norm_(m.parameters(), 0.2), lambda m: clip_grad_value_(m.parameters(), 0.05)
    ),
    "by norm, then by value, every tensor": in_turn(
        lambda m: clip_grad_norm_(m.parameters(), 0.1), lambda m: clip_grad_value_(m.parameters(), 1e-3)
    ),
    "by value, then by norm": in_turn(
        lambda m: clip_grad_value_(m.parameters(), 0.05), lambda m: clip_grad_norm_(m.parameters(), 0.1)
    ),
    "signs alone": lambda m: each(m, lambda g: g.sign_().mul_(0.02)),
    "all multiplied": lambda m: each(m, lambda g: g.mul_(0.3)),
    "each multiplied otherwise": lambda m: [p.grad.mul_(0.2 + k) for k, p in enumerate(m.parameters())],
    "one blown up": lambda m: gradient(m, "2.bias").mul_(50),
    "one set to zero": lambda m: gradient(m, "0.bias").zero_(),
    "one taken away": lambda m: setattr(named(m, "0.bias"), "grad", None),
}


@pytest.mark.parametrize("change", FOLLOWED)
@pytest.mark.parametrize("make", [sgd(momentum=0.9), lambda p: AdamW(p, lr=0.02)], ids=["sgd", "adamw"])
def test_multiplied_and_clipped_gradients_are_followed(change: str, make: Any, tmp_path: Path) -> None:
    loop = ByHand(tmp_path, make)
    for _ in range(4):
        loop.step(between=lambda: FOLLOWED[change](loop.model))
    assert_recorded(loop, atol=1e-8)


def test_a_gradient_that_is_set_to_zero_or_taken_away_leaves_its_tensor_in_place(tmp_path: Path) -> None:
    """Set to zero it still decays, taken away it does not."""
    loop = ByHand(tmp_path, sgd(weight_decay=0.5))
    before = [named(loop.model, name).detach().clone() for name in ("0.bias", "2.bias")]
    for _ in range(3):
        loop.step(between=lambda: (FOLLOWED["one set to zero"](loop.model), setattr(loop.model[2].bias, "grad", None)))
    assert torch.allclose(loop.model[0].bias, before[0] * 0.95**3)
    assert torch.equal(loop.model[2].bias, before[1])
    assert_recorded(loop)


@pytest.mark.parametrize("change", ["by value", "by norm, then by value", "all multiplied"])
def test_a_tensor_of_one_entry_is_clipped_like_the_others(change: str, tmp_path: Path) -> None:
    """Its two norms are one number: by themselves they cannot tell a factor from a bound."""
    scaled = seeded(lambda: nn.Sequential(nn.Linear(4, 1), nn.Tanh(), nn.Linear(1, 3)))
    loop = ByHand(tmp_path, model=scaled)
    for _ in range(6):
        loop.step(between=lambda: FOLLOWED[change](loop.model))
    assert_recorded(loop, atol=1e-8)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("change", ["by norm", "by value, every tensor", "by norm, then by value"])
def test_what_a_gradient_scaler_does_is_followed(change: str, passes: int, tmp_path: Path) -> None:
    loop = ByHand(tmp_path)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for _ in range(5):
        loop.optimizer.zero_grad()
        for _ in range(passes):
            ids = loop.draw()
            scaler.scale(loop.loss(ids, 1 / passes)).backward()
            loop.recorder.batch(ids)
        scaler.unscale_(loop.optimizer)
        FOLLOWED[change](loop.model)
        loop.spend_by(lambda: scaler.step(loop.optimizer))
        scaler.update()
    assert_recorded(loop, atol=1e-8)


REFUSED: dict[str, Change] = {
    "noise": lambda m: each(m, lambda g: g.add_(0.01 * torch.randn(g.shape))),
    "noise on one tensor": lambda m: gradient(m, "0.weight").add_(0.01 * torch.randn(5, 4)),
    "half of it masked": lambda m: gradient(m, "0.weight")[:2].zero_(),
    "centred": lambda m: gradient(m, "0.weight").sub_(gradient(m, "0.weight").mean(0)),
    "one row blown up": lambda m: gradient(m, "2.weight")[0].mul_(2),
    "written by hand": lambda m: setattr(named(m, "2.bias"), "grad", torch.tensor([0.3, -0.1, 0.2])),
    "a penalty's share added": lambda m: gradient(m, "2.weight").add_(named(m, "2.weight").detach(), alpha=0.01),
    "two bounds": in_turn(
        lambda m: clip_grad_value_(first_two(m), 0.003), lambda m: clip_grad_value_(last_two(m), 0.02)
    ),
}


@pytest.mark.parametrize("change", list(REFUSED)[:-1])
def test_gradients_that_were_changed_otherwise_are_refused(change: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    loop = ByHand(tmp_path)
    loop.step()
    with pytest.raises(UnsupportedError, match="may be multiplied or clipped between backward and step, found one"):
        loop.step(between=lambda: REFUSED[change](loop.model))


def test_two_bounds_are_followed_or_refused_but_never_taken_for_one(tmp_path: Path) -> None:
    loop = ByHand(tmp_path)
    try:
        for _ in range(4):
            loop.step(between=lambda: REFUSED["two bounds"](loop.model))
    except UnsupportedError:
        return
    assert_recorded(loop)


def test_a_gradient_that_no_backward_pass_made_is_refused(tmp_path: Path) -> None:
    loop = ByHand(tmp_path)
    loop.model[2].bias.requires_grad_(False)
    loop.step()
    with pytest.raises(UnsupportedError, match="hand-written gradients"):
        loop.step(between=lambda: setattr(loop.model[2].bias, "grad", torch.ones(3)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradients_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    loop = ByHand(tmp_path)
    loop.step()
    with pytest.raises(NotFiniteError, match="gradients must be finite, found NaN or infinity; the training diverged"):
        loop.step(between=lambda: gradient(loop.model, "0.bias").fill_(value))


def test_sparse_gradients_are_refused_by_name(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(6, 5, sparse=True), nn.Flatten(), nn.Linear(20, 3))
    loop = ByHand(tmp_path, sgd(), model)
    loop.inputs = (loop.inputs * 5.99).long()
    with pytest.raises(UnsupportedError, match=r"sparse gradients .* 0\.weight; use sparse=False"):
        loop.step()


# ------------------------------------------------------------------------------------------------- who is trained


MAKES: dict[str, Any] = {
    "sgd": sgd(momentum=0.9, weight_decay=0.05),
    "adam": lambda p: Adam(p, lr=0.02, eps=1e-3),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.02, eps=1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, eps=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, eps=1e-3),
}


@pytest.mark.parametrize("make", MAKES)
def test_layers_may_be_frozen_and_unfrozen_in_mid_training(make: str, tmp_path: Path) -> None:
    loop = ByHand(tmp_path, MAKES[make], normalized())
    loop.model[0].requires_grad_(False)
    loop.steps(3)
    loop.model[0].requires_grad_(True)
    loop.model[3].bias.requires_grad_(False)
    loop.steps(3)
    loop.model.requires_grad_(True)
    loop.steps(2)
    path = assert_recorded(loop, atol=1e-10)
    names = [name for name, _, _ in path.slots]
    rests = lambda step, name: bool(path.step(step).counts[names.index(name)] < 0)  # noqa: E731
    assert [rests(s, "0.weight") for s in range(8)] == [True] * 3 + [False] * 5
    assert [rests(s, "3.bias") for s in range(8)] == [False] * 3 + [True] * 3 + [False] * 2


@pytest.mark.parametrize("make", ["sgd", "adam"])
def test_a_frozen_layer_whose_gradients_stay_at_zero_goes_on_moving_as_torch_moves_it(
    make: str, tmp_path: Path
) -> None:
    """With zero_grad(set_to_none=False) momentum and decay carry it on."""
    loop = ByHand(tmp_path, MAKES[make])
    loop.steps(3)
    loop.model[0].requires_grad_(False)
    frozen = loop.model[0].weight.detach().clone()
    for _ in range(3):
        loop.optimizer.zero_grad(set_to_none=False)
        loop.backward()
        loop.spend()
    assert not torch.equal(loop.model[0].weight, frozen)
    assert_recorded(loop)


@pytest.mark.parametrize("make", MAKES)
def test_a_parameter_group_may_be_added_in_mid_training(make: str, tmp_path: Path) -> None:
    model = normalized()
    loop = ByHand(tmp_path, optimizer=MAKES[make](list(model.parameters())[:-2]), model=model)
    loop.steps(3)
    loop.optimizer.add_param_group({"params": list(model[3].parameters()), "lr": 0.03})
    loop.steps(4)
    path = assert_recorded(loop, atol=1e-10)
    assert [len(path.step(s).lr) for s in range(7)] == [1] * 3 + [2] * 4
    assert path.step(6).lr[1] == 0.03


@pytest.mark.parametrize("zeroed", ["by the optimizer", "by the model"])
def test_what_no_optimizer_moves_stays_as_it_is(zeroed: str, tmp_path: Path) -> None:
    """Its gradients pile up where the optimizer alone sets gradients to zero; they are nobody's."""
    model = normalized()
    loop = ByHand(tmp_path, optimizer=SGD(list(model.parameters())[:-1], lr=0.1, momentum=0.9), model=model)
    for _ in range(4):
        (loop.optimizer if zeroed == "by the optimizer" else model).zero_grad()
        loop.backward()
        clip_grad_norm_(model.parameters(), 0.5)
        loop.spend()
    path = assert_recorded(loop)
    assert torch.equal(path.snapshot(4).state[-13:-10], path.snapshot(0).state[-13:-10])


class Spare(nn.Module):
    """Has a layer that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize("make", MAKES)
def test_a_layer_without_a_part_has_none(make: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    loop = ByHand(tmp_path, MAKES[make], Spare())
    loop.steps(3)
    path = assert_recorded(loop)
    assert (path.step(2).counts[2:] == -1).all()


@pytest.mark.parametrize("settings", [{}, {"dampening": 0.4}, {"nesterov": True}])
def test_momentum_that_the_loop_throws_away_begins_anew(settings: dict[str, Any], tmp_path: Path) -> None:
    """In a few tensors, then in all."""
    loop = ByHand(tmp_path, sgd(momentum=0.9, **settings))
    loop.steps(3)
    for parameter in first_two(loop.model):
        del loop.optimizer.state[parameter]
    loop.steps(2)
    loop.optimizer.state.clear()
    loop.steps(2)
    assert_recorded(loop)


class Checkpointed(nn.Module):
    """A small network whose layers are computed again in the backward pass, those of `part`."""

    def __init__(self, part: str, reentrant: bool) -> None:
        super().__init__()
        self.net = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 3)))
        self.part, self.reentrant = part, reentrant

    def again(self, layers: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(layers, x.requires_grad_(), use_reentrant=self.reentrant)

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.net[:1], self.net[1:]
        if not self.training or self.part == "all":
            return self.net(x)
        return last(self.again(first, x)) if self.part == "first" else self.again(last, first(x))


def checkpointed(part: str, reentrant: bool, root: Path) -> ByHand:
    """The loop of such a network; all of it is computed again where the loop asks for it, outside the model."""
    loop = ByHand(root, model=(model := Checkpointed(part, reentrant)))
    loop.loss = lambda ids, share=1.0: (
        share
        * F.cross_entropy(  # type: ignore[method-assign]
            model.again(model, loop.inputs[ids]) if part == "all" else model(loop.inputs[ids]), loop.targets[ids]
        )
    )
    return loop


@pytest.mark.parametrize(("part", "reentrant"), [("first", False), ("last", False), ("all", False), ("all", True)])
def test_what_is_computed_again_in_the_backward_pass_is_no_pass_of_its_own(
    part: str, reentrant: bool, tmp_path: Path
) -> None:
    loop = checkpointed(part, reentrant, tmp_path)
    loop.steps(5)
    assert_recorded(loop)


@pytest.mark.parametrize("part", ["first", "last"])
def test_reentrant_checkpointing_inside_the_model_is_refused_by_name(part: str, tmp_path: Path) -> None:
    loop = checkpointed(part, True, tmp_path)
    with pytest.raises(UnsupportedError, match=r"reentrant activation checkpointing.*use_reentrant=False"):
        loop.step()


def test_a_step_without_any_gradient_is_none(tmp_path: Path) -> None:
    loop = ByHand(tmp_path, sgd(momentum=0.9, weight_decay=0.1))
    loop.steps(2)
    loop.optimizer.zero_grad()
    loop.spend()
    loop.steps(2)
    assert assert_recorded(loop).steps == 4


# ------------------------------------------------------------------------------------------------- the user's own hooks


def none(_: object) -> None:
    """Torch's hooks return nothing."""


HOOKS: dict[str, Callable[[nn.Parameter], object]] = {
    "on the gradient": lambda p: p.register_hook(lambda g: g * 0.5),
    "clipping the gradient": lambda p: p.register_hook(lambda g: g.clamp(-0.02, 0.02)),
    "behind the sum": lambda p: p.register_post_accumulate_grad_hook(lambda p: none(p.grad.mul_(0.5))),
    "clipping behind the sum": lambda p: p.register_post_accumulate_grad_hook(
        lambda p: none(p.grad.clamp_(-0.02, 0.02))
    ),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_what_a_users_hook_does_within_backward_is_followed(hook: str, tmp_path: Path) -> None:
    """The recorder's own come first, so that it sees the gradient before and after."""
    loop = ByHand(tmp_path)
    loop.steps(2)
    for p in loop.model.parameters():
        HOOKS[hook](p)
    for _ in range(4):
        loop.optimizer.zero_grad()
        loop.backward()
        loop.spend()
    assert_recorded(loop, atol=1e-8)

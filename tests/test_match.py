"""Does a path belong to a model and its data? Whatever differs is named at the door, in one line with the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_hand import COUNT, ByHand, data, normalized, seeded, sgd, tanh
from cases import float64 as float64
from torch import Tensor, nn
from torch.optim import AdamW

from brittle.augmentation import Augmentation
from brittle.errors import PathMismatchError
from brittle.path.flat import FlatModel
from brittle.path.match import check_path
from brittle.path.replay import walk
from brittle.path.store import PathReader
from brittle.subject import Subject

STATES = {"every state": 1 << 30, "few states": 4000}


def trained(root: Path, budget: int = 1 << 30, model: nn.Module | None = None, steps: int = 12) -> ByHand:
    loop = ByHand(root, sgd(0.2, momentum=0.8), model, budget)
    loop.steps(steps)
    loop.close()
    return loop


def refused(root: Path, subject: Subject) -> str:
    """The line that says why."""
    with pytest.raises(PathMismatchError) as caught:
        check_path(PathReader(root), subject)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(loop: ByHand, **changes: Any) -> Subject:
    parts: dict[str, Any] = {"train": (loop.inputs, loop.targets), "test": data(seed=9), "model": loop.model.eval()}
    parts |= changes
    return Subject(parts.pop("model"), parts.pop("train"), parts.pop("test"), **parts)


# ------------------------------------------------------------------------------------------------------- the inputs


OTHER_INPUTS: dict[str, Callable[[ByHand], dict[str, Any]]] = {
    "other data": lambda t: {"train": data(seed=5)},
    "another order": lambda t: {"train": (t.inputs.roll(1, 0), t.targets.roll(1, 0))},
    "two examples changed places": lambda t: {"train": (t.inputs[(order := swapped())], t.targets[order])},
    "other normalization": lambda t: {"normalize": (0.1, 0.9)},
    "another scale": lambda t: {"train": (t.inputs / 2, t.targets)},
    "features of another order": lambda t: {"train": (t.inputs.flip(1), t.targets)},
    "a little noise": lambda t: {"train": ((t.inputs + 0.02 * noise()).clamp(0, 1), t.targets)},
    "augment= where nothing was augmented": lambda t: {"augment": Augmentation(lambda x: x.flip(-1) * 0.9)},
}


def swapped() -> Tensor:
    order = torch.arange(COUNT)
    order[[4, 5]] = order[[5, 4]]
    return order


def noise() -> Tensor:
    return torch.randn(COUNT, 4, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("difference", OTHER_INPUTS)
@pytest.mark.parametrize("states", STATES)
def test_other_inputs_are_refused_with_their_mean(difference: str, states: str, tmp_path: Path) -> None:
    loop = trained(tmp_path, STATES[states])
    line = refused(tmp_path, changed(loop, **OTHER_INPUTS[difference](loop)))
    assert "the inputs of step" in line
    assert " had mean 0." in line
    assert "pass the same data in the same order and normalization, and augment= (or store the inputs" in line


def test_the_mean_in_the_message_is_the_batchs(tmp_path: Path) -> None:
    loop = trained(tmp_path, steps=1)
    [batch] = PathReader(tmp_path).step(0).batches
    other = data(seed=5)[0]
    line = refused(tmp_path, changed(loop, train=(other, loop.targets)))
    for x in (loop.inputs[batch.ids], other[batch.ids]):
        assert f"{x.mean().item():.4g} and" in line
        assert f"{x.square().mean().sqrt().item():.4g}" in line


def test_augmented_training_is_refused_without_augment_and_replayed_with_it(tmp_path: Path) -> None:
    augment = Augmentation(lambda x: (x + 0.2 * torch.randn(x.shape)).clamp(0, 1), seed=4)
    loop = ByHand(tmp_path)
    for epoch in range(6):
        ids = loop.draw()
        x = torch.stack([augment(loop.inputs[i], i, epoch) for i in ids.tolist()])
        loop.optimizer.zero_grad()
        F.cross_entropy(loop.model(x), loop.targets[ids]).backward()
        loop.recorder.batch(ids, epoch=epoch)
        loop.spend()
    path = loop.close()
    check_path(path, changed(loop, augment=augment))
    line = refused(tmp_path, changed(loop))
    assert "and augment= (or store the inputs, recorder.batch(ids, inputs=...)) where training augmented them" in line
    assert "had mean" in refused(tmp_path, changed(loop, augment=Augmentation(augment.transform, seed=5)))


def test_an_augmentation_of_another_shape_is_refused(tmp_path: Path) -> None:
    loop = trained(tmp_path)
    line = refused(tmp_path, changed(loop, augment=lambda x, i, epoch: x[:3]))
    assert "augment= must return inputs of the training data's shape (4,), found (3,)" in line


# -------------------------------------------------------------------------------------------- the same inputs, and yet


OTHER_TARGETS: dict[str, Callable[[ByHand], dict[str, Any]]] = {
    "other labels": lambda t: {"train": (t.inputs, (t.targets + 1) % 3)},
    "labels of another order": lambda t: {"train": (t.inputs, t.targets.roll(1))},
    "label smoothing": lambda t: {"loss": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1)},
    "class weights": lambda t: {"loss": lambda z, y: F.cross_entropy(z, y, weight=torch.tensor([1.0, 2.0, 3.0]))},
    "another loss": lambda t: {"loss": lambda z, y: F.multi_margin_loss(z, y)},
    "the loss turned round": lambda t: {"loss": lambda z, y: -F.cross_entropy(z, y)},
}


@pytest.mark.parametrize("difference", OTHER_TARGETS)
@pytest.mark.parametrize("states", STATES)
def test_other_labels_or_another_loss_are_refused_as_such(difference: str, states: str, tmp_path: Path) -> None:
    loop = trained(tmp_path, STATES[states])
    subject = changed(loop, **OTHER_TARGETS[difference](loop))
    line = refused(tmp_path, subject)
    assert "must reproduce the recorded weights" in line
    assert "though the inputs are the same; the labels, the loss" in line
    if states == "few states":
        with pytest.raises(PathMismatchError, match=r"the path must replay: from step \d+ to \d+ it ends \d+\.\d+% of"):
            list(walk(PathReader(tmp_path), subject, FlatModel(subject.model)))


@pytest.mark.parametrize("factor", [0.3, 7.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_multiple_of_the_loss_is_the_same_loss(factor: float, reduction: str, tmp_path: Path) -> None:
    """The size of a batch's gradient is recorded; a sum for a mean, or a factor in the loop, is read from it."""
    loop = trained(tmp_path, STATES["few states"])
    check_path(
        PathReader(tmp_path), changed(loop, loss=lambda z, y: factor * F.cross_entropy(z, y, reduction=reduction))
    )


@pytest.mark.parametrize("states", STATES)
def test_gradients_that_were_turned_round_before_the_step_are_noticed(states: str, tmp_path: Path) -> None:
    """Both their norms are as before: only the replay tells."""
    loop = ByHand(tmp_path, budget=STATES[states])
    for _ in range(12):
        loop.step(between=lambda: loop.model[0].weight.grad.neg_())
    loop.close()
    assert "must reproduce the recorded weights" in refused(tmp_path, changed(loop))


@pytest.mark.parametrize("states", STATES)
def test_weights_that_are_moved_besides_the_optimizer_are_noticed(states: str, tmp_path: Path) -> None:
    loop = ByHand(tmp_path, budget=STATES[states])
    for _ in range(12):
        loop.step()
        with torch.no_grad():
            loop.model[0].weight.clamp_(-0.1, 0.1)
    loop.close()
    assert "must reproduce the recorded weights" in refused(tmp_path, changed(loop))


def test_modules_of_another_mode_are_noticed(tmp_path: Path) -> None:
    """A network that trains otherwise by itself, as the message says."""

    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = tanh(), 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * (self.scale if self.training else 1.0)

    model = Moody()
    loop = trained(tmp_path, model=model)
    model.scale = 2.0
    assert "the modules in training mode differ from the training's" in refused(tmp_path, changed(loop))


# ------------------------------------------------------------------------------------------------- model and weights


OTHER_MODELS: dict[str, Callable[[], nn.Module]] = {
    "wider": lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)),
    "deeper": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3)),
    "other names": lambda: nn.Sequential(nn.Identity(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "with normalization": normalized,
    "without a bias": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)),
}


@pytest.mark.parametrize("other", OTHER_MODELS)
def test_another_architecture_is_refused(other: str, tmp_path: Path) -> None:
    loop = trained(tmp_path, steps=2)
    line = refused(tmp_path, changed(loop, model=OTHER_MODELS[other]().eval()))
    assert "the path was recorded with 4 tensors, " in line
    assert "this model has" in line
    assert line.endswith("audit it with the model it was recorded from")


def test_statistics_where_there_were_weights_are_another_architecture(tmp_path: Path) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("0", nn.Linear(4, 5))
            last = nn.Linear(5, 3)
            bias = last.bias.detach().clone()
            del last.bias
            last.register_buffer("bias", bias)
            self.add_module("2", last)

        def forward(self, x: Tensor) -> Tensor:
            layers = dict(self.named_children())
            return layers["2"](torch.tanh(layers["0"](x)))

    loop = trained(tmp_path, steps=2)
    assert "audit it with the model it was recorded from" in refused(tmp_path, changed(loop, model=Constant().eval()))


@pytest.mark.parametrize("by", [0.01, torch.nan])
def test_other_final_weights_are_refused(by: float, tmp_path: Path) -> None:
    loop = trained(tmp_path)
    if by == by:
        with torch.no_grad():
            loop.model[2].bias[1] += by
        line = refused(tmp_path, changed(loop))
        assert "its weights differ from them by up to 0.01; load the weights that this training ended with" in line
        return
    subject = changed(loop)
    with torch.no_grad():
        loop.model[2].bias[1] = by
    assert "must end at the audited weights" in refused(tmp_path, subject)


def test_other_running_statistics_are_other_weights(tmp_path: Path) -> None:
    loop = trained(tmp_path, model=normalized())
    loop.model[1].running_mean += 0.1
    assert "must end at the audited weights" in refused(tmp_path, changed(loop))


def test_weights_of_another_precision_still_belong_to_the_path(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    loop = ByHand(tmp_path, lambda p: AdamW(p, lr=0.02), normalized(), budget=6000)
    loop.steps(20)
    path = loop.close()
    check_path(path, loop.subject())
    torch.set_default_dtype(torch.float64)
    check_path(path, loop.subject(model=loop.model.double()))


def test_ids_outside_the_data_are_refused(tmp_path: Path) -> None:
    loop = ByHand(tmp_path)
    loop.step([0, 3, 7])
    loop.step([1, 2])
    loop.close()
    fewer = changed(loop, train=(loop.inputs[:5], loop.targets[:5]))
    line = refused(tmp_path, fewer)
    assert "the path's ids must be positions in the 5 training examples, it names 7; pass the data that" in line
    check_path(PathReader(tmp_path), changed(loop, train=(loop.inputs[:8], loop.targets[:8])))


def test_the_middle_of_the_path_is_looked_at_as_well(tmp_path: Path) -> None:
    """Data that were changed in mid-training, and changed back."""
    loop = ByHand(tmp_path)
    for k in range(9):
        loop.inputs = data()[0] * (0.5 if 3 <= k < 6 else 1)
        loop.step()
    loop.close()
    line = refused(tmp_path, changed(loop, train=data()))
    assert "the inputs of step 4 had mean" in line


def test_checking_leaves_the_model_and_its_data_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = seeded(lambda: nn.Sequential(*normalized(), nn.Dropout(0.2)))
    loop = trained(tmp_path, model=model)
    subject = changed(loop)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    world = torch.get_rng_state()
    check_path(PathReader(tmp_path), subject)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.training
    assert not model._forward_hooks
    assert torch.equal(torch.get_rng_state(), world)


def test_a_model_that_is_called_by_a_method_of_its_own_is_checked_by_its_replay(tmp_path: Path) -> None:
    """What it was called with is not seen by a hook; labels and inputs are one to the replay."""

    class ByMethod(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tanh()

        def logits(self, x: Tensor) -> Tensor:
            return self.inner(x)

    loop = ByHand(tmp_path, model=ByMethod())
    for _ in range(4):
        ids = loop.draw()
        loop.optimizer.zero_grad()
        F.cross_entropy(loop.model.logits(loop.inputs[ids]), loop.targets[ids]).backward()
        loop.recorder.batch(ids)
        loop.spend()
    path = loop.close()
    how = {"forward": lambda model, x: model.logits(x)}
    check_path(path, changed(loop, **how))
    assert "must reproduce the recorded weights" in refused(tmp_path, changed(loop, **how, train=data(seed=5)))

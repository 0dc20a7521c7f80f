"""Gradients row by row: equal to plain autograd, one example at a time, whatever the model is made of."""

from __future__ import annotations

import weakref
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Attention, Case, Residual, Tokens, Twice
from cases import float64 as float64
from reference import Seen, SeenPass, SeenStep, flat, gradient, logits, logits_in, row_gradients
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from brittle.errors import UnsupportedError
from brittle.kernel import gradients
from brittle.kernel.calls import Call
from brittle.kernel.layers import units, weight_parts
from brittle.kernel.outer import Part
from brittle.path.flat import FlatModel

ROWS = 5
Pair = namedtuple("Pair", ["loss", "scores"])


class Around(nn.Module):
    """`inner` in the middle, its output flattened; `pick` takes a tensor from what it returns."""

    def __init__(self, inner: nn.Module, pick: Callable[[Any], Tensor] = lambda out: out, times: int = 1) -> None:
        super().__init__()
        self.inner, self.pick, self.times = inner, pick, times

    def forward(self, x: Tensor) -> Tensor:
        return self.pick(self.inner(*[x] * self.times)).flatten(1).tanh()


def first(out: tuple[Tensor, ...]) -> Tensor:
    return out[0]


class Wrapping(nn.Module):
    """A scale of its own beside a child, and a nest of containers around what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.tensor([0.5, 2.0, 1.0])), nn.Linear(4, 3)

    def forward(self, x: Tensor, flag: bool = True) -> dict[str, Any]:
        h = self.inner(input=x)
        return {"parts": (h, [self.scale * h.sigmoid()]), "flag": flag}


class Recurrent(nn.Module):
    """Reads the first of two outputs, or the second, which holds the batch as its second axis."""

    def __init__(self, kind: type[nn.RNNBase], hidden: bool = False) -> None:
        super().__init__()
        self.inner, self.hidden = kind(2, 3, batch_first=True), hidden

    def forward(self, x: Tensor) -> Tensor:
        out, hidden = self.inner(x)
        return hidden[0] if self.hidden else out[:, -1]


class Masked(nn.Module):
    """Attention with a mask by example, keys and values from elsewhere, all by keyword; the weights are used too."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, rate, batch_first=True, kdim=2, vdim=2)
        self.embed = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        mask = x[..., 0] > x[..., 0].amax(1, keepdim=True) - 1e-9
        found, weights = self.inner(query=self.embed(x), key=x, value=x, key_padding_mask=mask)
        return torch.cat([found.flatten(1), weights.flatten(1)], dim=1)


class Whole(nn.Module):
    """Numbers in [0, 1] as tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 5.99).long()


class InPlace(nn.Module):
    """In-place activations after layers, a short cut added in place, a view of a layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x), inplace=True)
        h2 = self.norm(self.second(h))
        h2 += h
        return F.elu_(h2).flatten(1)[:, ::2]


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "linear on positions": (lambda: nn.Linear(4, 3), (2, 4)),
    "linear on a grid": (lambda: nn.Linear(4, 3), (2, 3, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1, dilation=2), (2, 9)),
    "conv1d groups": (lambda: nn.Conv1d(4, 6, 2, groups=2, bias=False), (4, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 6, 7)),
    "conv2d 1 x 1": (lambda: nn.Conv2d(2, 3, 1), (2, 3, 3)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 4, 5)),
    "depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3), (3, 4, 4)),
    "conv2d same": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same", dilation=2), (2, 4, 4)),
    "conv2d circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 2, stride=2), (2, 3, 3)),
    "layer norm": (lambda: nn.LayerNorm([3, 4]), (3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3)),
    "instance norm": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 4)),
    "rms norm": (lambda: nn.RMSNorm(4), (4,)),
    "prelu": (lambda: nn.Sequential(nn.Conv1d(3, 3, 1), nn.PReLU(3)), (3, 4)),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 3)), (4,)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley"), (4,)),
    "attention": (lambda: Around(nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True)), (3, 4)),
    "tuple": (lambda: Around(Wrapping(), lambda out: out["parts"][1][0] + out["parts"][0]), (4,)),
    "named tuple": (lambda: Around(Around(nn.Linear(4, 3)), lambda out: Pair(out.sum(), out.exp()).scores), (4,)),
    "recurrent": (lambda: Recurrent(nn.RNN), (3, 2)),
    "lstm": (lambda: Recurrent(nn.LSTM), (3, 2)),
    "gru": (lambda: Recurrent(nn.GRU), (3, 2)),
    "embedding and mean": (Tokens, (4,)),
    "padding": (lambda: nn.Sequential(Whole(), nn.Embedding(6, 5, padding_idx=2)), (4,)),
    "residual": (Residual, (4,)),
    "shared and scaled": (Twice, (4,)),
    "class token": (Attention, (3, 2)),
    "asking for values": (lambda: Asking(), (2,)),
    "attention by keyword": (Masked, (3, 2)),
}


def made(build: Callable[[], nn.Module], shape: tuple[int, ...], rows: int = ROWS) -> tuple[nn.Module, Tensor]:
    model = Case("", build, shape).model().eval()
    return model, torch.rand(rows, *shape, generator=torch.Generator().manual_seed(1))


def scalar_of(output: Any) -> Tensor:
    """One number a row: a nonlinear function of everything that a model returned. Shape (B,)."""
    out = logits_in(output).flatten(1)
    return (out.tanh() * torch.linspace(-1, 2, out.shape[1])).sum(1)


def rows_of(model: nn.Module, x: Tensor) -> tuple[Tensor, FlatModel]:
    copy = FlatModel(model)
    return gradients.row_gradients(copy, lambda: scalar_of(copy.eval()(x)).sum(), len(x)), copy


@pytest.mark.parametrize("name", MODULES)
def test_rows_equal_plain_autograd_one_example_at_a_time(name: str) -> None:
    model, x = made(*MODULES[name])
    found, copy = rows_of(model, x)
    named = dict(model.named_parameters())
    for i in range(ROWS):
        plain = gradient(lambda w, i=i: scalar_of(functional_call(model, w, (x[i : i + 1],))).sum(), named)
        expected = torch.cat([g.reshape(-1) for g in plain.values()])
        assert torch.allclose(found[i, : copy.parameters], expected, atol=1e-10)
    assert found[:, : copy.parameters].norm() > 0.01
    gradients.check_rows(copy, lambda: scalar_of(copy.eval()(x)))


# ------------------------------------------------------------------------------------------------- batch normalization


@pytest.mark.parametrize("case", ["batch norm", "cnn batch norm"])
def test_rows_of_a_normalized_batch_are_those_that_pass_through_each_row(case: str) -> None:
    model = CASES[case].model()
    inputs, targets = CASES[case].data(ROWS, seed=2)
    state = {k: v.detach().clone() for k, v in model.state_dict().items() if v.is_floating_point()}
    step = SeenStep(state, [SeenPass(torch.arange(ROWS), inputs, targets)], {}, {}, {})
    seen = Seen(model, "SGD", [step], state, inputs, targets, F.cross_entropy)
    copy = FlatModel(model)
    found = gradients.row_gradients(copy, lambda: F.cross_entropy(copy.train()(inputs), targets), ROWS)
    found = found * gradients.beyond_rounding(found)
    expected = torch.stack([flat(g, seen) for g in row_gradients(seen, step)])
    assert torch.allclose(found, expected, atol=1e-12)
    plain = copy.gradient(lambda: F.cross_entropy(copy.train()(inputs), targets))
    assert torch.allclose(found.sum(0), plain, atol=1e-12)
    gradients.check_sum(copy, found.sum(0), plain)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm2d])
def test_running_statistics_have_the_gradients_of_finite_differences(kind: type[nn.BatchNorm2d], affine: bool) -> None:
    shape = (5,) if kind is nn.BatchNorm1d else (2, 3, 3)
    norm = kind(shape[0], affine=affine, track_running_stats=True)
    model, x = made(lambda: nn.Sequential(norm, nn.Flatten(), nn.LazyLinear(3)), shape)
    model(x)
    model[0].running_mean += torch.rand(shape[0])
    model[0].running_var += torch.rand(shape[0])
    found, copy = rows_of(model, x)
    slots = [slot for slot in copy.slots if slot.buffer]
    assert [slot.name for slot in slots] == ["0.running_mean", "0.running_var"]
    state = {k: v.detach() for k, v in model.state_dict().items() if v.is_floating_point()}
    for slot in slots:
        for k in range(slot.start, slot.stop):
            step = torch.zeros(len(copy)).index_fill(0, torch.tensor(k), 1e-5)[slot.start : slot.stop]
            ends = [state | {slot.name: state[slot.name] + sign * step} for sign in (1, -1)]
            plus, minus = (scalar_of(functional_call(model, end, (x,))) for end in ends)
            assert torch.allclose(found[:, k], (plus - minus) / 2e-5, atol=1e-8)


def test_running_statistics_equal_the_formula_written_out() -> None:
    model, x = made(CASES["cnn batch norm"].build, (1, 5, 5))
    found, _ = rows_of(model, x)
    state = {k: v.detach() for k, v in model.state_dict().items() if v.is_floating_point()}
    seen = Seen(model, "SGD", [], state, x, x, F.cross_entropy)
    for i in range(ROWS):
        plain = gradient(lambda w, i=i: scalar_of(logits(model, w, x[i : i + 1])).sum(), state)
        assert torch.allclose(found[i], flat(plain, seen), atol=1e-12)


def test_frozen_normalization_has_its_rows_while_the_rest_trains() -> None:
    model, x = made(CASES["cnn batch norm"].build, (1, 5, 5))
    expected, copy = rows_of(model, x)
    copy.train()
    copy.model.get_submodule("1").eval()
    assert torch.equal(gradients.row_gradients(copy, lambda: scalar_of(copy.model(x)).sum(), ROWS), expected)


def test_rows_that_cancel_to_rounding_have_nothing_to_share_out() -> None:
    rows = torch.tensor([[1.0, 1.0, 1e-3, 0.0], [-1.0, 1.0, -1e-3, 0.0], [1e-16, -1.0, 1e-9, 0.0]])
    expected = rows.clone()
    expected[:, 0] = 0
    assert torch.equal(rows * gradients.beyond_rounding(rows), expected)


# -------------------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("name", MODULES)
def test_pieces_are_the_columns_of_the_row_gradients_each_once(name: str) -> None:
    model, x = made(*MODULES[name])
    whole, copy = rows_of(model, x)
    left = whole.clone()
    for columns, piece in gradients.row_pieces(copy, lambda: scalar_of(copy.model(x)).sum(), ROWS):
        assert piece.shape == (ROWS, columns.stop - columns.start)
        left[:, columns] -= piece
    assert left.abs().max() == 0
    spans = [(c.start, c.stop) for c, _ in gradients.row_pieces(copy, lambda: scalar_of(copy.model(x)).sum(), ROWS)]
    assert len(spans) == len(set(spans)) <= len(copy.slots)
    assert set(spans) <= {(slot.start, slot.stop) for slot in copy.slots}


def test_the_sum_of_pieces_is_the_gradient_of_the_batch() -> None:
    model, x = made(Residual, (4,))
    copy = FlatModel(model)

    def scalar() -> Tensor:
        return scalar_of(copy.model(x)).sum()

    found, expected = gradients.sum_of(copy, gradients.row_pieces(copy, scalar, ROWS)), copy.gradient(scalar)
    assert torch.allclose(found, expected, atol=1e-12)
    gradients.check_sum(copy, found, expected)
    with pytest.raises(UnsupportedError, match=r"those of first\.weight do not add up"):
        gradients.check_sum(copy, 1.01 * found, expected)
    gradients.check_sum(copy, 1.01 * found, expected, tolerance=0.02)


def test_no_more_than_one_module_is_in_memory_while_pieces_are_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made(lambda: nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)]), (4,))
    copy = FlatModel(model)
    formed: list[weakref.ref[Part]] = []
    kept: list[weakref.ref[Tensor]] = []
    alive = []

    def watched(call: Call) -> dict[str, Part]:
        alive.append([ref() is not None for ref in formed])
        assert not any(ref() is not None for ref in kept)
        kept.extend(weakref.ref(t) for t in (call.args[0], *call.upstream.values()))
        found = weight_parts(call)
        assert isinstance(found["bias"], Tensor)
        found["bias"] = found["bias"].clone()  # it is the upstream gradient
        formed.extend(weakref.ref(t) for t in found.values())
        return found

    monkeypatch.setattr(gradients, "weight_parts", watched)
    for _, piece in gradients.row_pieces(copy, lambda: scalar_of(copy.model(x)).sum(), ROWS):
        del piece
    assert alive == [[False] * (2 * k) for k in range(5)]


# ------------------------------------------------------------------------------------------------------ random numbers


class Dropping(nn.Module):
    """A scale of its own, and random masks: over the batch as it lies, or over positions first."""

    def __init__(self, across: bool = False) -> None:
        super().__init__()
        self.scale, self.across = nn.Parameter(torch.tensor([0.5, 2.0])), across

    def forward(self, x: Tensor) -> Tensor:
        h = self.scale * x
        if self.across:
            return F.dropout(h.transpose(0, 1).contiguous(), 0.4, self.training).transpose(0, 1)
        return F.dropout(h, 0.4, self.training)


class Token(Attention):
    """Dropout below a parameter of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(torch.cat([self.token.expand(len(x), 1, 4), self.embed(x)], dim=1))
        return self.last(h + self.mix(h, h, h)[0])[:, 0]


def encoder(rate: float) -> nn.Module:
    return Around(nn.TransformerEncoderLayer(4, 2, 6, rate, batch_first=True))


RANDOM: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3), nn.Linear(6, 3)), (4,)),
    "attention": (lambda: Around(nn.MultiheadAttention(4, 2, 0.3, batch_first=True), first, 3), (3, 4)),
    "attention for its weights": (lambda: Masked(0.3), (3, 2)),
    "encoder layer": (lambda: encoder(0.3), (3, 4)),
    "lstm": (lambda: Around(nn.LSTM(2, 3, 2, batch_first=True, dropout=0.4), first), (3, 2)),
    "gru": (lambda: Around(nn.GRU(2, 3, 2, batch_first=True, dropout=0.4), first), (3, 2)),
    "own parameters": (Dropping, (3, 2)),
    "positions first": (lambda: Dropping(across=True), (3, 2)),
    "class token": (Token, (3, 2)),
}


@pytest.mark.parametrize("name", RANDOM)
def test_rows_of_a_random_pass_are_those_of_the_same_draws(name: str) -> None:
    model, x = made(*RANDOM[name])
    copy = FlatModel(model)

    def values() -> Tensor:
        torch.manual_seed(3)
        return scalar_of(copy.train()(x))

    found = gradients.row_gradients(copy, lambda: values().sum(), ROWS)
    plain = torch.stack([copy.gradient(lambda row=row: values()[row]) for row in range(ROWS)])
    assert torch.allclose(found, plain, atol=1e-12)
    assert torch.allclose(found.sum(0), copy.gradient(lambda: values().sum()), atol=1e-12)
    torch.manual_seed(4)
    other = copy.gradient(lambda: scalar_of(copy.train()(x)).sum())
    assert (found.sum(0) - other).norm() > 0.01 * other.norm()  # the draws matter


@pytest.mark.parametrize("name", RANDOM)
def test_nobody_notices_that_modules_ran_again(name: str) -> None:
    model, x = made(*RANDOM[name])
    copy = FlatModel(model)
    torch.manual_seed(5)
    copy.train()(x)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    for _ in gradients.row_pieces(copy, lambda: scalar_of(copy.model(x)).sum(), ROWS):
        assert torch.equal(torch.get_rng_state(), after)
    assert all(module.training for module in copy.model.modules())


def test_a_module_that_cannot_run_on_one_example_runs_on_the_batch() -> None:
    model, x = made(Crowd, (2,))
    copy = FlatModel(model)
    with pytest.raises(ValueError, match="too few"):
        copy.model(x[:1])
    found = gradients.row_gradients(copy, lambda: scalar_of(copy.model(x)).sum(), ROWS)
    plain = [copy.gradient(lambda i=i: scalar_of(copy.model(x))[i]) for i in range(ROWS)]
    assert torch.allclose(found, torch.stack(plain), atol=1e-12)


@pytest.mark.parametrize("name", ["attention", "own parameters", "frozen normalization"])
def test_modules_run_again_in_the_mode_of_the_pass(name: str) -> None:
    """The mode is put back before the rows are taken."""
    model, x = made(*(RANDOM | {"frozen normalization": (CASES["cnn batch norm"].build, (1, 5, 5))})[name])
    expected, copy = rows_of(model, x)

    def scalar() -> Tensor:
        out = scalar_of(copy.eval()(x)).sum()
        copy.train()
        return out

    assert torch.equal(gradients.row_gradients(copy, scalar, ROWS), expected)
    assert copy.model.training


# ----------------------------------------------------------------------------------------------------- mixed precision


HALF: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear on positions": MODULES["linear on positions"],
    "conv2d groups": MODULES["conv2d groups"],
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)), (2, 4)),
    "group norm": (CASES["group norm"].build, (1, 5, 5)),
    "embedding": (lambda: nn.Sequential(Whole(), nn.Embedding(6, 5, padding_idx=2), nn.Linear(5, 3)), (4,)),
    "lstm": MODULES["lstm"],
    "residual": MODULES["residual"],
    "encoder layer": RANDOM["encoder layer"],
    "class token": RANDOM["class token"],
    "recurrent": RANDOM["lstm"],
}


@pytest.mark.parametrize("name", HALF)
def test_a_pass_in_half_precision_has_the_rows_of_full_precision_but_for_rounding(name: str) -> None:
    if name in ("lstm", "recurrent") and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("torch has no LSTM in bfloat16 on this processor")
    model, x = made(*HALF[name])
    copy, x = FlatModel(model.float()), x.float()

    def scalar(half: bool) -> Tensor:
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return scalar_of(copy.train()(x)).sum()

    full, rough = (gradients.row_gradients(copy, lambda half=half: scalar(half), ROWS) for half in (False, True))
    assert rough.dtype == torch.float32
    assert 0 < (full - rough).norm() < 0.02 * full.norm()
    gradients.check_sum(copy, rough.sum(0), copy.gradient(lambda: scalar(True)), tolerance=0.03)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gradients.row_gradients(copy, lambda: scalar(True), ROWS)
    assert torch.equal(inside, rough)


def test_normalized_batches_in_half_precision() -> None:
    model, x = made(CASES["cnn batch norm"].build, (1, 5, 5), rows=16)
    copy, x = FlatModel(model.float()), x.float()

    def scalar(half: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return scalar_of(copy.train()(x)).sum()

    full, rough = (gradients.row_gradients(copy, lambda half=half: scalar(half), 16) for half in (False, True))
    assert 0 < (full - rough).norm() < 0.03 * full.norm()


# -------------------------------------------------------------------------------------------------------------- shapes


def test_in_place_operations_do_not_reach_the_gradients() -> None:
    model, x = made(InPlace, (1, 3, 3))
    found, copy = rows_of(model, x)
    plain = [copy.gradient(lambda i=i: scalar_of(copy.eval()(x))[i]) for i in range(ROWS)]
    assert torch.allclose(found[:, : copy.parameters], torch.stack(plain)[:, : copy.parameters], atol=1e-12)


def test_the_number_of_rows_does_not_matter() -> None:
    model, x = made(*MODULES["class token"])
    whole, _ = rows_of(model, x)
    parts = [rows_of(model, part)[0] for part in (x[:1], x[1:])]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-12)


def test_a_layer_that_is_not_used_has_no_gradient() -> None:
    class Spare(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(3, 3)

    model, x = made(Spare, (4,))
    found, copy = rows_of(model, x)
    spare = [slot for slot in copy.slots if slot.name.startswith("spare")]
    assert all((found[:, slot.start : slot.stop] == 0).all() for slot in spare)


def test_tied_layers_share_their_gradient() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh())

    model, x = made(Tied, (4,))
    copy = FlatModel(model)
    gradients.check_rows(copy, lambda: scalar_of(copy.eval()(x)))


def test_units_are_the_modules_that_compute_with_their_own_tensors() -> None:
    found = [name for name, _ in units(Attention())]
    assert found == ["", "embed", "norm", "mix", "last"]
    assert [name for name, _ in units(nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Tanh()))] == ["0"]
    assert [name for name, _ in units(parametrizations.weight_norm(nn.Linear(2, 2)))] == [""]


# ------------------------------------------------------------------------------------------------------------ refusals


class Folded(nn.Module):
    """Positions folded into the batch before a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(-1, 2)).reshape(len(x), -1)


class Across(nn.Module):
    """The batch as the second axis: wrong whenever there are as many positions as examples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1).flatten(1)


class Neighbours(nn.Module):
    """Every row sees the others."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return h - h.mean(0)


class Scaled(nn.Module):
    """A scale of its own around a normalized child."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(2)), nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.inner(x)


@pytest.mark.parametrize(
    ("build", "shape", "found"),
    [
        (Folded, (2, 2), r"inner \(Linear\) returned shape \(10, 3\) for 5 inputs; keep the batch as the first axis"),
        (Across, (4, 2), r"inner \(Linear\) returned shape \(4, 5, 3\) for 5 inputs"),
        (Across, (ROWS, 2), r"must split by examples, those of inner\.weight do not add up"),
        (Neighbours, (2,), r"those of inner\.weight do not add up"),
        (lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False)), (2,), "do not add up"),
        (lambda: Recurrent(nn.RNN, hidden=True), (3, 2), r"inner \(RNN\) returned shape \(1, 5, 3\) for 5 inputs"),
    ],
)
def test_models_that_mix_rows_are_refused_by_name(
    build: Callable[[], nn.Module], shape: tuple[int, ...], found: str
) -> None:
    model, x = made(build, shape)
    copy = FlatModel(model)
    with pytest.raises(UnsupportedError, match=found):
        gradients.check_rows(copy, lambda: scalar_of(copy.eval()(x)))


def test_own_parameters_around_a_normalized_batch_are_refused_by_name() -> None:
    model, x = made(Scaled, (2,))
    copy = FlatModel(model)
    with pytest.raises(UnsupportedError, match=r"the model \(Scaled\) does; move its own parameters"):
        gradients.row_gradients(copy, lambda: scalar_of(copy.train()(x)).sum(), ROWS)
    gradients.check_rows(copy, lambda: scalar_of(copy.eval()(x)))


class Asking(nn.Module):
    """Decides by a value, which cannot be batched."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x if x.sum().item() > 0 else x


class Crowd(Asking):
    """Wants two examples at least."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < 2:
            raise ValueError("too few")
        return self.scale * x


class Once(Asking):
    """Remembers that it has run."""

    ran = False

    def forward(self, x: Tensor) -> Tensor:
        if self.ran:
            raise ValueError("once is enough")
        self.ran = True
        return self.scale * x


class Sourced(Asking):
    """Draws random numbers of its own beside the global ones."""

    def __init__(self) -> None:
        super().__init__()
        self.source = torch.Generator().manual_seed(0)

    def __deepcopy__(self, memo: dict[int, Any]) -> Sourced:
        return Sourced()

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.dropout(x) * torch.rand(x.shape, generator=self.source)


@pytest.mark.parametrize(
    ("build", "found"),
    [(Once, r"the model \(Once\) raised ValueError: once is enough"), (Sourced, "drew other random numbers")],
)
def test_a_module_that_cannot_run_again_is_refused_by_name(build: Callable[[], nn.Module], found: str) -> None:
    model, x = made(build, (2,))
    with pytest.raises(UnsupportedError, match=f"must run a second time as it ran in the model, .*{found}"):
        rows_of(model, x)

"""Inner products of row gradients: those of the rows formed by plain means, by every route."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import CASES
from cases import float64 as float64
from test_gradients import MODULES, Around, made, scalar_of
from torch import Tensor, nn

from brittle.errors import UnsupportedError
from brittle.kernel import factors
from brittle.kernel.factors import Factors, against, cheapest, factors_of, inner, products, ready
from brittle.kernel.gradients import row_gradients
from brittle.kernel.outer import Outer, formed
from brittle.path.flat import FlatModel

LEFT, RIGHT = 3, 5
ROUTES = ("gram", "rows", "left", "right")


class Reused(nn.Module):
    """One weight in two modules, and one module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.twice = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Conv1d(4, 4, 1)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(x).tanh())[:, :, None]
        return self.twice(self.twice(h).tanh())


class Sometimes(nn.Module):
    """A layer that batches of more than `LEFT` rows leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(self.inner(h) if len(x) <= LEFT else h)


TABLE = MODULES | {
    "one hidden layer": (CASES["tanh"].build, (4,)),
    "cnn": (CASES["cnn"].build, (1, 5, 5)),
    "cnn batch norm": (CASES["cnn batch norm"].build, (1, 5, 5)),
    "batch norm": (CASES["batch norm"].build, (4,)),
    "cnn group norm": (CASES["group norm"].build, (1, 5, 5)),
    "attention module": (lambda: Around(nn.MultiheadAttention(4, 2, 0.0, batch_first=True), lambda o: o[0], 3), (3, 4)),
    "tied": (Reused, (4,)),
    "left out": (Sometimes, (4,)),
}


def both(name: str, train: bool = False) -> tuple[FlatModel, list[Factors], list[Tensor]]:
    """Two batches at two states: their factors, and their rows formed."""
    model, x = made(*TABLE[name], LEFT + RIGHT)
    flat, found, rows = FlatModel(model), [], []
    for part in (x[:LEFT], x[LEFT:]):

        def scalar(part: Tensor = part) -> Tensor:
            return scalar_of((flat.train() if train else flat.eval())(part)).sum()

        before = flat.state.clone()
        rows.append(row_gradients(flat, scalar, len(part)))
        flat.load(before)
        found.append(factors_of(flat, scalar, len(part)))
        flat.load(before + 0.1 * torch.rand(len(flat)))
    return flat, found, rows


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)
    assert expected.abs().max() > 1e-4, "nothing is compared"


@pytest.mark.parametrize("name", TABLE)
def test_products_are_those_of_the_rows(name: str) -> None:
    flat, (left, right), (one, other) = both(name)
    p = flat.parameters
    assert_close(products(flat, left, right), one[:, :p] @ other[:, :p].T)
    assert_close(products(flat, right, left), other[:, :p] @ one[:, :p].T)


@pytest.mark.parametrize("name", TABLE)
def test_products_with_dense_vectors_are_those_of_the_rows(name: str) -> None:
    flat, (_, right), (_, other) = both(name)
    for count in (1, 7):
        dense = torch.randn(count, len(flat))
        assert_close(against(flat, dense, right), dense @ other.T)


def test_running_statistics_count_in_the_state_and_not_in_the_parameters() -> None:
    flat, (left, right), (one, other) = both("cnn batch norm")
    buffers = slice(flat.parameters, None)
    assert (one[:, buffers] @ other[:, buffers].T).abs().max() > 1e-4
    assert_close(against(flat, one, right), one @ other.T)
    assert (products(flat, left, right) - one @ other.T).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["batch norm", "cnn batch norm"])
def test_in_a_normalized_batch_they_are_those_of_the_row_split(name: str) -> None:
    flat, (left, right), (one, other) = both(name, train=True)
    assert_close(products(flat, left, right), one[:, : flat.parameters] @ other[:, : flat.parameters].T)
    assert_close(against(flat, one, right), one @ other.T)


@pytest.mark.parametrize("tile", [None, 8, 100, 1000])
@pytest.mark.parametrize("name", [name for name in TABLE if name.startswith(("linear", "conv", "depth", "cnn"))])
def test_every_route_finds_the_same(name: str, tile: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if tile is not None:
        monkeypatch.setitem(factors.TILE_BYTES, "cpu", tile)
    _, (left, right), _ = both(name)
    outer = [span for span, part in left.parts.items() if isinstance(part, Outer)]
    assert outer or name in ("conv3d", "conv2d same", "conv2d circular")
    for span in outer:
        one, other = left.parts[span], right.parts[span]
        expected = formed(one) @ formed(other).T
        for route in ROUTES:
            assert_close(inner(one, other, route), expected)
        for route in ("rows", "left"):
            assert_close(inner(formed(one), other, route), expected)
            assert_close(inner(one, formed(other), route), expected)
        assert_close(inner(formed(one), formed(other)), expected)


@pytest.mark.parametrize("blocks", [1, 1000])
@pytest.mark.parametrize("name", ["cnn", "linear on positions", "conv2d groups", "tied"])
def test_what_is_formed_once_changes_nothing(name: str, blocks: int) -> None:
    flat, (left, right), _ = both(name)
    assert_close(products(flat, ready(left, RIGHT, blocks), right), products(flat, left, right))


def test_a_linear_layer_is_not_formed_and_a_tensor_used_twice_is() -> None:
    _, (left, _), _ = both("linear on positions")
    assert isinstance(left.parts[(0, 12)], Outer)
    assert isinstance(left.parts[(12, 15)], Tensor)
    _, (left, _), _ = both("tied")
    assert all(isinstance(part, Tensor) for part in left.parts.values())


GROUPED: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "plain": (nn.Conv2d(8, 5, 3), (8, 9, 8)),
    "strides and groups": (nn.Conv2d(16, 6, (3, 2), (1, 2), (2, 1), (1, 2), groups=2), (16, 8, 12)),
    "one dimension": (nn.Conv1d(8, 4, 3, 1, 2, 2), (8, 40)),
}


@pytest.mark.parametrize("name", GROUPED)
def test_rows_by_groups_are_those_of_windows(name: str) -> None:
    module, shape = GROUPED[name]
    flat, x = FlatModel(module.float()), torch.randn(4, *shape, dtype=torch.float32)
    (outer,) = (
        part
        for part in factors_of(flat, lambda: flat.model(x).tanh().sum(), len(x)).parts.values()
        if isinstance(part, Outer)
    )
    assert outer.suits_groups
    plain = Outer(outer.g.double(), outer.inputs.double(), outer.window)
    assert not plain.suits_groups
    assert torch.allclose(outer.rows().double(), plain.rows(), atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "route"),
    [
        ({"m": 50, "b": 256, "k": 1, "p": 32, "d": 1568, "t": 1, "u": 1}, "gram"),  # linear
        ({"m": 1, "b": 256, "k": 1, "p": 32, "d": 1568, "t": 1, "u": 1}, "gram"),
        ({"m": 50, "b": 256, "k": 1, "p": 32, "d": 144, "t": 49, "u": 49}, "rows"),  # early convolution
        ({"m": 4, "b": 4, "k": 1, "p": 512, "d": 4608, "t": 4, "u": 4}, "gram"),  # late convolution
        ({"m": 1, "b": 256, "k": 1, "p": 64, "d": 64, "t": 100, "u": 1}, "left"),  # positions on one side
        ({"m": 256, "b": 1, "k": 1, "p": 64, "d": 64, "t": 1, "u": 100}, "right"),
    ],
)
def test_the_route_of_least_cost(sizes: dict[str, int], route: str) -> None:
    assert cheapest(**sizes) == route


def test_of_multiplications_alone_it_is_the_written_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "PER_NUMBER", 0)
    draw = torch.Generator().manual_seed(0)
    taken = set()
    for _ in range(500):
        m, b, p, d, t, u = (2 ** torch.rand(6, generator=draw).mul(9)).long().tolist()
        gram = t * u * (p + d) < p * d * (1 + t / b + u / m)
        taken.add(found := cheapest(m, b, 3, p, d, t, u, among=("gram", "rows")))
        assert found == ("gram" if gram else "rows")
    assert taken == {"gram", "rows"}


def test_factors_keep_to_one_row_an_example() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x[:, None].expand(-1, 2, -1).flatten(0, 1)).sum(1)

    model, x = made(Mixing, (4,))
    flat = FlatModel(model)
    with pytest.raises(UnsupportedError, match="one row an example"):
        factors_of(flat, lambda: flat.model(x).sum(), len(x))


def test_a_pass_in_half_precision_is_multiplied_in_full() -> None:
    model, x = made(TABLE["cnn"][0], (1, 5, 5))
    flat, x = FlatModel(model.float()), x.float()

    def scalar(half: bool) -> Callable[[], Tensor]:
        def of() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                return F.cross_entropy(flat.eval()(x), torch.arange(len(x)) % 3)

        return of

    full, rough = (factors_of(flat, scalar(half), len(x)) for half in (False, True))
    found, expected = (products(flat, part, part) for part in (rough, full))
    assert found.dtype == torch.float32
    assert 0 < (found - expected).norm() < 0.02 * expected.norm()

"""Products with row gradients by both routes of the sweep: rows formed, and vectors carried forward."""

from __future__ import annotations

import pytest
import torch
from cases import float64 as float64
from test_factors import RIGHT, TABLE, both
from torch import Tensor

from brittle.kernel import pull
from brittle.kernel.gradients import beyond_rounding
from brittle.kernel.outer import Outer, Window
from brittle.kernel.pull import cheaper, pulled

WINDOW = Window((3, 3), (1, 1), (1, 1), (1, 1))
OUTER = [name for name in TABLE if name.startswith(("linear", "conv", "depth", "cnn", "batch norm"))]


def parts_of(name: str, train: bool = False) -> list[Outer]:
    _, (_, right), _ = both(name, train)
    return [part for part in right.parts.values() if isinstance(part, Outer)]


def layer(channels: int, p: int, side: int, window: Window = WINDOW, rows: int = RIGHT) -> Outer:
    """Rows of a convolution whose gradients cancel over rows and positions, as before batch normalization."""
    g, x = torch.randn(rows, 1, p, side * side), torch.randn(rows, channels, side, side)
    return Outer(g - g.mean((0, 3), keepdim=True), x, window)


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)
        assert other.abs().max() > 1e-4, "nothing is compared"


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("block", [None, 8, 1000])
@pytest.mark.parametrize("name", OUTER)
def test_both_routes_find_the_same(
    name: str, block: int | None, coupled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if block is not None:
        monkeypatch.setattr(pull, "BLOCK_BYTES", block)
    parts = parts_of(name, train=coupled)
    assert parts or name in ("conv3d", "conv2d same", "conv2d circular")
    for part in parts:
        rows, vectors = part.rows(), torch.randn(7, part.rows().shape[1])
        expected = pulled(vectors, rows, coupled)
        assert_same(pulled(vectors, part, coupled, "rows"), expected)
        assert_same(pulled(vectors, part, coupled, "forward"), expected)
        if not coupled:
            assert_same(expected, (vectors @ rows.T, rows.sum(0)))


@pytest.mark.parametrize("name", OUTER)
def test_no_sum_of_sizes_exceeds_the_bound_and_columns_can_be_formed_alone(name: str) -> None:
    for part in parts_of(name):
        rows = part.rows()
        at = torch.randperm(rows.shape[1])[: 1 + rows.shape[1] // 2]
        assert torch.allclose(part.entries(at), rows[:, at], atol=1e-12)
        assert (rows.abs().sum(0) <= part.bound() * (1 + 1e-12)).all()
        if part.sizes[3] == 1:  # without positions there is nothing to be bounded
            assert torch.allclose(part.bound(), rows.abs().sum(0))


@pytest.mark.parametrize("few", [0.0, 1.0])
def test_columns_whose_rows_cancel_count_on_neither_route(few: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel that is the same everywhere, before batch normalization; another is 0, which is no rounding."""
    monkeypatch.setattr(pull, "FEW", few)
    part = layer(3, 4, 5, Window((1, 1), (1, 1), (0, 0), (1, 1)))
    part.inputs[:, 0], part.inputs[:, 1] = 0.7, 0.0
    rows, vectors = part.rows(), torch.randn(6, 12)
    constant = torch.arange(12) % 3 == 0
    assert torch.equal(~beyond_rounding(rows) & (rows != 0).any(0), constant)
    found = pulled(vectors, part, True, "forward")
    assert_same(found, pulled(vectors, rows, True))
    assert (found[1][constant] == 0).all()
    assert torch.allclose(found[0], (vectors * ~constant) @ rows.T)
    left_in = pulled(vectors, part, False, "forward")[0]
    assert (left_in - found[0]).norm() > 0.1 * found[0].norm()


def test_only_doubtful_columns_are_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    part, vectors = layer(3, 4, 5), torch.randn(2, 4 * 27)
    monkeypatch.setattr(Outer, "rows", lambda self: pytest.fail("rows were formed"))
    assert pulled(vectors, part, True, "forward")[0].shape == (2, RIGHT)


@pytest.mark.parametrize(
    ("m", "channels", "p", "side", "route"),
    [
        (1, 64, 64, 32, "rows"),
        (1, 128, 128, 16, "forward"),
        (8, 128, 128, 16, "rows"),
        (8, 256, 256, 8, "forward"),
        (64, 256, 256, 8, "rows"),
        (8, 512, 512, 4, "forward"),
        (256, 512, 512, 4, "rows"),
    ],
)
def test_the_cheaper_route_is_the_one_that_was_measured(m: int, channels: int, p: int, side: int, route: str) -> None:
    assert cheaper(m, layer(channels, p, side, rows=2)) == route


def test_without_positions_vectors_are_carried_forward() -> None:
    linear = Outer(torch.randn(128, 1, 10, 1), torch.randn(128, 1, 512, 1))
    assert cheaper(8, linear) == cheaper(256, linear) == "forward"

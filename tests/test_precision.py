"""Products in less than float32: within their rounding, where they were asked for, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import CASES, COUNT, queries, train
from torch import Tensor, nn

from brittle import cli
from brittle.assemble import facts
from brittle.errors import RunFolderError, UsageError
from brittle.kernel.factors import factors_of, products
from brittle.kernel.memory import Memory, mass
from brittle.kernel.precision import PRECISIONS, asked_for, check_precision, lowered
from brittle.kernel.sweep import sweep
from brittle.path.flat import FlatModel
from brittle.pipeline.context import Asked, begin
from brittle.records import Ledger
from brittle.subject import Subject

ROUNDING = 2.0**-9
"""Relative distance of a number from its neighbour in bfloat16, at most."""


def products_of(case: str) -> tuple[Tensor, Tensor, Tensor]:
    """A model's products of rows in each precision, and the bound |E_m| |G_i| of every one."""
    flat, inputs = FlatModel(CASES[case].model().eval()), CASES[case].data(COUNT, seed=1)[0]
    factors = factors_of(flat, lambda: flat.model(inputs)[:, 0].sum(), COUNT)
    found = []
    for precision in ("float32", "bfloat16"):
        with asked_for(precision):
            found.append(products(flat, factors, factors))
    length = found[0].diagonal().sqrt()
    return found[0], found[1], length[:, None] * length


@pytest.mark.parametrize("case", ["tanh", "cnn", "tokens"])
def test_products_in_bfloat16_are_off_by_the_rounding_of_their_operands(case: str) -> None:
    exact, rounded, bound = products_of(case)
    assert rounded.dtype == torch.float32
    off = (rounded - exact).abs() / bound
    assert off.max() <= 4.2 * ROUNDING  # four rounded factors at most
    assert off.max() >= 0.01 * ROUNDING


def test_sums_are_float32() -> None:
    """A thousand equal terms: a sum in bfloat16 would stop growing at 256."""
    ones = torch.ones(1, 1_000)
    with asked_for("bfloat16"), lowered():
        assert (ones @ ones.T).item() == 1_000
        assert torch.einsum("md,bd->mb", ones, ones).item() == 1_000


def test_float32_is_the_same_to_the_last_bit_and_so_is_what_comes_after() -> None:
    a, b = torch.rand(5, 7), torch.rand(7, 3)
    plain = a @ b
    with asked_for("float32"), lowered():
        assert torch.equal(a @ b, plain)
    with asked_for("bfloat16"):
        with lowered():
            assert not torch.equal(a @ b, plain)
        assert torch.equal(a @ b, plain)
    with lowered():
        assert torch.equal(a @ b, plain)


def test_other_types_are_left_alone() -> None:
    a = torch.rand(5, 7, dtype=torch.float64)
    plain = a @ a.T
    with asked_for("bfloat16"), lowered():
        assert torch.equal(a @ a.T, plain)


def test_tf32_is_switched_on_for_the_products_alone() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    with asked_for("tf32"):
        assert torch.backends.cuda.matmul.allow_tf32 == before
        with lowered():
            assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32 == before
        with pytest.raises(ZeroDivisionError), lowered():
            raise ZeroDivisionError
    assert torch.backends.cuda.matmul.allow_tf32 == before


class Multiplies(nn.Module):
    """A user's model that multiplies matrices by itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return self.second(hidden @ (hidden.T @ hidden / len(hidden)))


@pytest.mark.parametrize("case", ["tanh", "cnn", "cnn batch norm"])
def test_only_contributions_are_rounded(case: str, tmp_path: Path) -> None:
    training = train(case, "momentum l2", tmp_path)

    def account(precision: str) -> Ledger:
        with asked_for(precision):
            return sweep(training.path, training.subject, *queries(training.subject)).ledger

    exact, rounded = account("float32"), account("bfloat16")
    for row in ("start", "decay", "buffers", "residual", "output"):
        assert torch.equal(getattr(exact, row), getattr(rounded, row)), row
    assert not torch.equal(exact.contributions, rounded.contributions)
    assert torch.cosine_similarity(exact.contributions, rounded.contributions, dim=1).min() > 0.999
    assert torch.allclose(rounded.total(), rounded.output, atol=1e-5)  # what rounding took is in the row `unexplained`


def test_masses_are_not_rounded() -> None:
    """The shift map is made of small differences of masses."""
    subject = Subject(CASES["tanh"].model().eval(), CASES["tanh"].data(COUNT, seed=1), CASES["tanh"].data(4, seed=2))
    state = FlatModel(subject.model).state
    memory = Memory(torch.stack([state, 1.1 * state]), torch.rand(1, 3, len(state)), 1)
    plain = mass(memory, subject, *queries(subject))
    with asked_for("bfloat16"):
        assert torch.equal(mass(memory, subject, *queries(subject)), plain)


def test_a_model_s_own_products_are_not_rounded() -> None:
    model, x = Multiplies().eval(), torch.rand(6, 4)
    flat = FlatModel(model)
    plain = flat.gradient(lambda: flat.model(x).sum())
    with asked_for("bfloat16"):
        assert torch.equal(flat.gradient(lambda: flat.model(x).sum()), plain)


@pytest.mark.parametrize(
    ("precision", "dtype", "device", "message"),
    [
        ("bfloat16", torch.float64, "cpu", "models in float32, this one is in float64"),
        ("tf32", torch.float64, "cuda", "models in float32"),
        ("tf32", torch.float32, "cpu", "needs an accelerator's tensor cores, found --device cpu"),
        ("float16", torch.float32, "cpu", "must be one of float32, tf32, bfloat16, found 'float16'"),
    ],
)
def test_what_makes_no_sense_is_refused(precision: str, dtype: torch.dtype, device: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_precision(precision, nn.Linear(2, 2).to(dtype), device)


def test_what_makes_sense_is_not() -> None:
    check_precision("float32", nn.Linear(2, 2).double(), "cpu")
    check_precision("bfloat16", nn.Linear(2, 2), "cpu")
    check_precision("tf32", nn.Linear(2, 2), "cuda:0")


def test_a_run_knows_its_precision_and_goes_on_in_no_other(tmp_path: Path) -> None:
    data = CASES["tanh"].data(60, seed=1)
    subject = Subject(CASES["tanh"].model().eval(), data, CASES["tanh"].data(60, seed=2))

    def asked(precision: str) -> Asked:
        return Asked(20, 0, "cpu", "quick", None, {}, False, 1 << 30, False, precision=precision)  # type: ignore[arg-type]

    with begin(subject, tmp_path / "run", asked("bfloat16")) as c, lowered():
        assert c.precision == "bfloat16"
        a = torch.rand(5, 7)
        inside = a @ a.T
    assert not torch.equal(inside, a @ a.T)
    assert '"precision": "bfloat16"' in (tmp_path / "run" / "settings.json").read_text()
    with (
        pytest.raises(RunFolderError, match="precision is bfloat16 there and float32 here"),
        begin(subject, tmp_path / "run", asked("float32")),
    ):
        pass


@pytest.mark.parametrize("precision", PRECISIONS)
def test_findings_warn_of_it(precision: str) -> None:
    right = SimpleNamespace(sealed=SimpleNamespace(right=torch.ones(3, dtype=torch.bool)))
    evidence = SimpleNamespace(split=right, families=(), health=[], path=SimpleNamespace(warnings=[]))
    found = facts.warnings(SimpleNamespace(precision=precision, **vars(evidence)))  # type: ignore[arg-type]
    assert [f"made in {precision}" in sentence for sentence in found] == ([] if precision == "float32" else [True])


def test_the_command_line_offers_the_same() -> None:
    assert cli.PRECISIONS == PRECISIONS

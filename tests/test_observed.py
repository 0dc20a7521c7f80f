"""Optimizers whose rule is not known: steps are credited as far as they follow the gradients, and the rest is said."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_hand import ByHand, account, normalized, sgd, tanh
from cases import float64 as float64
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from brittle.errors import PathMismatchError
from brittle.kernel.displacement import displaced, even_cuts
from brittle.mass import class_groups
from brittle.path.flat import FlatModel
from brittle.path.match import check_path
from brittle.path.recipe import OBSERVED
from brittle.path.replay import replay, walk
from brittle.records import Ledger


class Sign(Optimizer):
    """A hand-written rule: the sign of an averaged gradient (Lion without its decay)."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 0.02, betas: tuple[float, float] = (0.9, 0.9)
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("mean", torch.zeros_like(p))
                    m.mul_(group["betas"][0]).add_(p.grad, alpha=1 - group["betas"][0])
                    p.sub_(m.sign(), alpha=group["lr"])


class Copied(SGD):
    """Torch's rule in a class of its own: not known by name."""


class Drifting(SGD):
    """Moves weights by what no gradient asked for."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(0.02 * torch.linspace(-1, 1, p.numel()).view_as(p))


MAKES: dict[str, Callable[[Any], Optimizer]] = {
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.02),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.02),
    "Sign": Sign,
}


def recorded(root: Path, make: Any, steps: int = 8, model: nn.Module | None = None, **asked: Any) -> ByHand:
    loop = ByHand(root, make, model, **asked)
    loop.steps(steps)
    return loop


def assert_balanced(ledger: Ledger) -> None:
    assert torch.allclose(ledger.total(), ledger.output, atol=1e-12)
    learned = (ledger.output - ledger.start).abs().mean()
    assert learned > 1e-2
    assert ledger.residual.abs().max() < 1e-5 * learned


@pytest.mark.parametrize("kind", MAKES)
def test_the_account_closes_and_what_the_gradients_do_not_explain_is_a_row_of_its_own(
    kind: str, tmp_path: Path
) -> None:
    loop = recorded(tmp_path, MAKES[kind])
    path, subject = loop.close(), loop.subject()
    assert (path.optimizer, path.optimizer_name) == (OBSERVED, kind)
    check_path(path, subject)
    ledger = account(path, subject)
    assert_balanced(ledger)
    learned = (ledger.output - ledger.start).abs().mean()
    if kind != "ASGD":  # which is plain descent but for the rounding of its average
        assert ledger.unexplained.abs().min() > 1e-4 * learned
    assert ledger.unexplained.abs().mean() < learned, "gradients explain something"
    assert (ledger.decay == 0).all()


@pytest.mark.parametrize("kind", MAKES)
def test_the_path_warns_of_it(kind: str, tmp_path: Path) -> None:
    loop = recorded(tmp_path, MAKES[kind], steps=2)
    [warning] = loop.close().warnings
    assert f"The rule of the optimizer {kind} is not known" in warning
    assert "what is left is the row `unexplained`" in warning
    assert "states between the stored ones are interpolated" in warning


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.8}, {"momentum": 0.8, "maximize": True}])
@pytest.mark.parametrize("between", ["nothing", "by norm", "by value", "a tensor rests"])
def test_a_rule_that_is_plain_descent_is_explained_to_the_last(
    between: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Each tensor follows its traced gradients, so that credit is that of torch's own SGD, example by example."""
    ledgers, turned = [], -1.0 if settings.get("maximize") else 1.0
    for make in (Copied, SGD):
        loop = ByHand(tmp_path / make.__name__, lambda p, make=make: make(p, lr=0.1, **settings))
        change: dict[str, Callable[[], object]] = {
            "nothing": lambda: None,
            "by norm": lambda loop=loop: nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1),
            "by value": lambda loop=loop: nn.utils.clip_grad_value_(loop.model.parameters(), 0.03),
            "a tensor rests": lambda loop=loop: setattr(loop.model[0].bias, "grad", None),
        }
        for k in range(6):
            loop.optimizer.zero_grad()
            loop.backward(part=turned)
            if k % 2:
                change[between]()
            loop.spend()
        path = loop.close()
        assert path.optimizer == ("SGD" if make is SGD else OBSERVED)
        ledgers.append(account(path, loop.subject(loss=lambda z, y: turned * F.cross_entropy(z, y))))
    observed, known = ledgers
    assert_balanced(observed)
    assert observed.unexplained.abs().max() < 1e-9
    assert torch.allclose(observed.contributions, known.contributions, atol=1e-9)


def test_maximize_does_not_turn_credit_round(tmp_path: Path) -> None:
    ledgers = []
    for maximize in (False, True):
        loop = ByHand(tmp_path / str(maximize), lambda p, m=maximize: torch.optim.Adadelta(p, lr=1.0, maximize=m))
        sign = -1.0 if maximize else 1.0
        for _ in range(5):
            loop.optimizer.zero_grad()
            loop.backward(part=sign)
            loop.spend()
        subject = loop.subject(loss=lambda z, y, sign=sign: sign * F.cross_entropy(z, y))
        ledgers.append(account(loop.close(), subject))
    assert torch.allclose(ledgers[0].contributions, ledgers[1].contributions, atol=1e-10)
    assert torch.allclose(ledgers[0].unexplained, ledgers[1].unexplained, atol=1e-10)


def test_what_no_gradient_asked_for_is_unexplained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    loop = recorded(tmp_path, lambda p: Drifting(p, lr=0.1), steps=6)
    ledger = account(loop.close(), loop.subject())
    assert_balanced(ledger)
    learned = (ledger.output - ledger.start).abs().mean()
    assert ledger.unexplained.abs().mean() > 0.5 * learned


def test_states_between_the_stored_ones_are_interpolated(tmp_path: Path) -> None:
    loop = recorded(tmp_path, MAKES["Adadelta"], steps=24, budget=5000)
    path, subject = loop.close(), loop.subject()
    check_path(path, subject)
    gaps = [(a, b) for a, b in zip(path.marks, path.marks[1:], strict=False) if b - a > 1]
    assert gaps
    start, stop = gaps[0]
    found = replay(path, subject, FlatModel(subject.model), start, stop)
    low, high = path.snapshot(start).state, path.snapshot(stop).state
    assert torch.equal(low, loop.states[start])
    for k, state in enumerate(found.states()):
        assert torch.allclose(state, low + k / (stop - start) * (high - low), atol=1e-12)
    assert found.drift == 0
    ledger = account(path, subject)
    assert_balanced(ledger)
    full = ByHand(tmp_path / "full", MAKES["Adadelta"])
    full.steps(24)
    exact = account(full.close(), full.subject())
    apart = F.cosine_similarity(ledger.contributions, exact.contributions, dim=1)
    assert apart.min() > 0.95


def test_the_groups_displacements_add_up_to_what_is_explained(tmp_path: Path) -> None:
    loop = ByHand(tmp_path, lambda p: Copied(p, lr=0.1, momentum=0.9))
    loop.steps(6)
    path, subject = loop.close(), loop.subject()
    parts = list(displaced(path, subject, class_groups(subject), even_cuts(6, 3)))
    for part in parts:
        assert torch.allclose(part.moved.sum(0), part.high - part.low, atol=1e-10)


def test_running_statistics_have_their_own_row(tmp_path: Path) -> None:
    loop = recorded(tmp_path, MAKES["Sign"], model=normalized())
    ledger = account(loop.close(), loop.subject())
    assert_balanced(ledger)
    assert ledger.buffers.abs().min() > 1e-4


@pytest.mark.parametrize("difference", ["labels", "loss", "features"])
@pytest.mark.parametrize("budget", [1 << 30, 5000])
def test_another_training_is_refused_without_a_replay_as_well(difference: str, budget: int, tmp_path: Path) -> None:
    """At the stored states gradients are exact: their sizes tell other labels, and another loss."""
    loop = recorded(tmp_path, MAKES["Adadelta"], steps=12, budget=budget)
    path, subject = loop.close(), loop.subject()
    if difference == "labels":
        loop.targets = (loop.targets + 1) % 3
    elif difference == "features":
        loop.inputs = loop.inputs.flip(1)
    more = {"loss": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.3)} if difference == "loss" else {}
    subject = loop.subject(**more)
    with pytest.raises(PathMismatchError):
        check_path(path, subject)


def test_recorded_traces_are_those_of_the_settings_momentum(tmp_path: Path) -> None:
    loop = ByHand(tmp_path, lambda p: Copied(p, lr=0.1, momentum=0.5), model=tanh())
    expected: Tensor | None = None
    for _ in range(3):
        loop.optimizer.zero_grad()
        loop.backward()
        gradient = torch.cat([p.grad.reshape(-1) for p in loop.model.parameters()])
        expected = gradient if expected is None else 0.5 * expected + gradient
        loop.spend()
    path = loop.close()
    assert torch.allclose(path.snapshot(3).buffers["trace"], expected)
    assert torch.allclose(path.step(2).extra, torch.full((4,), 0.1))
    assert not any(math.isnan(v) for v in path.step(0).extra.tolist())


def test_a_known_optimizer_is_not_interpolated(tmp_path: Path) -> None:
    loop = recorded(tmp_path, sgd(momentum=0.9), steps=24, budget=5000)
    path, subject = loop.close(), loop.subject()
    states = [s for interval in walk(path, subject, FlatModel(subject.model)) for s in interval.states()[:-1]]
    assert torch.allclose(torch.stack(states), torch.stack(loop.states[:-1]), atol=1e-12)

"""What the kernel of all queries and training examples costs, beside those who compute the same.

    python -m benchmarks.kernel             --quick: a small version

TracInCP (Pruthi et al. 2020, arXiv 2002.08484): 5,000 training images, 50 test images, losses on both sides, three
checkpoints of the Fashion-MNIST CNN, at the ends of three epochs. In alternating rounds, seconds of

    ours             brittle.kernel.matrix.kernel_matrix, as it is
    plain            forward and backward passes over the same examples at the same checkpoints, in batches
    captum_batch     captum's TracInCP with sample_wise_grads_per_batch=True
    captum_default   the same as it is by default, one example at a time: a tenth of them, and ten times the seconds
    dattri           dattri's TracInAttributor, without the random projection that it would apply

The subject is made and the model trained beforehand. Plain passes, captum's batch mode and dattri have the batch size
that was their fastest on a fifth of the data, tried once before the rounds. The keys vs_... are ratios of medians over
the rounds: the peer's seconds over ours, but ours over plain's. `max_relative_difference` is the largest distance from
captum's matrix over its largest entry, `.._dattri` the same of dattri's. A peer that is not installed has null. Peers
get their inputs normalized; ours normalizes by itself.

Captum's own default is a batch of one, and its documentation asks for batches as large as memory allows:
`captum_by_batch_size` has the seconds of its batch mode, once at each size, those two among them, and
`captum_batch_in_plain_passes` its fastest over plain passes. `vs_captum_batch` is of the fastest.

Fashion-MNIST lies in torchvision's layout under BRITTLE_DATA; the peers come with `pip install -e ".[bench]"`.
"""

from __future__ import annotations

import json
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from io import StringIO
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.bars import shown
from benchmarks.data import read
from brittle.data import Examples
from brittle.examples.fashion_mnist import network
from brittle.kernel.matrix import kernel_matrix
from brittle.path.flat import state_of
from brittle.subject import Subject

BATCHES = (64, 128, 256, 512)
BATCH, LR, MOMENTUM, MEAN, STD = 128, 0.05, 0.9, 0.286, 0.353
PART, TRIED = 10, 5
"""One in so many of the examples that captum's default mode has, and that batch sizes are tried on."""

AT_MOST = {"vs_plain_pass": 1.6, "max_relative_difference": 1e-5}
AT_LEAST = {"vs_captum_batch": 15.0, "vs_captum_default": 150.0}


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    images: int = 5_000
    queries: int = 50
    epochs: int = 3
    rounds: int = 5


QUICK = Size(images=300, queries=10, epochs=2, rounds=1)


@dataclass(frozen=True)
class Problem:
    """What all sides are given."""

    train: Examples
    test: Examples
    checkpoints: list[dict[str, Tensor]]

    @cached_property
    def subject(self) -> Subject:
        return Subject(at(self.checkpoints[-1]), self.train, self.test, normalize=(MEAN, STD))

    def one_in(self, part: int) -> Problem:
        """The same with one in so many of the training examples."""
        return replace(self, train=self.train[: len(self.train) // part]) if part > 1 else self

    def tensors(self, examples: Examples) -> tuple[Tensor, Tensor]:
        return (examples.inputs - MEAN) / STD, examples.targets

    def loader(self, examples: Examples, batch: int) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*self.tensors(examples)), batch, shuffle=False)


Side = Callable[[Problem, int], Tensor | None]
"""(problem, batch size) -> the kernel, (M, N); plain passes have none."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status is 1 where a bar is missed, 3 without data."""
    warnings.filterwarnings("ignore", "Input Tensor", module="captum")
    parser = ArgumentParser(prog="python -m benchmarks.kernel", description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small version, in seconds")
    size = QUICK if parser.parse_args(arguments).quick else Size()
    try:
        problem = prepared(size)
    except (KeyError, RuntimeError):
        print("the benchmark needs Fashion-MNIST, found none; name its folder in BRITTLE_DATA", file=sys.stderr)
        return 3
    found = run(problem, size)
    print(table(found))
    print(json.dumps(found))
    return 1 if found["missed"] else 0


def prepared(size: Size) -> Problem:
    """Train the checkpoints: stochastic gradient descent with momentum, on all of the examples."""
    train, test = read(train=True, count=size.images), read(train=False, count=size.queries)
    problem, model = Problem(train, test, []), network(0)
    inputs, targets = problem.tensors(train)
    optimizer, order = torch.optim.SGD(model.parameters(), LR, MOMENTUM), torch.Generator().manual_seed(0)
    for _ in range(size.epochs):
        for ids in torch.randperm(size.images, generator=order).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[ids]), targets[ids]).backward()
            optimizer.step()
        problem.checkpoints.append({name: value.clone() for name, value in model.state_dict().items()})
    return problem


# --------------------------------------------------------------------------------------------------------------- sides


def ours(problem: Problem, batch: int) -> Tensor:
    states = torch.stack([state_of(at(weights)) for weights in problem.checkpoints])
    rates = torch.full((len(states),), LR)
    return kernel_matrix(problem.subject, states, rates, problem.test.inputs, problem.test.targets)


def plain(problem: Problem, batch: int) -> None:
    (inputs, targets), models = problem.tensors(problem.train), [at(weights) for weights in problem.checkpoints]
    for model in models:
        for x, y in zip(inputs.split(batch), targets.split(batch), strict=True):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()


def captum_batch(problem: Problem, batch: int) -> Tensor:
    return captum(problem, batch, nn.CrossEntropyLoss(reduction="sum"), sample_wise_grads_per_batch=True)


def captum_default(problem: Problem, batch: int) -> Tensor:
    return captum(problem, batch, nn.CrossEntropyLoss(reduction="none"))


def captum(problem: Problem, batch: int, loss: nn.Module, **options: Any) -> Tensor:
    from captum.influence import TracInCP

    def load(model: nn.Module, name: str) -> float:
        model.load_state_dict(problem.checkpoints[int(name)])
        return LR

    names = [str(k) for k in range(len(problem.checkpoints))]
    data = TensorDataset(*problem.tensors(problem.train))
    peer = TracInCP(network(0).eval(), data, names, load, loss_fn=loss, batch_size=batch, **options)
    return peer.influence(problem.tensors(problem.test))


def dattri(problem: Problem, batch: int) -> Tensor:
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask

    model = network(0).eval()

    def loss(parameters: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (data[0][None],)), data[1][None])

    task = AttributionTask(loss, model, problem.checkpoints)
    peer = TracInAttributor(task, torch.full((len(problem.checkpoints),), LR), normalized_grad=False)
    peer.projector_kwargs = None
    with redirect_stderr(StringIO()):  # its progress bars
        found = peer.attribute(problem.loader(problem.train, batch), problem.loader(problem.test, len(problem.test)))
    return found.T


SIDES: dict[str, Side] = {side.__name__: side for side in (ours, plain, captum_batch, captum_default, dattri)}


def at(weights: dict[str, Tensor]) -> nn.Module:
    """The network at a checkpoint."""
    model = network(0).eval()
    model.load_state_dict(weights)
    return model


# -------------------------------------------------------------------------------------------------------------- rounds


def run(problem: Problem, size: Size) -> dict[str, Any]:
    """All rounds, and what is made of them."""
    sides = {
        name: side for name, side in SIDES.items() if find_spec(name.partition("_")[0]) or name in ("ours", "plain")
    }
    batches = fastest({name: side for name, side in sides.items() if name != "captum_default"}, problem)
    batches["captum_default"] = 1
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    kernels: dict[str, Tensor | None] = {}
    for k in range(size.rounds):
        for name in list(sides)[:: 1 if k % 2 == 0 else -1]:
            part = PART if name == "captum_default" else 1
            kernels[name], took = timed(sides[name], problem.one_in(part), batches[name])
            seconds[name].append(part * took)
            print(f"round {k + 1}: {name} {part * took:.2f} s", file=sys.stderr, flush=True)
    found = summary(seconds, kernels, batches, size)
    return found | {"captum_by_batch_size": by_batch_size(problem) if "captum_batch" in sides else None}


def by_batch_size(problem: Problem) -> dict[str, float]:
    """Seconds of captum's batch mode: by default a batch has one example, and may have all."""
    found = {}
    for batch in (1, *BATCHES, len(problem.train)):
        found[str(batch)] = timed(captum_batch, problem, batch)[1]
        print(f"captum in batches of {batch}: {found[str(batch)]:.2f} s", file=sys.stderr, flush=True)
    return found


def fastest(sides: dict[str, Side], problem: Problem) -> dict[str, int]:
    """The batch size at which each side is fastest."""
    part, best = problem.one_in(TRIED), {}
    for name, side in sides.items():
        side(part, BATCH)  # what is done once only
        best[name] = BATCH if name == "ours" else min(BATCHES, key=lambda b, side=side: timed(side, part, b)[1])
        print(f"{name}: batches of {best[name]}", file=sys.stderr, flush=True)
    return best


def timed(side: Side, problem: Problem, batch: int) -> tuple[Tensor | None, float]:
    began = perf_counter()
    found = side(problem, batch)
    return found, perf_counter() - began


def summary(
    seconds: dict[str, list[float]], kernels: dict[str, Tensor | None], batches: dict[str, int], size: Size
) -> dict[str, Any]:
    """The figures by key."""
    took = {name: median(values) for name, values in seconds.items()}
    over = lambda name: took[name] / took["ours"] if name in took else None  # noqa: E731
    found: dict[str, Any] = {
        "vs_captum_batch": over("captum_batch"),
        "vs_captum_default": over("captum_default"),
        "vs_captum_default_extrapolated_from": f"1/{PART} of the examples",
        "vs_dattri": over("dattri"),
        "vs_plain_pass": took["ours"] / took["plain"],
        "captum_batch_in_plain_passes": took["captum_batch"] / took["plain"] if "captum_batch" in took else None,
        "max_relative_difference": difference(kernels, "captum_batch"),
        "max_relative_difference_dattri": difference(kernels, "dattri"),
        "max_relative_difference_is": "largest distance of an entry / largest entry of the peer's matrix",
    }
    found |= {f"seconds_{name}": took.get(name) for name in SIDES}
    found |= {"batches": {name: batch for name, batch in batches.items() if name in took and name != "ours"}}
    found |= {"images": size.images, "queries": size.queries, "checkpoints": size.epochs, "rounds": size.rounds}
    found |= {"threads": torch.get_num_threads()}
    return found | {"missed": missed(found)}


def difference(kernels: dict[str, Tensor | None], name: str) -> float | None:
    mine, other = kernels["ours"], kernels.get(name)
    if mine is None or other is None:
        return None
    return ((mine - other).abs().max() / other.abs().max()).item()


def table(found: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"{found['images']} examples, {found['queries']} queries, {found['checkpoints']} checkpoints, "
        f"{found['rounds']} rounds, {found['threads']} threads"
    ]
    for name in SIDES:
        took = found[f"seconds_{name}"]
        note = f"   batches of {found['batches'][name]}" if name in found["batches"] else ""
        note += (
            f", extrapolated from {found['vs_captum_default_extrapolated_from']}" if name == "captum_default" else ""
        )
        lines.append(f"{name:26} " + ("not installed" if took is None else f"{took:9.2f} s{note}"))
    bars = shown(AT_MOST, AT_LEAST)
    keys = [key for key in (*AT_LEAST, "vs_dattri", *AT_MOST) if found[key] is not None]
    return "\n".join(lines + [f"{key:26} {found[key]:9.3g}     {bars.get(key, '')}" for key in keys])


def missed(found: dict[str, Any]) -> list[str]:
    """The bars that are missed; a figure that was not taken misses none."""
    taken = {key: value for key, value in found.items() if value is not None}
    high = [f"{key} {taken[key]:.3g} > {bar:g}" for key, bar in AT_MOST.items() if not taken.get(key, bar) <= bar]
    return high + [
        f"{key} {taken[key]:.3g} < {bar:g}" for key, bar in AT_LEAST.items() if not taken.get(key, bar) >= bar
    ]


if __name__ == "__main__":
    sys.exit(main())

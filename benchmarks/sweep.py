"""What the account of a whole block of queries costs, and whether it is the account.

    python -m benchmarks.sweep

The Fashion-MNIST CNN on 10,000 images, 10 epochs of stochastic gradient descent with momentum; 256 test images. In
alternating rounds: the bare training loop on tensors in RAM, and the sweep over its recorded path, of which every state
was kept, with segments of 40 steps. Then, for the first 32 of the queries, the step-by-step ledger with 16 midpoints in
every step.

    vs_training          seconds of the sweep over seconds of the training, medians of the rounds
    cosine               median over 32 queries, contributions of all examples against the step-by-step ledger
    relative_residual    of the 256 queries; nothing is closed by construction

Fashion-MNIST lies in torchvision's layout under BRITTLE_DATA.
"""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.bars import missed, shown
from benchmarks.data import unnamed
from brittle.examples.fashion_mnist import make, network
from brittle.kernel.sweep import Quadrature, Swept, sweep
from brittle.path.recorder import Recorder
from brittle.path.store import PathReader
from brittle.records import Pairs
from brittle.subject import Subject

QUADRATURE = Quadrature(segment=40, nodes=1, most=81, tolerance=0.05)
STEP_BY_STEP = Quadrature(segment=1, nodes=16, most=16, tolerance=0.0)
BATCH, LR, MOMENTUM = 128, 0.05, 0.9
AT_MOST, AT_LEAST = {"vs_training": 6.0, "relative_residual": 0.05}, {"cosine": 0.99}


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    images: int = 10_000
    epochs: int = 10
    queries: int = 256
    compared: int = 32  # queries with a step-by-step ledger
    rounds: int = 5


QUICK = Size(images=600, epochs=3, queries=16, compared=4, rounds=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status is 1 where a bar is missed."""
    parser = ArgumentParser(prog="python -m benchmarks.sweep", description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small version, in seconds")
    size = QUICK if parser.parse_args(arguments).quick else Size()
    if unnamed():
        return 2
    with TemporaryDirectory() as folder:
        found = run(size, Path(folder))
    print(table(found))
    print(json.dumps(found))
    return 1 if found["missed"] else 0


def run(size: Size, folder: Path) -> dict[str, Any]:
    """All rounds, the comparison, and the table."""
    subject = recorded(size, folder)
    inputs = subject.test.inputs[: size.queries]
    pairs = Pairs.of(subject.predict(inputs))
    assert subject.path is not None
    path = PathReader(subject.path)
    trained, swept, last = [], [], None
    for k in range(size.rounds):
        for what in ("training", "sweep") if k % 2 == 0 else ("sweep", "training"):
            began = perf_counter()
            if what == "training":
                train(subject, size)
                trained.append(perf_counter() - began)
            else:
                last = sweep(path, subject, inputs, pairs, QUADRATURE)
                swept.append(perf_counter() - began)
        print(f"round {k + 1}: {trained[-1]:.2f} s training, {swept[-1]:.2f} s sweep", file=sys.stderr, flush=True)
    assert last is not None
    cosines = agreement(path, subject, last, inputs[: size.compared], pairs[: size.compared])
    found = {
        "vs_training": median(swept) / median(trained),
        "cosine": cosines.median().item(),
        "relative_residual": last.ledger.relative_residual,
        "relative_unexplained": last.ledger.relative_unexplained,
        "cosine_p5": cosines.quantile(0.05).item(),
        "seconds_training": median(trained),
        "seconds_sweep": median(swept),
        "passes_per_query": (last.evaluations - path.visits) / size.queries,
        "steps": path.steps,
        "queries": size.queries,
        "rounds": size.rounds,
        "segment": QUADRATURE.segment,
        "threads": torch.get_num_threads(),
    }
    return found | {"missed": missed(found, AT_MOST, AT_LEAST)}


def recorded(size: Size, folder: Path) -> Subject:
    """The subject: its training recorded once, outside of the rounds, every state of it (180 MB)."""
    subject, path = make(epochs=1, limit=size.images, cache=str(folder / "data")), folder / "path"
    return replace(subject, model=train(subject, size, path), path=path)


def train(subject: Subject, size: Size, path: Path | None = None) -> nn.Module:
    """Stochastic gradient descent with momentum and a cosine on tensors in RAM; bare where no path is named."""
    model, order, (mean, std) = network(0).train(), torch.Generator().manual_seed(0), subject.normalize or (0, 1)
    inputs, targets = (subject.train.inputs - mean) / std, subject.train.targets
    optimizer = SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    schedule = CosineAnnealingLR(optimizer, size.epochs * -(-len(inputs) // BATCH))
    with Recorder(model, optimizer, path, writing=math.inf) if path else nullcontext() as recorder:
        for _ in range(size.epochs):
            for ids in torch.randperm(len(inputs), generator=order).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs[ids]), targets[ids]).backward()
                if recorder:
                    recorder.batch(ids)
                optimizer.step()
                schedule.step()
    return model.eval()


def agreement(path: PathReader, subject: Subject, swept: Swept, inputs: Tensor, pairs: Pairs) -> Tensor:
    """Cosine of some queries' contributions with those of the step-by-step ledger, (queries,)."""
    fine = sweep(path, subject, inputs, pairs, STEP_BY_STEP, progress=_say)
    print(f"step by step: residual {fine.ledger.relative_residual:.4f}", file=sys.stderr, flush=True)
    return F.cosine_similarity(swept.ledger.contributions[: len(inputs)], fine.ledger.contributions, dim=1)


def _say(done: int, total: int) -> None:
    if done % 100 == 0:
        print(f"step by step: {done}/{total}", file=sys.stderr, flush=True)


def table(found: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"{found['queries']} queries, {found['steps']} steps, segments of {found['segment']}, {found['rounds']} rounds,"
        f" {found['threads']} threads, {found['passes_per_query']:.0f} gradient passes a query",
        f"training           {found['seconds_training']:8.2f} s",
        f"sweep              {found['seconds_sweep']:8.2f} s",
    ]
    bars, keys = shown(AT_MOST, AT_LEAST), ("vs_training", "cosine", "relative_residual")
    return "\n".join(lines + [f"{key:18} {found[key]:8.4f}   {bars[key]}" for key in keys])


if __name__ == "__main__":
    sys.exit(main())

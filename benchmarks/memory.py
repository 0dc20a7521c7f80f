"""What the mass of a probe costs, and whether its shift is the shift.

    python -m benchmarks.memory             --quick: a small version

The Fashion-MNIST CNN on 10,000 images, 10 epochs of stochastic gradient descent with momentum, a memory of `SEGMENTS`
segments cut by length with one node each; 200 test images and, of each, probes of every image family at the two
severities that the shift map looks at. The shifts by class are held against the step-by-step account, in which every
step is a segment of its own; that one is held, for a few of the queries, against plain midpoints in every step, which
know nothing of kinks.

    forward_passes          seconds of the mass of a batch, over those of a pass forward without gradients
    shift_cosine, .._p5     over all probes, to the step-by-step account
    top_leaving_agreement   the same class loses most
    shift_residual          mean |residual of the shift| / mean |shift of the output|; nothing is closed
    class_cosine            of the queries' masses
    cost_ratio_n            seconds of the mass, from 60,000 images over 6,000; one epoch, as many segments

Fashion-MNIST lies in torchvision's layout under BRITTLE_DATA.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.bars import missed, shown
from benchmarks.data import read
from brittle.examples.fashion_mnist import network
from brittle.examples.training import Recipe, trained
from brittle.kernel.directional import Directional
from brittle.kernel.displacement import displaced, length_cuts
from brittle.kernel.memory import Memory, build, fine_mass, mass, one_segment
from brittle.kernel.quadrature import outputs_at
from brittle.mass import class_groups
from brittle.path.flat import FlatModel
from brittle.path.store import PathReader
from brittle.probes import MAP_SHARES, image_families
from brittle.records import Pairs
from brittle.shift import probe_inputs
from brittle.subject import Subject

SEGMENTS, MIDPOINTS = 26, 8
AT_MOST = {"forward_passes": 400.0, "shift_residual": 0.3, "cost_ratio_n": 1.05}
AT_LEAST = {"shift_cosine": 0.98, "shift_cosine_p5": 0.8, "top_leaving_agreement": 0.85, "class_cosine": 0.999}


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    images: int = 10_000
    epochs: int = 10
    queries: int = 200
    checked: int = 2  # queries with plain midpoints in every step
    timed: int = 256  # inputs of a batch
    rounds: int = 7
    small: int = 6_000
    large: int = 60_000


QUICK = Size(images=600, epochs=3, queries=8, checked=2, timed=32, rounds=1, small=300, large=600)


@dataclass(frozen=True)
class Probed:
    """Queries, then R probes of each, family by family."""

    inputs: Tensor  # shape: (M + M R, *input)
    pairs: Pairs
    queries: int

    def shift(self, values: Tensor) -> Tensor:
        """Change from each query to its probes, (M + M R, ...) -> (M, R, ...)."""
        return values[self.queries :].unflatten(0, (self.queries, -1)) - values[: self.queries, None]

    def first(self, queries: int) -> Probed:
        """The first queries with their probes."""
        each = len(self.inputs) // self.queries - 1
        rows = torch.cat([torch.arange(queries), self.queries + torch.arange(queries * each)])
        return Probed(self.inputs[rows], self.pairs[rows], queries)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status is 1 where a bar is missed."""
    parser = ArgumentParser(prog="python -m benchmarks.memory", description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small version, in seconds")
    parser.add_argument("--queries", type=int, help="of which shifts are compared; 200 where left out")
    asked = parser.parse_args(arguments)
    size = QUICK if asked.quick else Size(queries=asked.queries or Size.queries)
    if not os.environ.get("BRITTLE_DATA"):
        sys.exit("benchmarks.memory needs BRITTLE_DATA, the folder in which torchvision's FashionMNIST/ lies")
    with TemporaryDirectory() as folder:
        found = run(size, Path(folder))
    print(table(found))
    print(json.dumps(found))
    return 1 if found["missed"] else 0


def run(size: Size, folder: Path) -> dict[str, Any]:
    """Times, then shifts."""
    subject = recorded(size.images, size.epochs, folder / "shifts")
    memory = remembered(subject)
    probes = probed(subject, size.queries)
    found = costs(subject, memory, probes, size) | {"cost_ratio_n": ratio(size, folder)}
    print(found, file=sys.stderr, flush=True)
    found |= shifts(subject, memory, probes, size)
    found |= {"segments": memory.segments, "nodes": memory.evaluations, "threads": torch.get_num_threads()}
    return found | {"missed": missed(found, AT_MOST, AT_LEAST)}


def recorded(images: int, epochs: int, folder: Path) -> Subject:
    """A training on the first images, recorded."""
    train = read(train=True, count=images)
    std, mean = torch.std_mean(train.inputs)
    recipe = Recipe(mean.item(), std.item(), epochs=epochs, batch=128, lr=0.05, seed=0)
    model, path = trained(network, train, recipe, folder, bar="")
    return Subject(model, train=train, test=read(train=False), normalize=(recipe.mean, recipe.std), path=path)


def remembered(subject: Subject) -> Memory:
    """The memory of each class."""
    path = opened(subject)
    cuts = length_cuts(path, range(path.steps + 1), SEGMENTS)
    return build(path, subject, class_groups(subject), nodes=1, cuts=cuts, progress=_said("building the memory"))


def probed(subject: Subject, queries: int) -> Probed:
    """Random test images and their probes."""
    ids = torch.randperm(len(subject.test), generator=torch.Generator().manual_seed(0))[:queries]
    inputs = subject.test.inputs[ids]
    pairs, draw = Pairs.of(subject.predict(inputs)), torch.Generator().manual_seed(1)
    families = image_families(tuple(inputs.shape[1:]), subject.bounds)
    probes = torch.cat([probe_inputs(inputs, f, f.draw(inputs, draw), MAP_SHARES) for f in families], dim=1)
    every = Pairs.join(pairs, pairs.repeat_interleave(probes.shape[1]))
    return Probed(torch.cat([inputs, probes.flatten(0, 1)]), every, queries)


def shifts(subject: Subject, memory: Memory, probes: Probed, size: Size) -> dict[str, Any]:
    """Shifts of the memory against the step-by-step account, and the latter against plain midpoints."""
    path, groups, asked = opened(subject), class_groups(subject), (probes.inputs, probes.pairs)
    ours = mass(memory, subject, *asked)
    fine = fine_mass(path, subject, groups, *asked, path.steps, 1, progress=_said("step by step"))
    few = probes.first(size.checked)
    plain = few.shift(midpoints(path, subject, few)[:, :-1])
    flat = FlatModel(subject.model)
    start, output = (outputs_at(subject, flat, path.snapshot(at).state, *asked).double() for at in (0, path.steps))
    own, expected = (probes.shift(m[:, :-1]) for m in (ours, fine))
    cosines = torch.cosine_similarity(own, expected, dim=-1)
    check = torch.cosine_similarity(expected[: few.queries], plain, dim=-1)
    missing = [probes.shift(output - start - m.sum(1)).abs().mean() for m in (ours, fine)]
    residuals = [(m / probes.shift(output).abs().mean()).item() for m in missing]
    return {
        "shift_cosine": cosines.median().item(),
        "shift_cosine_p5": cosines.flatten().quantile(0.05).item(),
        "top_leaving_agreement": (own.argmin(-1) == expected.argmin(-1)).double().mean().item(),
        "shift_residual": residuals[0],
        "class_cosine": torch.cosine_similarity(ours[: probes.queries], fine[: probes.queries], dim=1).median().item(),
        "queries": probes.queries,
        "probes": cosines.numel(),
        "step_by_step_residual": residuals[1],
        "step_by_step_cosine": check.median().item(),
        "step_by_step_cosine_p5": check.flatten().quantile(0.05).item(),
        "checked": few.queries,
        "by_family": by_family(subject, cosines),
    }


def by_family(subject: Subject, cosines: Tensor) -> dict[str, list[float]]:
    """Median and 5th percentile of cosines (M, F K) by family."""
    families = image_families(tuple(subject.train.inputs.shape[1:]), subject.bounds)
    parts = cosines.unflatten(1, (len(families), -1))
    quantiles = [
        parts[:, f].flatten().quantile(torch.tensor([0.5, 0.05], dtype=parts.dtype)) for f in range(len(families))
    ]
    return {family.name: found.tolist() for family, found in zip(families, quantiles, strict=True)}


def midpoints(path: PathReader, subject: Subject, probes: Probed) -> Tensor:
    """The step-by-step account by midpoints that hit or miss each kink, (R, G + 1)."""
    along = Directional(subject)
    carried = along.at(probes.inputs, probes.pairs)
    total = torch.zeros(len(probes.inputs), subject.classes + 1, dtype=torch.float64)
    say = _said("plain midpoints")
    for part in displaced(path, subject, class_groups(subject), range(path.steps + 1), progress=say):
        for state, moved in one_segment(part, MIDPOINTS).points():
            total += carried.backward(state, state, moved).double()
    return total


def costs(subject: Subject, memory: Memory, probes: Probed, size: Size) -> dict[str, Any]:
    """The mass of a batch in passes forward, in alternating rounds."""
    inputs, pairs = probes.inputs[: size.timed], probes.pairs[: size.timed]
    passes = lambda: [subject.class_logits(subject.model, inputs) for _ in range(SEGMENTS)]  # noqa: E731
    with torch.no_grad():
        masses, forward = alternating(lambda: mass(memory, subject, inputs, pairs), passes, size.rounds)
    return {
        "forward_passes": masses * SEGMENTS / forward,
        "seconds_mass": masses / len(inputs),
        "seconds_forward": forward / SEGMENTS / len(inputs),
    }


def ratio(size: Size, folder: Path) -> float:
    """Seconds of the mass from a training on many images, over those from one on few."""
    subjects = [recorded(images, 1, folder / str(images)) for images in (size.large, size.small)]
    memories = [remembered(subject) for subject in subjects]
    inputs = subjects[0].test.inputs[: size.timed]
    pairs = Pairs.of(subjects[0].predict(inputs))
    runs = [lambda m=m, s=s: mass(m, s, inputs, pairs) for m, s in zip(memories, subjects, strict=True)]  # type: ignore[misc]
    large, small = alternating(*runs, size.rounds)
    return large / memories[0].evaluations / (small / memories[1].evaluations)


def alternating(one: Callable[[], object], other: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median seconds of both, which take turns in going first."""
    seconds: tuple[list[float], list[float]] = ([], [])
    one(), other()
    for k in range(rounds):
        for which in (0, 1) if k % 2 == 0 else (1, 0):
            began = perf_counter()
            (one, other)[which]()
            seconds[which].append(perf_counter() - began)
    return median(seconds[0]), median(seconds[1])


def opened(subject: Subject) -> PathReader:
    """Its path."""
    assert subject.path is not None
    return PathReader(subject.path)


def table(found: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"{found['queries']} queries, {found['probes']} probes, {found['segments']} segments, {found['nodes']} nodes, "
        f"{found['threads']} threads; mass {1e3 * found['seconds_mass']:.2f} ms an input, a pass forward "
        f"{1e6 * found['seconds_forward']:.1f} us",
        *[f"{key:22} {found[key]:9.4f}   {bar}" for key, bar in shown(AT_MOST, AT_LEAST).items()],
        f"step by step: residual {found['step_by_step_residual']:.4f}, cosine to {MIDPOINTS} plain midpoints a step "
        f"{found['step_by_step_cosine']:.4f} (5th percentile {found['step_by_step_cosine_p5']:.3f}, "
        f"{found['checked']} queries)",
        *[f"  {name:12} cosine {m:.4f}, 5th percentile {low:.3f}" for name, (m, low) in found["by_family"].items()],
    ]
    return "\n".join(lines)


def _said(what: str) -> Callable[[int, int], None]:
    """Progress on standard error, every hundred steps."""
    return lambda done, total: done % 100 or print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)  # type: ignore[func-returns-value]


if __name__ == "__main__":
    sys.exit(main())

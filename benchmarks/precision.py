"""What rounding the operands of products does to contributions and to shifts.

    python -m benchmarks.precision             --quick: a small version

10,000 images of Fashion-MNIST, the CNN after ten epochs, 16 test images and 14 probes of each: seven image families at
two severities, as in `benchmarks.memory`. In bfloat16 against float32:

    contributions    of the account: cosine over the examples, and over sums by class
    residual         of the account, before and after
    masses, shifts   by class, of the group memory, were its products rounded too (`brittle` leaves these in float32)

Operands are rounded as on an accelerator; nothing is timed.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.data import unnamed
from benchmarks.memory import Probed, probed, recorded, remembered
from brittle.kernel.memory import mass
from brittle.kernel.precision import asked_for, lowered
from brittle.kernel.sweep import sweep
from brittle.path.store import PathReader
from brittle.records import Ledger
from brittle.subject import Subject


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m benchmarks.precision", description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small version, in seconds")
    images, epochs, queries = (600, 3, 4) if parser.parse_args(arguments).quick else (10_000, 10, 16)
    if unnamed():
        return 2
    with TemporaryDirectory() as folder:
        subject = recorded(images, epochs, Path(folder))
        probes = probed(subject, queries)
        found = of_account(subject, probes) | of_shifts(subject, probes)
    print("\n".join(f"{key:36} {value:.6g}" for key, value in found.items()))
    print(json.dumps(found))
    return 0


def of_account(subject: Subject, probes: Probed) -> dict[str, Any]:
    """The account of the queries."""
    exact, rounded = (account(subject, probes, precision) for precision in ("float32", "bfloat16"))
    one, other = exact.contributions, rounded.contributions
    sums = [
        torch.zeros(len(one), subject.classes).double().index_add(1, subject.train.targets, c) for c in (one, other)
    ]
    learned = (exact.output - exact.start).abs().mean()
    return {
        **spread("contributions_cosine", torch.cosine_similarity(one, other, dim=1)),
        **spread("class_sums_cosine", torch.cosine_similarity(*sums, dim=1)),
        "sum_off_over_learned": ((one.sum(1) - other.sum(1)).abs().mean() / learned).item(),
        "cancellation": exact.cancellation.median().item(),
        "residual_float32": exact.relative_residual,
        "residual_bfloat16": rounded.relative_residual,
        "unexplained_float32": exact.relative_unexplained,
        "unexplained_bfloat16": rounded.relative_unexplained,
    }


def account(subject: Subject, probes: Probed, precision: str) -> Ledger:
    assert subject.path is not None
    inputs, pairs = probes.inputs[: probes.queries], probes.pairs[: probes.queries]
    with asked_for(precision):
        return sweep(PathReader(subject.path), subject, inputs, pairs).ledger


def of_shifts(subject: Subject, probes: Probed) -> dict[str, Any]:
    """Masses and shifts of the group memory, its products rounded and not."""
    memory = remembered(subject)
    exact = mass(memory, subject, probes.inputs, probes.pairs)[:, :-1]
    with asked_for("bfloat16"), lowered():
        rounded = mass(memory, subject, probes.inputs, probes.pairs)[:, :-1]
    one, other = probes.shift(exact).flatten(0, 1), probes.shift(rounded).flatten(0, 1)
    return {
        **spread("class_masses_cosine", torch.cosine_similarity(exact, rounded, dim=1)),
        **spread("shift_cosine", torch.cosine_similarity(one, other, dim=1)),
        "shift_distance": ((one - other).norm(dim=1) / one.norm(dim=1)).median().item(),
        "top_leaving_agreement": (one.argmin(1) == other.argmin(1)).double().mean().item(),
    }


def spread(name: str, values: Tensor) -> dict[str, float]:
    """Median and 5th percentile."""
    return {name: values.median().item(), f"{name}_p5": values.quantile(0.05).item()}


if __name__ == "__main__":
    sys.exit(main())

"""Predicted failures, put to the test.

    python -m benchmarks.prediction [--quick] [--only PART ...] [--sets SET ...] [--cache DIR]

    natural   errors on clean images, on three data sets              natural, natural_wins, incremental_wins
    probes    errors under seven families of small changes            probes, probe_wins
    radius    the minimal adversarial distance                        radius_standard, radius_robust, radius_wins
    planted   regions with known members                              planted.found, planted.false_findings

Everything that is fitted is fitted on calibration images; the labels of the sealed ones are given out once a run, after
predictions are fixed. `benchmarks/prediction.md` has the record, with what was tried and did not help.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bars import missed, shown
from benchmarks.prediction import natural, planted, probes, radius
from benchmarks.prediction.known import known
from benchmarks.prediction.networks import FULL, QUICK, SETS, Networks, Size, networks
from benchmarks.prediction.probed import families, probed
from benchmarks.prediction.scores import scores
from brittle.examples.fashion_mnist import ROOT
from brittle.pipeline.opening import digest_of

PARTS = ("natural", "probes", "radius", "planted")
AT_LEAST = {"natural_wins": 3, "incremental_wins": 2, "probe_wins": 2}
AT_LEAST |= radius.AT_LEAST
AT_LEAST |= {f"planted.{key}": bar for key, bar in planted.AT_LEAST.items()}
AT_MOST = {f"planted.{key}": bar for key, bar in planted.AT_MOST.items()}


def images(size: Size, root: Path, cache: Path, parts: Sequence[str], sets: Sequence[str]) -> dict[str, Any]:
    """Natural errors and errors under probes, data set by data set."""
    found: dict[str, Any] = {part: {} for part in parts}
    for of in [of for of in SETS if parts and of.name in sets]:
        folder = cache / of.name
        nets = networks(of, size, root, folder)
        facts = [known(s, folder / f"seed{k}") for k, s in enumerate(nets.subjects)]
        tables = [scores(fact, nets.logits) for fact in facts]
        said, under = [], []
        if "natural" in parts:
            said = [natural.predicted(nets, k, table, folder / f"seed{k}") for k, table in enumerate(tables)]
        if "probes" in parts:
            rows, known_labels = _probed_rows(nets, size.probed)
            for k, (subject, fact, table) in enumerate(zip(nets.subjects, facts, tables, strict=True)):
                seen = probed(subject, rows, folder / f"seed{k}")
                under.append(probes.predicted(table, fact, seen, rows, known_labels, folder / f"seed{k}"))
        labels = nets.envelope.open(digest_of([said, under]))
        if said:
            found["natural"][of.name] = natural.judged(said, labels, size.resamples)
            print(natural.shown(of.name, found["natural"][of.name]), flush=True)
        if under:
            names = [family.name for family in families(nets.subjects[0])]
            found["probes"][of.name] = probes.judged(under, labels[: size.probed[1]], names, size.resamples)
            print(probes.shown(of.name, found["probes"][of.name]), flush=True)
    return found


def _probed_rows(nets: Networks, counts: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The first so many of the calibration part and of the sealed part, and the labels of the former."""
    every, parts = torch.arange(len(nets.logits[0])), (nets.calibration, nets.sealed)
    rows = torch.cat([every[part][:count] for part, count in zip(parts, counts, strict=True)])
    return rows, nets.subjects[0].test.targets[: counts[0]]


def run(size: Size, root: Path, cache: Path, quick: bool, parts: Sequence[str], sets: Sequence[str]) -> dict[str, Any]:
    """The parts that are asked for, one after the other."""
    found = images(size, root, cache, [p for p in parts if p in ("natural", "probes")], sets)
    if "natural" in parts:
        each = found["natural"].values()
        found["natural_wins"] = sum(row["natural_win"] for row in each)
        found["incremental_wins"] = sum(row["incremental_win"] for row in each)
    if "probes" in parts:
        found["probe_wins"] = sum(row["probe_win"] for row in found["probes"].values())
    if "radius" in parts:
        found |= radius.run(cache / "radius", quick)
    if "planted" in parts:
        found["planted"] = planted.run(root, cache / "planted", quick)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table, then one line of JSON. Exit status 1 where a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prediction")
    parser.add_argument("--quick", action="store_true", help="a few hundred images of each data set; says nothing")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the parts")
    names = [of.name for of in SETS]
    parser.add_argument("--sets", nargs="+", choices=names, default=names, help="some of the data sets of images")
    parser.add_argument("--cache", type=Path, default=Path("runs/.benchmarks/prediction"))
    asked = parser.parse_args(arguments)
    if not os.environ.get(ROOT):
        print(f"{ROOT} must name the folder that holds MNIST/, FashionMNIST/ and cifar10/", file=sys.stderr)
        return 2
    cache = asked.cache / "quick" if asked.quick else asked.cache
    result = run(QUICK if asked.quick else FULL, Path(os.environ[ROOT]), cache, asked.quick, asked.only, asked.sets)
    found = result | {f"planted.{key}": value for key, value in result.get("planted", {}).items()}
    least, most = ({key: bar for key, bar in bars.items() if key in found} for bars in (AT_LEAST, AT_MOST))
    for key, bar in shown(most, least).items():
        print(f"{key:48s}{found[key]:<10.4g}{bar}")
    result["missed"] = [] if asked.quick else missed(found, most, least)
    print(json.dumps(result))
    return 1 if result["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())

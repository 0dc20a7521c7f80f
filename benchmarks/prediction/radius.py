"""The minimal adversarial distance, predicted.   python -m benchmarks.prediction.radius [--quick] [--cache DIR]

A plainly (L2) and an adversarially (Linf) trained MNIST network, the ones of `benchmarks.attacks`. On 500 calibration
images small models are fitted, 1,000 other ones are predicted, all of them right when clean (`distances`):

    radius_standard, radius_robust   Spearman of our prediction with the distance
    radius_wins                      networks on which ours adds to all baselines together: the linear *and* the boosted
                                     model of both sides against that of the baselines, interval above 0

Every score is shown by itself as well. What each prediction costs is counted in gradient passes, those through the
final weights apart from those through other weights of the path. MNIST lies in torchvision's layout under BRITTLE_DATA.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.attacks.networks import FULL as FULL_NETWORKS
from benchmarks.attacks.networks import QUICK as QUICK_NETWORKS
from benchmarks.attacks.networks import Size, subjects
from benchmarks.bars import missed, shown
from benchmarks.prediction.distances import Measured, measured
from benchmarks.prediction.fitted import MODELS, figure, fitted, follows, weights_for
from benchmarks.prediction.radius_scores import FINAL_PASSES, PATH_PASSES, Side, alone, ours, theirs
from brittle.accounts import open_path
from brittle.agreement.metrics import Resampled
from brittle.records import Norm
from brittle.subject import Subject

CACHE = Path("runs/.benchmarks/attacks")
NETWORKS: dict[str, tuple[str, Norm]] = {"standard": ("plain", "l2"), "robust": ("robust", "linf")}
NAMED = "ridge"
"""The model of our scores alone that is our prediction, settled on the development images."""

AT_LEAST = {"radius_standard": 0.97, "radius_robust": 0.93, "radius_wins": 1}


@dataclass(frozen=True)
class Amount:
    """How much is trained, attacked and predicted."""

    networks: Size
    calibration: int
    sealed: int
    preset: str


FULL, QUICK = Amount(FULL_NETWORKS, 500, 1000, "standard"), Amount(QUICK_NETWORKS, 60, 60, "quick")


def run(cache: Path = CACHE, quick: bool = False) -> dict[str, Any]:
    """Everything that `radius_*` names, and the table under `radius`. cache: of networks and distances."""
    return measure(QUICK if quick else FULL, cache)


def measure(amount: Amount, cache: Path) -> dict[str, Any]:
    """Train, attack, predict, and hold one against the other."""
    made = subjects(amount.networks, cache)
    rows = {}
    for key, (name, norm) in NETWORKS.items():
        parts = (("calibration", amount.calibration), ("sealed", amount.sealed))
        folder = cache / f"distances-{name}"
        known, asked = (measured(made[name], part, norm, n, amount.preset, folder) for part, n in parts)
        rows[key] = network(made[name], norm, known, asked)
        _show(key, norm, rows[key])
    return {
        **{f"radius_{key}": row["ours"]["value"] for key, row in rows.items()},
        "radius_wins": sum(_adds(row["gain"]) for row in rows.values()),
        "radius_path_wins": sum(_adds(row["path_gain"]) for row in rows.values()),
        "radius_passes": {"final": FINAL_PASSES, "path": PATH_PASSES},
        "radius": rows,
    }


def _adds(gain: dict[str, Any]) -> bool:
    """Whether both models gain, their intervals above 0; not where a gain is not defined."""
    return all(gain[model]["low"] is not None and gain[model]["low"] > 0 for model in MODELS)


def network(subject: Subject, norm: Norm, known: Measured, asked: Measured) -> dict[str, Any]:
    """One network: every score, both sides, their models, and what ours adds."""
    path, typical = open_path(subject), known.distance.median().item()
    assert path is not None
    every = FINAL_PASSES + PATH_PASSES
    baseline = [theirs(subject, path, m.queries, norm, FINAL_PASSES, every, typical) for m in (known, asked)]
    mine = [ours(subject, path, m.queries, norm, typical) for m in (known, asked)]
    search = [alone(subject, m.queries, norm, typical) for m in (known, asked)]
    weights = weights_for(len(asked))

    def held(*sides: Sequence[Side]) -> dict[str, Resampled]:
        old, new = (sum(parts[1:], parts[0]) for parts in zip(*sides, strict=True))
        models = fitted(old.values, known.distance, new.values, old.marks)
        return {name: follows(models[name], asked.distance, weights) for name in MODELS}

    told, base, plain, both = held(mine), held(baseline), held(baseline, search), held(baseline, mine)
    every_score = (baseline[1], search[1], mine[1])
    each = {name: follows(-side[name], asked.distance, weights) for side in every_score for name in side.scores}
    return {
        "inputs": len(asked),
        "distance": asked.distance.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist(),
        "ours": figure(told[NAMED]),
        "ours_together": {name: figure(told[name]) for name in MODELS},
        "search_alone": {name: figure(found) for name, found in held(search).items()},
        "scores": {name: figure(found) for name, found in each.items()},
        "baselines_together": {name: figure(base[name]) for name in MODELS},
        "with_search": {name: figure(plain[name]) for name in MODELS},
        "all_together": {name: figure(both[name]) for name in MODELS},
        "gain": {name: figure(both[name] - base[name]) for name in MODELS},
        "path_gain": {name: figure(both[name] - plain[name]) for name in MODELS},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table, then one line of JSON. Exit status 1 where a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prediction.radius")
    parser.add_argument("--quick", action="store_true", help="hardly trained networks, few images")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the trained networks and the distances")
    asked = parser.parse_args(arguments)
    result = run(asked.cache, asked.quick)
    result["missed"] = [] if asked.quick else missed(result, {}, AT_LEAST)
    for key, bar in shown({}, AT_LEAST).items():
        print(f"{key:48s}{result[key]:.4f}  {bar}")
    print(json.dumps(result))
    return 1 if result["missed"] else 0


def _show(key: str, norm: Norm, row: dict[str, Any]) -> None:
    """The table of one network."""
    low, middle, high = row["distance"]
    print(f"{key}, {norm}, {row['inputs']} images at a distance of {middle:.4f} ({low:.4f} to {high:.4f})")
    lines = dict(row["scores"])
    for name in (
        "search_alone",
        "ours_together",
        "baselines_together",
        "with_search",
        "all_together",
        "gain",
        "path_gain",
    ):
        lines |= {f"{name.replace('_', ' ')}, {model}": row[name][model] for model in MODELS}
    for name, found in lines.items():
        told = "-" if found["value"] is None else "{value:+.4f} [{low:+.4f}, {high:+.4f}]".format(**found)
        print(f"  {name:46s}{told}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.attacks`: a table, progress on standard error, and one line of JSON at the end.

--quick   small networks, two dozen images, the quick preset        --only envelopes|alone|map|auto|overhead   a part
--cache   folder of the trained networks, by default runs/.benchmarks/attacks
MNIST lies in torchvision's layout under BRITTLE_DATA. Brendel-Bethge needs numba, and `auto` needs pyautoattack;
what is missing is named, and its figures are null.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.attacks import measure
from benchmarks.attacks.networks import FULL, QUICK, subjects

PARTS = ("envelopes", "alone", "map", "auto", "overhead")
BARS = {
    "envelope_worst_ratio": 1.0,
    "envelope_robust_linf": 0.97,
    "hole_seeking_worst_ratio": 1.0,
    "autoattack_gap": 0.5,
    "evaluations_ratio": 0.5,
    "overhead": 1.15,
}
"""Each at most."""

MAP_WINS = 2
"""Settings of four in which the map must gain."""

KEYS = (*BARS, "envelope_ratio", "hole_seeking_ratio", "map_gain", "map_wins")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts asked for; the exit status is 1 where a bar is missed."""
    asked = _parser().parse_args(arguments)
    parts = PARTS if asked.only is None else (asked.only,)
    size, preset = (QUICK, "quick") if asked.quick else (FULL, "standard")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    found: dict[str, Any] = dict.fromkeys(KEYS)
    made = subjects(size, Path(asked.cache))
    per: dict[str, dict[str, Any]] = {"envelopes": {}, "alone": {}, "map": {}}
    for name, subject in made.items():
        queries = measure.right_queries(subject, size.images)
        guide = measure.guide_of(subject) if {"alone", "map"} & set(parts) else None
        for norm in measure.NORMS:
            print(f"{name}, {norm}, {len(queries)} images", flush=True)
            if "envelopes" in parts:
                per["envelopes"][f"{name}_{norm}"] = measure.envelopes(subject, queries, norm, preset)
            for budget in measure.BUDGETS[: 1 if asked.quick else None]:
                key = f"{name}_{norm}_{budget}"
                if guide is None:
                    break
                if "alone" in parts:
                    per["alone"][key] = measure.alone(subject, queries, norm, budget, guide)
                if "map" in parts:
                    per["map"][key] = measure.map_gain(subject, queries, norm, budget, guide)
        if name == "robust" and "auto" in parts:
            against = measure.against_auto_attack(subject, queries, preset)
            found |= (
                {"autoattack_gap": against["gap"], "evaluations_ratio": against["evaluations_ratio"]} if against else {}
            )
        if name == "plain" and "overhead" in parts:
            found["overheads"] = measure.overhead(subject, queries)
            found["overhead"] = max(found["overheads"].values())
    found |= _summary(per)
    found["missed"] = _missed(found)
    print(json.dumps(found))
    return 1 if found["missed"] and not asked.quick else 0


def _summary(per: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures over all settings."""
    out: dict[str, Any] = {}
    if per["envelopes"]:
        ratios = {key: value["ratio"] for key, value in per["envelopes"].items()}
        out |= {"envelope_ratio": ratios, "envelope_worst_ratio": max(ratios.values()), "envelopes": per["envelopes"]}
        out["envelope_robust_linf"] = ratios["robust_linf"]
    if per["alone"]:
        ratios = {key: value["ratio"] for key, value in per["alone"].items()}
        out |= {"hole_seeking_ratio": ratios, "hole_seeking_worst_ratio": max(ratios.values())}
        out["hole_seeking"] = per["alone"]
    if per["map"]:
        wins = {b: sum(v["low"] > 0 for k, v in per["map"].items() if k.endswith(f"_{b}")) for b in measure.BUDGETS}
        out |= {"map_gain": per["map"], "map_wins": wins[measure.BUDGETS[0]], "map_wins_by_budget": wins}
    return out


def _missed(found: dict[str, Any]) -> list[str]:
    """Bars that a figure misses; what was not measured misses none."""
    over = [key for key, bar in BARS.items() if found.get(key) is not None and not found[key] <= bar]
    over += ["map_wins"] if found["map_wins"] is not None and found["map_wins"] < MAP_WINS else []
    costly = [key for key, value in found.get("envelopes", {}).items() if not value["within_budget"]]
    return over + [f"evaluations of {key}" for key in costly]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks", description=__doc__)
    parser.add_argument("--only", choices=PARTS, help="one part alone")
    parser.add_argument("--quick", action="store_true", help="small and short, as a smoke test")
    parser.add_argument("--cache", default="runs/.benchmarks/attacks", help="folder of the trained networks")
    return parser


if __name__ == "__main__":
    sys.exit(main())

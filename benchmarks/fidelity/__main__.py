"""`python -m benchmarks.fidelity`: a table, progress on standard error, and one line of JSON at the end.

--only cases|overhead|resnet   a part alone       --quick   five cases, a smoke test       --case TEXT   cases by name
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.fidelity import overhead, report, resnet
from benchmarks.fidelity.cases import CASES, QUICK
from benchmarks.fidelity.measure import Figures, measured

PARTS = ("cases", "overhead", "resnet")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts asked for; the exit status is 1 where a bar is missed."""
    asked = _parser().parse_args(arguments)
    parts = ("cases",) if asked.quick or asked.case else (asked.only,) if asked.only else PARTS
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    found: dict[str, Any] = report.summary([]) | overhead.NOTHING | resnet.NOTHING
    if "cases" in parts:
        found |= report.summary(_table(_chosen(asked)))
    if "overhead" in parts:
        found |= overhead.run()
    if "resnet" in parts:
        found |= resnet.run()
    found["missed"] = report.missed(found)
    print(json.dumps(found))
    return 1 if found["missed"] else 0


def _table(names: Sequence[str]) -> list[Figures]:
    """Measure some cases, and print each as it comes."""
    print(report.HEADER)
    figures: list[Figures] = []
    for found in measured(names):
        figures.append(found)
        print(report.line(found), flush=True)
    return figures


def _chosen(asked: argparse.Namespace) -> list[str]:
    return list(QUICK) if asked.quick else [name for name in CASES if asked.case in name]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=__doc__)
    parser.add_argument("--only", choices=PARTS, help="one part alone")
    parser.add_argument("--quick", action="store_true", help="a few cases, as a smoke test")
    parser.add_argument("--case", default="", metavar="TEXT", help="the cases whose name holds TEXT")
    return parser


if __name__ == "__main__":
    sys.exit(main())

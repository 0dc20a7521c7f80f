"""The benchmarks run, and end with one line of JSON that holds the promised keys; timing is not looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent

KEYS = {
    "cases",
    "failed",
    "worst_float64",
    "worst_relu_float32",
    "worst_credit_cosine",
    "recording_overhead",
    "recording_overhead_small",
    "mixed_precision_residual",
    "mixed_precision_unexplained",
    "resnet_residual",
    "resnet_drift",
    "resnet_unexplained",
    "resnet_steps",
    "resnet_every",
}


def fidelity(*arguments: str) -> tuple[dict[str, Any], str, int]:
    """Run the benchmark as a user does, without data: its last line, its table, its exit status."""
    environment = {key: value for key, value in os.environ.items() if key != "BRITTLE_DATA"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fidelity", *arguments],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip(), done.stderr
    table, _, last = done.stdout.strip().rpartition("\n")
    return json.loads(last), table, done.returncode


@pytest.mark.slow
def test_a_few_cases_close_and_credit_the_right_examples() -> None:
    found, table, status = fidelity("--quick")
    assert set(found) >= KEYS
    assert found["failed"] == 0, found["failures"]
    assert found["cases"] == len([line for line in table.splitlines() if "FAILED" not in line]) - 2
    assert 0 < found["worst_float64"] <= 1e-8
    assert 0 < found["worst_relu_float32"] <= 0.02
    assert 0.99 <= found["worst_credit_cosine"] < 1
    assert found["unknown_optimizer_unexplained"]["unknown: lion"] > 1e-4, "it is shown, not hidden"
    assert found["missed"] == []
    assert status == 0


def test_what_was_not_run_is_null_and_says_so() -> None:
    found, table, status = fidelity("--only", "resnet")
    assert "BRITTLE_DATA" in table
    assert set(found) >= KEYS
    assert found["resnet_residual"] is None
    assert found["recording_overhead"] is None
    assert status == 0


def test_precision_without_data_says_so_in_one_line() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "BRITTLE_DATA"}
    command = [sys.executable, "-m", "benchmarks.precision"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.strip().splitlines())) == (2, "", 1)
    assert "BRITTLE_DATA" in done.stderr

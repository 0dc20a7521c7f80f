"""The benchmark of the sweep runs on drawn images, and ends with one line of JSON that holds the promised keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_benchmarks_scale import ROOT
from test_benchmarks_scale import drawn as drawn

KEYS = {"vs_training", "cosine", "relative_residual", "missed"}


def swept(data: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmark as a user does."""
    environment = os.environ | {"BRITTLE_DATA": data, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.sweep", "--quick"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_without_data_it_says_so_in_one_line() -> None:
    done = swept("")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "BRITTLE_DATA must name the folder that holds FashionMNIST/; set it, nothing is fetched\n"


@pytest.mark.slow
def test_the_account_is_that_of_the_step_by_step_ledger(drawn: Path) -> None:
    found = json.loads(swept(str(drawn)).stdout.strip().splitlines()[-1])
    assert set(found) >= KEYS
    assert 0.9 < found["cosine"] < 1
    assert 0 < found["relative_residual"] < 0.1
    assert found["vs_training"] > 0

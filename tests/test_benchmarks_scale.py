"""The benchmark of scale runs on drawn images, and ends with one line of JSON that holds the promised keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_examples import write_idx

ROOT = Path(__file__).parent.parent
KEYS = {"rss_growth_mb", "equal_across_processes", "survives_kill", "exponent_n", "exponent_m", "missed"}


def scale(data: Path | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmark as a user does."""
    environment = {key: value for key, value in os.environ.items() if key != "BRITTLE_DATA"}
    environment |= {"OMP_NUM_THREADS": "1"} | ({} if data is None else {"BRITTLE_DATA": str(data)})
    command = [sys.executable, "-m", "benchmarks.scale", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Files such as those of Fashion-MNIST, with drawn images that show their class."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 1_200), ("t10k", 2_000)):
        labels = torch.arange(count) % 10
        images = torch.randint(0, 128, (count, 28, 28), generator=generator)
        images[torch.arange(count), 2 * labels] += 100
        raw = tmp_path / "FashionMNIST" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        write_idx(raw / f"{part}-images-idx3-ubyte", images.to(torch.uint8))
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels.to(torch.uint8))
    return tmp_path


def test_without_data_it_says_so_in_one_line() -> None:
    done = scale(None)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "BRITTLE_DATA must name the folder that holds FashionMNIST/; set it, nothing is fetched\n"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["memory", "times"])
def test_a_part_gives_its_figures_and_null_for_the_others(part: str, drawn: Path) -> None:
    done = scale(drawn, "--quick", "--only", part)
    table, _, last = done.stdout.strip().rpartition("\n")
    found = json.loads(last)
    assert (set(found) >= KEYS, done.returncode, found["missed"]) == (True, 0, []), done.stderr
    assert (found["rss_growth_mb"] is None) == (part != "memory")
    assert (found["exponent_n"] is None) == (part != "times")
    assert found["equal_across_processes"] is None
    assert len(table.splitlines()) == 3

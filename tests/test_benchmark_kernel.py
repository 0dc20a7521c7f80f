"""The kernel's benchmark runs, on random images in Fashion-MNIST's format; timing is not looked at."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
RATIOS = ("vs_captum_batch", "vs_captum_default", "vs_dattri")


def run(data: Path | None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "BRITTLE_DATA"}
    environment |= {"OMP_NUM_THREADS": "1"} | ({"BRITTLE_DATA": str(data)} if data else {})
    command = [sys.executable, "-m", "benchmarks.kernel", "--quick"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def images_in(folder: Path) -> Path:
    """400 random images, as torchvision looks for them."""
    draw, raw = np.random.default_rng(0), folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind, values in (
            ("images-idx3", draw.integers(256, size=(400, 28, 28))),
            ("labels-idx1", np.arange(400) % 10),
        ):
            header = struct.pack(f">I{values.ndim}I", 0x800 + values.ndim, *values.shape)
            (raw / f"{part}-{kind}-ubyte").write_bytes(header + values.astype(np.uint8).tobytes())
    return folder


@pytest.mark.slow
def test_all_sides_find_the_same_kernel(tmp_path: Path) -> None:
    done = run(images_in(tmp_path))
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["vs_plain_pass"] > 0
    assert found["vs_captum_default_extrapolated_from"] == "1/10 of the examples"
    for key in RATIOS:
        assert (found[key] is not None) == (find_spec(key.split("_")[1]) is not None)
    for key in ("max_relative_difference", "max_relative_difference_dattri"):
        assert found[key] is None or 0 < found[key] <= 1e-5
    if found["captum_by_batch_size"] is not None:
        assert list(found["captum_by_batch_size"]) == ["1", "64", "128", "256", "512", "300"]
        assert all(seconds > 0 for seconds in found["captum_by_batch_size"].values())
    assert done.returncode == (1 if found["missed"] else 0)


def test_without_data_it_says_so_in_one_line() -> None:
    done = run(None)
    assert done.returncode == 3
    assert "BRITTLE_DATA" in done.stderr.strip()
    assert len(done.stderr.strip().splitlines()) == 1

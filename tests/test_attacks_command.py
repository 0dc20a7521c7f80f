"""`brittle attack`: the audit's own stage, or the attacks that are asked for, in the same run folder."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from brittle.cli import main
from brittle.runs import read_run

SPEC = """
import torch
from attack_cases import blob_data, blob_subject


def make():
    return blob_subject()
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("subject") / "blobs.py"
    file.write_text(SPEC)
    return f"{file}:make"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attack") / "run"


def attack(spec: str, run: Path, *more: str) -> int:
    return main(["attack", spec, "--out", str(run), "--queries", "20", "--no-progress", *more])


def test_attacks_are_noted_in_the_failures_table(spec: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert attack(spec, run, "--norm", "linf", "--eps", "0.1", "--attack", "fab", "--attack", "apgd-ce") == 0
    said = capsys.readouterr().out
    assert "L∞" in said
    held = float(re.search(r"([\d.]+)% hold within 0.1", said)[1]) / 100  # type: ignore[index]
    assert "health: " in said
    rows = read_run(run).failures()
    assert {(row["name"], row["norm"]) for row in rows} == {("FAB", "linf"), ("APGD-CE at 0.1", "linf")}
    for row in rows:
        assert (row["success"] == "True") == math.isfinite(float(row["distance"]))
        if row["name"] != "FAB" and row["success"] == "True":
            assert float(row["distance"]) <= 0.1 * (1 + 1e-5)
        assert int(row["evaluations"]) > 0
    fell = {row["query"] for row in rows if float(row["distance"]) <= 0.1 * (1 + 1e-5)}
    assert held == pytest.approx(1 - len(fell) / len({row["query"] for row in rows}), abs=0.006)


def test_rows_of_further_attacks_are_added_and_the_same_are_not_doubled(spec: str, run: Path) -> None:
    before = len(read_run(run).failures())
    assert attack(spec, run, "--norm", "l1", "--attack", "FMN") == 0
    added = len(read_run(run).failures())
    assert added == before * 3 // 2
    assert attack(spec, run, "--norm", "l1", "--attack", "FMN") == 0
    assert len(read_run(run).failures()) == added


def test_a_cap_holds_and_errors_are_one_line(spec: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert attack(spec, run, "--norm", "l2", "--attack", "FAB", "--cap", "9") == 0
    rows = [row for row in read_run(run).failures() if row["norm"] == "l2"]
    assert rows
    assert all(int(row["evaluations"]) <= 9 for row in rows)
    capsys.readouterr()
    assert attack(spec, run, "--attack", "fgsm") == 2
    assert "found 'fgsm'" in capsys.readouterr().err
    assert attack(spec, run, "--norm", "linf", "--attack", "ddn") == 2
    assert "DDN works in l2, found linf" in capsys.readouterr().err

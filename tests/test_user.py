"""A user's own training script, audited by the command line: resumed, refused, interrupted, without a path."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import make_moons
from torch import nn

import brittle
from brittle.cli import main
from brittle.findings import Findings
from brittle.runs import read_run

SCRIPT = '''
"""Three vineyards told apart by thirteen measurements of their wine."""

from pathlib import Path

import torch
from sklearn.datasets import load_wine
from torch import nn

import brittle

HERE = Path(__file__).parent
X, Y = (torch.as_tensor(array) for array in load_wine(return_X_y=True))
X = ((X - X.mean(0)) / X.std(0)).float().clamp(-3, 3)
TRAIN, TEST = torch.randperm(len(X), generator=torch.Generator().manual_seed(1)).split([100, 78])


def network():
    return nn.Sequential(nn.Linear(13, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 3))


def train():
    torch.manual_seed(0)
    model, x, y = network(), X[TRAIN], Y[TRAIN]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    recorder = brittle.Recorder(model, optimizer, HERE / "path")
    for _ in range(20):
        for ids in torch.randperm(len(x)).split(16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
            recorder.batch(ids)
            optimizer.step()
    recorder.close()
    torch.save(model.state_dict(), HERE / "weights.pt")


def make(recorded: bool = True):
    model = network()
    model.load_state_dict(torch.load(HERE / "weights.pt", weights_only=True))
    return brittle.Subject(model.eval(), (X[TRAIN], Y[TRAIN]), (X[TEST], Y[TEST]), bounds=(-3, 3),
                           path=HERE / "path" if recorded else None, name="wine")


if __name__ == "__main__":
    train()
'''
KEYS = "schema_version subject fidelity clean prediction holes attacks agreement suggestions warnings cost"
OPTIONS = ("--queries", "20", "--no-progress")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "brittle", "audit", "wine.py:make", "--out", str(folder), *OPTIONS, *arguments]


def stage_files(run: Path) -> dict[str, int]:
    """When each stage's arrays were written."""
    shown = (run / "figures", run / "pictures.safetensors")
    return {
        str(p.relative_to(run)): p.stat().st_mtime_ns
        for p in run.rglob("*.safetensors")
        if p not in shown and shown[0] not in p.parents
    }


def apart_from_cost(run: Path) -> dict[str, Any]:
    return read_run(run).findings().model_dump(exclude={"cost"})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the script has trained."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "wine.py").write_text(SCRIPT)
    subprocess.run([sys.executable, "wine.py"], cwd=folder, env=ENVIRONMENT, check=True, timeout=120)
    return folder


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    """The run folder of an audit that nothing interrupted."""
    done = subprocess.run(command(home / "run"), cwd=home, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert str(home / "run" / "report.html") in done.stdout
    return home / "run"


@pytest.mark.slow
def test_the_script_is_audited(run: Path) -> None:
    folder = read_run(run)
    findings = folder.findings()
    assert " ".join(folder.load_document("findings")) == KEYS
    assert (findings.subject.name, findings.subject.optimizer, findings.subject.steps) == ("wine", "AdamW", 140)
    assert findings.subject.spec == "wine.py:make"
    assert findings.fidelity.path == "recorded"
    assert findings.fidelity.relative_residual is not None
    assert findings.fidelity.relative_residual <= 0.01
    assert findings.fidelity.memory is not None
    assert findings.fidelity.memory.shift_cosine >= 0.95
    assert (run / "report.html").stat().st_size < 6_000_000
    assert folder.verify() > 10


@pytest.mark.slow
def test_the_same_command_computes_nothing_twice(
    home: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, found = stage_files(run), read_run(run).findings()
    assert len(before) >= 7
    monkeypatch.chdir(home)
    assert main(command(run)[3:]) == 0
    assert stage_files(run) == before
    assert read_run(run).findings() == found  # the cost of the first run included


@pytest.mark.slow
def test_another_seed_is_refused_in_one_line(
    home: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    before = apart_from_cost(run)
    assert main([*command(run)[3:], "--seed", "1"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "belongs to another audit: seed is 0 there and 1 here" in line
    assert apart_from_cost(run) == before


@pytest.mark.slow
def test_an_interrupted_audit_goes_on_to_the_same_findings(home: Path, run: Path) -> None:
    other = home / "interrupted"
    process = subprocess.Popen(command(other), cwd=home, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not (other / "shift" / "shift.safetensors.sha256").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip() == "brittle: interrupted; the same command goes on from what is finished"
    assert not (other / "findings.json").exists()
    kept = stage_files(other)
    assert {"memory/memory.safetensors", "shift/shift.safetensors"} <= set(kept)

    subprocess.run(command(other), cwd=home, env=ENVIRONMENT, capture_output=True, check=True, timeout=300)
    assert kept.items() <= stage_files(other).items()
    assert apart_from_cost(other) == apart_from_cost(run)
    assert (other / "failures.csv").read_bytes() == (run / "failures.csv").read_bytes()


@pytest.mark.slow
def test_without_a_path_the_first_lines_say_what_cannot_be_claimed(
    home: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    assert main([*command(tmp_path / "run")[3:], "-p", "recorded=no"]) == 0
    assert "final weights only" in capsys.readouterr().out.splitlines()[0]
    findings = read_run(tmp_path / "run").findings()
    assert findings.fidelity.path == "weights"
    assert findings.fidelity.verdict == "inconclusive"
    assert "cannot be claimed" in findings.fidelity.statement
    assert findings.fidelity.relative_residual is None
    assert findings.fidelity.rows == []
    assert (findings.subject.optimizer, findings.subject.steps) == (None, None)
    assert {flip.account for flip in findings.prediction.flips} == {"tangent kernel"}
    assert findings.fidelity.statement in (tmp_path / "run" / "report.html").read_text()[:30_000]
    assert findings.clean == read_run(run).findings().clean  # nothing else depends on the path
    assert findings.attacks.inputs == read_run(run).findings().attacks.inputs


def two_moons(path: Path) -> brittle.Subject:
    """A binary model with a single logit, over points in the plane, trained with Adam on float targets."""
    torch.manual_seed(0)
    points, targets = make_moons(160, noise=0.15, random_state=0)
    x, y = torch.as_tensor(points).float(), torch.as_tensor(targets)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    with brittle.Recorder(model, optimizer, path) as recorder:
        for _ in range(25):
            for ids in torch.randperm(100).split(20):
                optimizer.zero_grad()
                nn.functional.binary_cross_entropy_with_logits(model(x[ids])[:, 0], y[ids].float()).backward()
                recorder.batch(ids)
                optimizer.step()
    names = ("upper moon", "lower moon")
    return brittle.Subject(
        model.eval(), (x[:100], y[:100]), (x[100:], y[100:]), bounds=(-3, 3), class_names=names, path=path
    )


def test_a_single_logit_over_vectors_is_audited(tmp_path: Path) -> None:
    subject = two_moons(tmp_path / "path")
    findings: Findings = brittle.audit(subject, out=tmp_path / "run", queries=15, progress=False)
    assert findings.subject.class_names == ["upper moon", "lower moon"]
    assert findings.fidelity.relative_residual is not None
    assert findings.fidelity.relative_residual <= 0.01
    assert [family.name for family in findings.prediction.families] == ["random direction", "margin gradient"]
    assert findings.attacks.inputs + findings.attacks.wrong_when_clean == 15
    envelopes = [result for result in findings.attacks.results if result.kind == "envelope"]
    assert [e.success.value for e in envelopes] == [1.0, 1.0]  # in the plane, everything can be pushed across
    logits = subject.model(subject.test.inputs)[:, 0]
    right = ((logits > 0) == (subject.test.targets == 1)).double().mean().item()
    assert findings.clean.accuracy.value == pytest.approx(right)
    for flip in findings.prediction.flips:
        assert flip.margin_before > 0 >= flip.margin_after - 1e-3
        assert {flip.before_class, flip.after_class} == {"upper moon", "lower moon"}

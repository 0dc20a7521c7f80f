"""The README is true: its blocks run, its commands and options exist, its links lead somewhere, its words hold."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch
from torch import nn

from brittle.cli import audit, commands, main
from brittle.findings import Findings
from brittle.runs import read_run

HOME = Path(__file__).parent.parent
README = (HOME / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def my_project(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What a user of the README's blocks has: a model, and three kinds of points in the unit cube."""

    def points(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        targets = torch.arange(count) % 3
        return (torch.eye(3)[targets] / 2 + torch.rand(count, 3, generator=generator) / 2), targets

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3))

    module = ModuleType("my_project")
    module.network, module.train_data, module.test_data = network, points(90, 0), points(60, 1)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_project", module)
    return module


def test_the_blocks_run_as_they_stand(
    my_project: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    script, factory = BLOCKS
    names: dict[str, Any] = {}
    exec(script, names)
    findings = names["findings"]
    assert isinstance(findings, Findings)
    assert findings.fidelity.path == "recorded"
    assert findings.fidelity.verdict == "pass"
    assert findings.agreement.sentence in capsys.readouterr().out
    written = {p.name for p in Path("runs/mine").iterdir() if p.suffix in (".json", ".csv", ".html")}
    [folder] = re.findall(r"A run folder holds (.*?)\n\n", README, re.DOTALL)
    assert set(re.findall(r"`(\w+\.\w+)`", folder)) == written

    torch.save(names["model"].state_dict(), "weights.pt")
    Path("mine.py").write_text("import brittle, torch\nfrom my_project import *\n\n" + factory)
    assert main(["audit", "mine.py:make", "--out", "runs/again", "--queries", "10", "--no-progress"]) == 0
    assert read_run("runs/again").findings().subject.spec == "mine.py:make"


def test_its_commands_and_options_exist() -> None:
    named = set(re.findall(r"`brittle (\w+)", README)) | set(re.findall(r"`(\w+)` takes `--", README))
    assert named == set(commands.commands)
    [told] = re.findall(r"`audit` takes (.*?)\. Exit", README, re.DOTALL)
    options = {name for parameter in audit.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert set(re.findall(r"--?[a-z-]+", told)) <= options
    [presets] = [p.type for p in audit.params if p.name == "preset"]
    assert isinstance(presets, click.Choice)
    assert f"--preset {'|'.join(presets.choices)}" in told


def test_its_make_targets_and_links_exist() -> None:
    targets = re.findall(r"^(\w+):", (HOME / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test"} == set(re.findall(r"^    make (\w+)", README, re.MULTILINE)) <= set(targets)
    for link in re.findall(r"\]\((?!https:)(.*?)\)", README):
        assert (HOME / link).is_file(), link
    for name in ("brittle/examples", "notebooks", "CONTRIBUTING.md"):
        assert f"`{name}" in README
        assert (HOME / name).exists()
    assert sum(p.stat().st_size for p in (HOME / "notebooks" / "pictures").iterdir()) < 400_000

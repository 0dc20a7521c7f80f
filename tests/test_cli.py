"""The command line: exit statuses, one line for each error, what is passed on and what is printed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from findings_cases import digits_case

import brittle
from brittle import cli
from brittle.cli import commands, main
from brittle.errors import (
    BrittleError,
    DamagedFileError,
    DataError,
    DiskError,
    ModelError,
    NotFiniteError,
    PathMismatchError,
    RunFolderError,
    SkippedError,
    UnsupportedError,
    UsageError,
)
from brittle.findings import Findings
from brittle.report.formatting import signed
from brittle.report.view.flips import flips_of
from brittle.report.view.headline import headline_of
from brittle.runs import open_run, read_run
from brittle.subject import Subject

FINDINGS = digits_case().findings
FACTORY = """
import torch, brittle

def make(n: int = 9):
    data = torch.rand(n, 4), torch.arange(n) % 3
    return brittle.Subject(torch.nn.Linear(4, 3).eval(), data, data, name="mine",
                           retrain=lambda data, seed: 1 / 0)
"""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A factory in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FACTORY)
    return "mine.py:make"


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A pipeline that notes its call and returns ready findings; set `.does` to have it do something else."""
    fake = SimpleNamespace(calls=[], does=lambda subject: FINDINGS)

    def audit(subject: Subject, out: Path, **settings: Any) -> Findings:
        fake.calls.append((subject, out, settings, os.environ.get("BRITTLE_NO_PROGRESS")))
        return fake.does(subject)

    fake.audit = audit
    monkeypatch.setattr(brittle, "pipeline", fake, raising=False)
    monkeypatch.delenv("BRITTLE_NO_PROGRESS", raising=False)
    return fake


def says(capsys: pytest.CaptureFixture[str], status: int, message: str, *arguments: str) -> None:
    """The command ends with the status and exactly one line on stderr that matches the message."""
    assert main(arguments) == status
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert re.search(rf"^brittle: {message}", lines[0]), lines[0]
    assert "Traceback" not in out + err


# audit


def test_audit_passes_everything_on(spec: str, pipeline: SimpleNamespace, tmp_path: Path) -> None:
    options = [
        "--queries",
        "40",
        "--seed",
        "3",
        "--device",
        "cpu",
        "--preset",
        "thorough",
        "--no-progress",
        "--memory-budget",
        "1.5g",
        "--deterministic",
        "--precision",
        "bfloat16",
        "--tolerance",
        "0.1",
        "-p",
        "n=12",
    ]
    assert main(["audit", spec, "--out", "runs/x", *options]) == 0
    [(subject, out, settings, quiet)] = pipeline.calls
    assert (subject.name, len(subject.train), out) == ("mine", 12, Path("runs/x"))
    assert settings == {
        "queries": 40,
        "seed": 3,
        "device": "cpu",
        "preset": "thorough",
        "spec": spec,
        "options": {"n": "12"},
        "progress": False,
        "memory_budget": 1_610_612_736,
        "deterministic": True,
        "precision": "bfloat16",
        "tolerance": 0.1,
    }
    assert quiet
    assert "BRITTLE_NO_PROGRESS" not in os.environ


def test_audit_leaves_the_number_of_queries_to_the_pipeline(spec: str, pipeline: SimpleNamespace) -> None:
    assert main(["audit", spec, "--out", "x"]) == 0
    settings, quiet = pipeline.calls[0][2:]
    assert not {"queries", "memory_budget"} & set(settings)
    assert settings["progress"] is True
    assert quiet is None


def test_audit_ends_with_the_headline_figures_and_the_report(
    spec: str, pipeline: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", spec, "--out", "runs/x"]) == 0
    rows = dict(re.split(r" {2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    first = headline_of(FINDINGS)
    assert rows["subject"] == f"{first.name}, {first.path}"
    for card in first.cards:
        row = rows[card.title.lower()]
        assert all(f"{amount.value} {amount.interval}".strip() in row for amount in card.amounts)
        assert row.endswith(f"({card.verdict})" if card.verdict else card.note)
    findings = [hole.test.verdict for hole in FINDINGS.holes if hole.test].count("pass")
    assert rows["holes"] == f"{findings} findings, {7 - findings} untested hypotheses"
    assert rows["agreement"] == FINDINGS.agreement.sentence
    assert rows["report"] == "runs/x/report.html"


def test_a_folder_of_something_else_is_refused_before_the_subject_is_made(
    spec: str, pipeline: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("raise AssertionError('the subject was made')")
    says(capsys, 2, r"--out must name an absent or empty folder.*name another", "audit", spec, "--out", ".")
    assert pipeline.calls == []


# Exit statuses


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UsageError, 2),
        (RunFolderError, 2),
        (DataError, 3),
        (ModelError, 3),
        (NotFiniteError, 3),
        (UnsupportedError, 3),
        (PathMismatchError, 3),
        (DiskError, 3),
        (DamagedFileError, 4),
        (SkippedError, 5),
    ],
)
def test_named_errors_have_their_status(
    error: type[BrittleError], status: int, spec: str, pipeline: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(subject: Subject) -> Findings:
        raise error("a rule, a value;\na remedy")

    pipeline.does = fail
    says(capsys, status, "a rule, a value; a remedy$", "audit", spec, "--out", "x")


def kill(number: int) -> Callable[[Subject], None]:
    return lambda subject: os.kill(os.getpid(), number)


def ours(subject: Subject) -> None:
    subject.train.join(None)  # type: ignore[arg-type]


def theirs(subject: Subject) -> None:
    assert subject.retrain is not None
    subject.retrain(subject.train, 0)


@pytest.mark.parametrize(
    ("does", "status", "message"),
    [
        (kill(signal.SIGINT), 130, "interrupted; the same command goes on from what is finished"),
        (kill(signal.SIGTERM), 143, "terminated; the same command goes on from what is finished"),
        (ours, 70, "this is a bug in brittle: TypeError: .*; please report it with what --debug prints"),
        (theirs, 3, r"your code must not raise, found ZeroDivisionError: .* at .*mine.py:7; mend it there"),
    ],
)
def test_what_ends_an_audit_from_outside(
    does: Any, status: int, message: str, spec: str, pipeline: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.does = does
    before = signal.getsignal(signal.SIGTERM)
    says(capsys, status, message, "audit", spec, "--out", "x")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_traceback_only_with_debug(spec: str, pipeline: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.does = ours
    assert main(["audit", spec, "--out", "x", "--debug"]) == 70
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("brittle: this is a bug in brittle")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("audit absent.py:make --out x", 2, "SPEC must name a Python file, absent.py does not exist"),
        ("audit mine.py:mak --out x", 2, "mine.py must have a function mak, found none; its functions are make"),
        ("audit mine.py --out x", 2, "SPEC must be file.py:make or package.module:make, found 'mine.py'"),
        ("audit mine.py:make --out x -p m=3", 2, "-p m is unknown to mine.py:make, found m=3; its options are n"),
        ("audit mine.py:make --out x -p n=many", 2, "-p n must be int, found 'many'; write -p n=5"),
        ("audit mine.py:make --out x -p n", 2, "Invalid value for '-p': must be KEY=VALUE, found 'n'; write -p seed=1"),
        ("audit mine.py:make --out x -p n=-1", 3, r"the factory mine.py:make must return .*RuntimeError: .*mine.py:5"),
        ("audit mine.py:make --out x -p n=0", 3, r"train must not be empty, found .*\(0, 4\); .* \(at .*mine.py:6\)"),
        ("audit mine.py:make --out x --device warp", 2, "--device must be of this machine, found 'warp' .*; take cpu"),
        (
            "audit mine.py:make --out x --device cuda:99",
            2,
            "--device must be of this machine, found 'cuda:99' .*; take",
        ),
        ("audit mine.py:make", 2, "Missing option '--out'; see `brittle audit --help`"),
        ("audit --out x", 2, "Missing argument 'SPEC'; see `brittle audit --help`"),
        ("audit mine.py:make --out x --querys 3", 2, "No such option:? '?--querys'?.*--queries"),
        ("audit mine.py:make --out x --queries 0", 2, "Invalid value for '--queries': 0 is not in the range x>=1"),
        ("audit mine.py:make --out x --preset slow", 2, "Invalid value for '--preset': 'slow' is not one of 'quick', "),
        ("audit mine.py:make --out x --memory-budget 0", 2, "Invalid value for '--memory-budget': .* found '0'; write"),
        (
            "audit mine.py:make --out x --memory-budget much",
            2,
            ".*--memory-budget.*must be a size, found 'much'; write",
        ),
        ("map mine.py:make --out x --shard 2/2", 2, r"--shard must be I/N with I from 0 to N-1, found '2/2'; number"),
        ("map mine.py:make --out x --shard 1", 2, r"--shard must be I/N with I from 0 to N-1, found '1'; number the"),
        ("map mine.py:make --out x --shard -1/2", 2, r"--shard must be I/N with I from 0 to N-1, found '-1/2'; number"),
        ("map mine.py:make", 2, "Missing option '--out'; see `brittle map --help`"),
        ("audit mine.py:make --out x --seed red", 2, "Invalid value for '--seed': 'red' is not a valid int"),
        ("audti mine.py:make", 2, "No such command 'audti'.*see `brittle --help`"),
        ("--nonsense", 2, "No such option:? '?--nonsense'?.*see `brittle --help`"),
        ("report nowhere", 2, "RUN must be a folder that `brittle audit --out` wrote, nowhere does not exist; correct"),
        ("verify mine.py", 2, "RUN must be a folder that `brittle audit --out` wrote, mine.py is a file; correct"),
        ("explain nowhere", 2, "Missing option '--query'; see `brittle explain --help`"),
    ],
)
def test_wrong_commands_get_one_line(
    arguments: str,
    status: int,
    message: str,
    spec: str,
    pipeline: SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    says(capsys, status, message, *arguments.split())
    assert pipeline.calls == []


# Commands on a finished run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run folder."""
    case = digits_case()
    with open_run(tmp_path / "run", {"queries": 40}) as folder:
        folder.save("figures", case.arrays)
        folder.save("pictures", case.pictures)
        folder.save("ledger", {"ids": torch.tensor([5, 9]), "contributions": torch.arange(24.0).reshape(2, 12) - 10})
        folder.save_document("train", {"names": [f"image-{i}" for i in range(12)], "classes": ["cat"] * 12})
        folder.save_findings(case.findings)
    return tmp_path / "run"


def test_report_renders_the_page_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    page = (run / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert FINDINGS.agreement.sentence.split(",")[0] in page
    assert read_run(run).verify() == 7


def test_an_unfinished_run_has_no_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("findings.json", "findings.json.sha256"):
        (run / name).unlink()
    says(capsys, 2, r".*run has no findings yet; run its audit to the end", "report", str(run))
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out == f"{run}: 5 files are whole, the audit is not finished\n"


def test_explain_names_the_examples_that_leave_and_arrive(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip = FINDINGS.prediction.flips[1]
    assert main(["explain", str(run), "--query", str(flip.query)]) == 0
    out = capsys.readouterr().out
    assert f"query {flip.query}, a {flip.true_class}" in out
    assert f"{flip.before_class} becomes {flip.after_class} by {flip.how}" in out
    leaving, arriving = out.split("arriving")
    assert [e.name in leaving for e in flip.leaving] == [True] * 5
    assert [e.name in arriving for e in flip.arriving] == [True] * 5
    first = flips_of(FINDINGS)[1].leaving[0]
    row = next(line.split() for line in leaving.splitlines() if line.startswith(first.name))
    assert row == [first.name, first.class_name, first.before, first.after, first.change]


def test_explain_falls_back_on_the_ledger(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(run), "--query", "9"]) == 0
    supporters, rivals = capsys.readouterr().out.split("rival examples")
    listed = [re.findall(r"image-(\d+) +cat +(\S+)", side) for side in (supporters, rivals)]
    assert listed[0] == [(str(i), signed(i + 2)) for i in (11, 10, 9, 8, 7)]
    assert listed[1] == [(str(i), signed(i + 2)) for i in (0, 1, 2, 3, 4)]


def test_explain_says_which_queries_there_are(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    says(
        capsys,
        2,
        "--query must be a query of this audit, found 4; explained are 5, 9, 17,",
        "explain",
        str(run),
        "--query",
        "4",
    )


def test_verify_finds_damage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out == f"{run}: 6 files are whole, the findings obey their schema\n"
    (run / "findings.json").write_text("{}")
    says(capsys, 4, r".*findings.json is damaged: its checksum is", "verify", str(run))


def test_schema_is_that_of_the_findings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    keys = "schema_version subject fidelity clean prediction holes attacks agreement suggestions warnings cost"
    assert list(schema["properties"]) == keys.split()


def test_env_names_versions_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts["torch"] == torch.__version__.split("+")[0] or facts["torch"] == torch.__version__
    assert facts["devices"].startswith("cpu")
    assert {"brittle", "python", "numpy", "foolbox", "platform", "cores"} <= set(facts)


# Help, and the library's face


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"brittle {brittle.__version__}\n"
    assert main([]) == 0
    overview = capsys.readouterr().out
    for name in commands.commands:
        assert f"\n  {name} " in overview
        assert main([name, "--help"]) == 0
        assert "--debug" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["audit", "--help"], ["--version"], ["schema"], ["wrong"]])
def test_help_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from brittle.cli import main; status = main(sys.argv[1:]); "
        "heavy = {'torch', 'numpy', 'matplotlib', 'foolbox', 'sklearn'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_module_and_the_script_are_the_same(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "brittle", "audit"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "brittle: Missing argument 'SPEC'; see `brittle audit --help`\n"


def test_the_presets_are_those_of_the_pipeline() -> None:
    from brittle.pipeline import PRESETS

    assert tuple(PRESETS) == cli.PRESETS


def test_the_library_has_one_face(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(audit=lambda subject, out: "audited")
    monkeypatch.setitem(sys.modules, "brittle.pipeline", fake)
    assert brittle.audit("subject", out="x") == "audited"
    assert brittle.Subject is Subject
    assert brittle.Recorder.__name__ == "Recorder"
    assert brittle.Examples.__name__ == "Examples"
    assert set(brittle.__all__) <= set(dir(brittle))
    with pytest.raises(AttributeError, match="no attribute 'Subjet'"):
        _ = brittle.Subjet


def test_no_module_hides_a_name_of_the_face() -> None:
    folder = Path(brittle.__file__).parent
    modules = {p.stem for p in folder.iterdir() if p.suffix == ".py" or p.is_dir()}
    assert not modules & set(brittle.__all__)

"""The run folder: written whole, resumed by the same settings, refused to others, held by one process."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from findings_cases import digits_case

from brittle.data import Examples
from brittle.errors import DamagedFileError, DiskError, RunFolderError, UsageError
from brittle.runs import RunFolder, open_run, read_run
from brittle.settings import fingerprints, versions
from brittle.shards import write_bytes
from brittle.subject import Subject

FINDINGS = digits_case().findings
SETTINGS: dict[str, Any] = {"spec": "a.py:make", "queries": 40, "options": {"seed": 0}, "folder": Path("x")}


def finish(root: Path) -> None:
    """A run folder with a file of every kind."""
    with open_run(root, SETTINGS) as run:
        run.save("ledger", {"ids": torch.arange(3)}, {"unit": "logits"})
        run.save("memory/7", {"mass": torch.rand(2, 2)})
        run.save("pictures", {"0/before": torch.rand(1, 8, 8)})
        run.save_document("holes", [{"id": 0}])
        run.save_failures([{"query": 1, "attack": "ddn", "distance": float("inf")}])
        run.save_findings(FINDINGS)
        run.save_report("<html>é</html>")


def files(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and p.suffix != ".sha256"}


def test_rows_that_are_added_replace_their_own_and_leave_the_others(tmp_path: Path) -> None:
    row = {"query": 1, "kind": "attack", "name": "FAB", "norm": "l2", "distance": 0.5}
    with open_run(tmp_path, SETTINGS) as run:
        run.add_failures([row, row | {"query": 2}])
        run.add_failures([row | {"distance": 0.25}, row | {"name": "FAB at 1"}])
        found = {(r["query"], r["name"]): r["distance"] for r in run.failures()}
        assert len(run.failures()) == 3
    assert found == {("1", "FAB"): "0.25", ("2", "FAB"): "0.5", ("1", "FAB at 1"): "0.5"}


def test_each_file_lies_where_the_design_says(tmp_path: Path) -> None:
    finish(tmp_path / "run")
    expected = "settings.json findings.json holes.json failures.csv report.html pictures.safetensors .lock"
    assert files(tmp_path / "run") == {*expected.split(), "ledger/ledger.safetensors", "memory/7.safetensors"}


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    finish(tmp_path)
    run = read_run(tmp_path)
    assert run.has("ledger")
    assert not run.has("shift")
    assert torch.equal(run.load("ledger")["ids"], torch.arange(3))
    assert run.notes("ledger") == {"unit": "logits"}
    assert run.load("pictures")["0/before"].shape == (1, 8, 8)
    assert run.has_document("holes")
    assert not run.has_document("probes")
    assert run.load_document("holes") == [{"id": 0}]
    assert run.failures() == [{"query": "1", "attack": "ddn", "distance": "inf"}]
    assert run.findings() == FINDINGS
    assert run.load_document("settings")["versions"] == versions()


def test_the_same_settings_resume(tmp_path: Path) -> None:
    finish(tmp_path)
    before = (tmp_path / "settings.json").stat().st_mtime_ns
    with open_run(tmp_path, dict(reversed(SETTINGS.items()))) as run:
        assert run.has("memory/7")
    assert (tmp_path / "settings.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"queries": 60}, "queries is 40 there and 60 here;"),
        ({"options": {"seed": 1}}, "options.seed is 0 there and 1 here;"),
        ({"options": {}}, "options is absent there and {} here, options.seed is 0 there and absent here;"),
        ({"device": "cuda"}, "device is absent there and cuda here;"),
        ({"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}, "c is absent there and 1 here, and 2 more differ;"),
    ],
)
def test_other_settings_are_refused_with_the_difference(
    tmp_path: Path, change: dict[str, Any], difference: str
) -> None:
    finish(tmp_path)
    with pytest.raises(RunFolderError) as caught:
        open_run(tmp_path, SETTINGS | change)
    assert difference in str(caught.value)
    assert str(caught.value).endswith("name another --out, or delete the folder")
    assert caught.value.exit_status == 2
    open_run(tmp_path, SETTINGS).close()  # the refusal let go of the lock


def test_other_versions_are_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(tmp_path)
    monkeypatch.setattr("brittle.settings.version", lambda name: "9.9")
    with pytest.raises(RunFolderError, match=r"versions.brittle is \S+ there and 9.9 here"):
        open_run(tmp_path, SETTINGS)


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match=r"absent or empty folder.*holds 1 other files, thesis.tex.*name another"):
        open_run(tmp_path, SETTINGS)
    assert files(tmp_path) <= {"thesis.tex", ".lock"}
    with pytest.raises(RunFolderError, match=r"must be a folder, found a file; name another"):
        open_run(tmp_path / "thesis.tex", SETTINGS)


def test_a_recorded_path_may_lie_in_the_folder_before(tmp_path: Path) -> None:
    write_bytes(tmp_path / "path" / "path.json", b"{}")
    open_run(tmp_path, SETTINGS).close()
    assert read_run(tmp_path).load_document("settings")["queries"] == 40


@pytest.mark.parametrize("leave", [".lock", "settings.json", ".settings.json.1.tmp"])
def test_a_run_that_was_killed_at_once_begins_again(tmp_path: Path, leave: str) -> None:
    (tmp_path / leave).write_text("{")
    open_run(tmp_path, SETTINGS).close()
    assert files(tmp_path) == {".lock", "settings.json"}
    assert read_run(tmp_path).verify() == 1


def test_leftovers_of_a_killed_write_go_away(tmp_path: Path) -> None:
    finish(tmp_path)
    leftover = tmp_path / "memory" / ".8.safetensors.77.tmp"
    leftover.write_bytes(b"half")
    open_run(tmp_path, SETTINGS).close()
    assert not leftover.exists()


def test_a_damaged_stage_does_not_count(tmp_path: Path) -> None:
    finish(tmp_path)
    flip(tmp_path / "ledger" / "ledger.safetensors")
    run = open_run(tmp_path, SETTINGS)
    assert not run.has("ledger")
    with pytest.raises(DamagedFileError, match=r"ledger.safetensors is damaged.*delete it"):
        run.load("ledger")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["settings.json", "failures.csv", "report.html", "memory/7.safetensors"])
@pytest.mark.parametrize("damage", [flip, os.unlink, lambda p: os.unlink(f"{p}.sha256")], ids=["flip", "lost", "bare"])
def test_verify_finds_the_damaged_file(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    finish(tmp_path)
    run = read_run(tmp_path)
    assert run.verify() == 8
    damage(tmp_path / name)
    with pytest.raises(DamagedFileError, match=name) as caught:
        run.verify()
    assert caught.value.exit_status == 4


def test_verify_holds_the_findings_against_their_schema(tmp_path: Path) -> None:
    finish(tmp_path)
    document = read_run(tmp_path).load_document("findings")
    document["clean"]["inputs"] = "many"
    RunFolder(tmp_path).save_document("findings", document)
    with pytest.raises(DamagedFileError, match=r"must obey `brittle schema`, found at clean.inputs"):
        read_run(tmp_path).verify()


def test_numbers_that_json_does_not_know_are_not_written(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.save_document("holes", {"rate": float("nan")})
    assert not run.has_document("holes")


def test_a_run_without_findings_says_so(tmp_path: Path) -> None:
    open_run(tmp_path, SETTINGS).close()
    with pytest.raises(UsageError, match=r"has no findings yet; run its audit to the end"):
        read_run(tmp_path).findings()


@pytest.mark.parametrize(
    ("make", "found"), [(Path.mkdir, "no settings.json"), (Path.touch, "is a file"), (repr, "not exist")]
)
def test_what_is_no_run_folder_cannot_be_read(tmp_path: Path, make: Callable[[Path], object], found: str) -> None:
    make(tmp_path / "run")
    with pytest.raises(RunFolderError, match=rf"must be a folder that `brittle audit --out` wrote.*{found}.*correct"):
        read_run(tmp_path / "run")


def test_two_audits_cannot_hold_one_folder(tmp_path: Path) -> None:
    with (
        open_run(tmp_path, SETTINGS),
        pytest.raises(RunFolderError, match=rf"found {os.getpid()} at work in it; wait") as caught,
    ):
        open_run(tmp_path, SETTINGS)
    assert caught.value.exit_status == 2
    open_run(tmp_path, SETTINGS).close()


def test_the_folder_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        open_run(tmp_path, SETTINGS).save("shift", {"mass": torch.ones(2)})
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert (tmp_path / ".lock").read_text() == str(child)
    with open_run(tmp_path, SETTINGS) as run:
        assert run.has("shift")
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_a_full_disk_is_said_in_one_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(tmp_path)

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_run(tmp_path, SETTINGS) as run:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(
            DiskError, match=r"^cannot write \S+shift.safetensors: no space is left; free space.*$"
        ) as caught:
            run.save("shift", {"mass": torch.ones(2)})
        monkeypatch.undo()
    assert caught.value.exit_status == 3
    assert not any(p.suffix == ".tmp" for p in tmp_path.rglob("*"))
    with open_run(tmp_path, SETTINGS) as run:
        assert run.has("ledger")
        assert not run.has("shift")


def test_a_folder_that_cannot_be_made_is_a_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DiskError, match=r"cannot write .*: Permission denied; free space or name another folder"):
        open_run(tmp_path / "run", SETTINGS)


def test_fingerprints_see_every_change() -> None:
    model = torch.nn.Linear(3, 2).eval()
    inputs = torch.rand(6, 3)
    data = Examples(inputs, torch.tensor([0, 1] * 3))
    base = fingerprints(Subject(model, data, data[:4]))
    assert set(base) == {"weights", "train", "test"}
    assert base == fingerprints(Subject(model, (inputs.numpy(), data.targets), data[:4]))
    relabelled = Examples(inputs, 1 - data.targets)
    assert fingerprints(Subject(model, relabelled, data[:4]))["train"] != base["train"]
    assert fingerprints(Subject(model, data[torch.arange(5, -1, -1)], data[:4]))["train"] != base["train"]
    assert set(fingerprints(Subject(model, data, data, pool=data))) == {*base, "pool"}
    model.bias.data[0] += 1e-6
    assert fingerprints(Subject(model, data, data[:4]))["weights"] != base["weights"]

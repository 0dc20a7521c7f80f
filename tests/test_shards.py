"""Files are whole or do not count: against flipped bits, full disks, and processes that are killed."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from brittle.errors import DamagedFileError, DiskError
from brittle.shards import read_arrays, read_bytes, read_notes, whole, write_arrays, write_bytes

ARRAYS = {
    "plain": torch.arange(12.0).reshape(3, 4),
    "double": torch.tensor([1e-300, float("inf"), float("nan")], dtype=torch.float64),
    "ids": torch.tensor([2**40, -1]),
    "flags": torch.tensor([True, False]),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "scalar": torch.tensor(3.5),
    "nothing": torch.zeros(0, 7),
    "trained": torch.ones(2, requires_grad=True),
}


def test_arrays_and_notes_come_back_as_they_were(tmp_path: Path) -> None:
    write_arrays(tmp_path / "deep" / "a.safetensors", ARRAYS, {"unit": "logits, é"})
    found = read_arrays(tmp_path / "deep" / "a.safetensors")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert torch.equal(found[name].nan_to_num(), array.detach().nan_to_num())
    assert read_notes(tmp_path / "deep" / "a.safetensors") == {"unit": "logits, é"}


def test_arrays_that_share_memory_are_written_one_by_one(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    shared: dict[str, Tensor] = {"all": base, "again": base, "first": base[:3], "last": base[3:]}
    write_arrays(tmp_path / "a.safetensors", shared)
    found = read_arrays(tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], array) for name, array in shared.items())


def test_notes_may_be_absent(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    assert read_notes(tmp_path / "a.safetensors") == {}


def test_the_checksum_is_one_that_sha256sum_reads(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a.json", b"{}")
    assert (tmp_path / "a.json.sha256").read_text() == f"{hashlib.sha256(b'{}').hexdigest()}  a.json\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.json.sha256"]


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=200), where=st.integers(min_value=0), bit=st.integers(0, 7))
def test_a_single_flipped_bit_is_found(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, where: int, bit: int
) -> None:
    path = tmp_path_factory.mktemp("flip") / "a.bin"
    write_bytes(path, content)
    assert read_bytes(path) == content
    if content:
        changed = bytearray(content)
        changed[where % len(content)] ^= 1 << bit
        path.write_bytes(bytes(changed))
        assert not whole(path)
        with pytest.raises(
            DamagedFileError, match=r"a.bin is damaged: its checksum is \w{12}, expected \w{12}; delete it"
        ):
            read_bytes(path)


@pytest.mark.parametrize("damage", ["cut", "longer", "gone", "no checksum", "empty checksum", "another's checksum"])
def test_every_kind_of_damage_is_found(tmp_path: Path, damage: str) -> None:
    path, note = tmp_path / "a.safetensors", tmp_path / "a.safetensors.sha256"
    write_arrays(path, ARRAYS)
    content = path.read_bytes()
    if damage in ("cut", "longer"):
        path.write_bytes(content[:-1] if damage == "cut" else content + b"\0")
    elif damage == "gone":
        path.unlink()
    elif damage == "no checksum":
        note.unlink()
    else:
        note.write_text("" if damage.startswith("empty") else f"{'0' * 64}  a.safetensors\n")
    assert not whole(path)
    for read in (read_bytes, read_arrays, read_notes):
        with pytest.raises(DamagedFileError, match=r"a.safetensors"):
            read(path)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "no space is left"),
        (errno.EDQUOT, "no space is left"),
        (errno.EIO, "Input/output error"),
        (errno.EROFS, "Read-only file system"),
    ],
)
def test_a_disk_that_refuses_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(
        DiskError, match=rf"^cannot write {tmp_path}/a.bin: {reason}; free space or name another folder"
    ):
        write_bytes(tmp_path / "a.bin", b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_write_leaves_the_old_file_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError):
        write_bytes(path, b"new")
    assert read_bytes(path) == b"old"


@pytest.mark.parametrize("keep", [0, 1])
def test_a_crash_between_the_renames_leaves_a_file_that_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    path, renames = tmp_path / "a.bin", []
    write_bytes(path, b"old")
    replace = os.replace

    def crash(source: Path, target: Path) -> None:
        if len(renames) == keep:
            raise KeyboardInterrupt
        renames.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(path, b"new")
    assert not whole(path) or read_bytes(path) in (b"old", b"new")
    monkeypatch.undo()
    write_bytes(path, b"newer")
    assert read_bytes(path) == b"newer"


def test_a_killed_writer_never_leaves_a_wrong_file_that_counts(tmp_path: Path) -> None:
    path, contents = tmp_path / "a.bin", [bytes([k]) * 50_000 for k in range(8)]
    for attempt in range(20):
        child = os.fork()
        if child == 0:
            while True:
                for content in contents:
                    write_bytes(path, content)
        time.sleep(0.002 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert not whole(path) or read_bytes(path) in contents
    write_bytes(path, b"after")
    assert read_bytes(path) == b"after"

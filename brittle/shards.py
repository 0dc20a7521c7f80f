"""Files that are whole or absent: write to a temporary name, flush, rename, and a checksum beside each.

The only module through which arrays and documents reach the disk. A file counts only together with
`NAME.sha256`; a single flipped bit is found when it is read.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from brittle.errors import DamagedFileError, DiskError
from brittle.safe import Part, Rows, parts


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically, with its checksum beside it.

    Raises `DiskError` where the disk is full or cannot be written; then the old file is still whole.
    """
    _write(path, [content])


def read_bytes(path: Path) -> bytes:
    """The content of a file that `write_bytes` wrote. Raises `DamagedFileError` where its checksum differs."""
    try:
        content, noted = path.read_bytes(), _checksum(path).read_text(errors="replace").strip()
    except FileNotFoundError as error:
        raise DamagedFileError(f"{path} must exist with its checksum beside it; {error.filename} is missing") from error
    found = hashlib.sha256(content).hexdigest()
    expected, _, name = noted.partition("  ")
    if expected != found or name != path.name:
        reason = f"its checksum is {found[:12]}, expected {expected[:12]}" if expected != found else f"it is {name}"
        raise DamagedFileError(f"{path} is damaged: {reason}; delete it and run the command again")
    return content


def whole(path: Path) -> bool:
    """Whether `path` was written to the end and is undamaged."""
    try:
        read_bytes(path)
    except DamagedFileError:
        return False
    return True


def write_arrays(path: Path, arrays: Mapping[str, Rows], notes: Mapping[str, str] | None = None) -> None:
    """Write named tensors, each whole or by its rows, and text notes as one safetensors file."""
    _write(path, parts(arrays, notes or {}))


def read_arrays(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file that `write_arrays` wrote."""
    return safetensors.torch.load(read_bytes(path))


def read_notes(path: Path) -> dict[str, str]:
    """The text notes of a file that `write_arrays` wrote."""
    read_bytes(path)
    with safetensors.safe_open(str(path), framework="pt") as file:
        return file.metadata() or {}


def _write(path: Path, content: Iterable[Part]) -> None:
    """The parts of a file, and its checksum, atomically: see `write_bytes`."""
    note = _checksum(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            _temporary(path, content) as (new, digest),
            _temporary(note, [f"{digest}  {path.name}\n".encode()]) as (new_note, _),
        ):
            note.unlink(missing_ok=True)  # a crash between the renames leaves a file that does not count
            os.replace(new, path)
            os.replace(new_note, note)
    except OSError as error:
        reason = "no space is left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise DiskError(f"cannot write {path}: {reason}; free space or name another folder, then run again") from error


def _checksum(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


@contextmanager
def _temporary(path: Path, content: Iterable[Part]) -> Iterator[tuple[Path, str]]:
    """The content flushed to the disk beside `path`, under a name that goes away unless it is renamed; its digest."""
    temporary, digest = path.with_name(f".{path.name}.{os.getpid()}.tmp"), hashlib.sha256()
    try:
        with open(temporary, "wb") as file:
            for part in content:
                digest.update(part)
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        yield temporary, digest.hexdigest()
    finally:
        temporary.unlink(missing_ok=True)

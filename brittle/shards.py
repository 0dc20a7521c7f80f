"""Files that are whole or absent: write to a temporary name, flush, rename, and a checksum beside each.

The only module through which arrays and documents reach the disk. A file counts only together with
`NAME.sha256`; a single flipped bit is found when it is read.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from brittle.errors import DamagedFileError, DiskError


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically, with its checksum beside it.

    Raises `DiskError` where the disk is full or cannot be written; then the old file is still whole.
    """
    note, digest = _checksum(path), hashlib.sha256(content).hexdigest()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path, content) as new, _temporary(note, f"{digest}  {path.name}\n".encode()) as new_note:
            note.unlink(missing_ok=True)  # a crash between the renames leaves a file that does not count
            os.replace(new, path)
            os.replace(new_note, note)
    except OSError as error:
        reason = "no space is left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise DiskError(f"cannot write {path}: {reason}; free space or name another folder, then run again") from error


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


def write_arrays(path: Path, arrays: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    """Write named tensors and text notes as one safetensors file."""
    write_bytes(path, safetensors.torch.save(_apart(arrays), dict(notes or {})))


def read_arrays(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file that `write_arrays` wrote."""
    return safetensors.torch.load(read_bytes(path))


def read_notes(path: Path) -> dict[str, str]:
    """The text notes of a file that `write_arrays` wrote."""
    read_bytes(path)
    with safetensors.safe_open(str(path), framework="pt") as file:
        return file.metadata() or {}


def _checksum(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _apart(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arrays on the CPU, contiguous; those that share memory with an earlier one are copied."""
    plain: dict[str, Tensor] = {}
    held: set[int] = set()
    for name, array in arrays.items():
        array = array.detach().cpu().contiguous()
        memory = array.untyped_storage().data_ptr()
        plain[name] = array.clone() if memory in held else array
        held.add(memory)
    return plain


@contextmanager
def _temporary(path: Path, content: bytes) -> Iterator[Path]:
    """The content flushed to the disk beside `path`, under a name that goes away unless it is renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)

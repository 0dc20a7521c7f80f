"""Files that are whole or absent: write to a temporary name, flush, rename, and a checksum beside each.

The only module through which arrays and documents reach the disk. A file counts only together with
`NAME.sha256`; a single flipped bit is found when it is read.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from brittle.errors import DamagedFileError, DiskError


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically, with its checksum beside it.

    Raises `DiskError` where the disk is full or cannot be written; then the old file is still whole.
    """
    digest = hashlib.sha256(content).hexdigest()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _checksum(path).unlink(missing_ok=True)  # a crash between the renames leaves a file that does not count
        _replace(path, content)
        _replace(_checksum(path), f"{digest}  {path.name}\n".encode())
    except OSError as error:
        reason = "no space is left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise DiskError(f"cannot write {path}: {reason}; free space or name another folder, then run again") from error


def read_bytes(path: Path) -> bytes:
    """The content of a file that `write_bytes` wrote. Raises `DamagedFileError` where its checksum differs."""
    try:
        content, noted = path.read_bytes(), _checksum(path).read_text().split()
    except FileNotFoundError as error:
        raise DamagedFileError(f"{path} must exist with its checksum beside it; {error.filename} is missing") from error
    found = hashlib.sha256(content).hexdigest()
    if noted[:1] != [found]:
        raise DamagedFileError(
            f"{path} is damaged: its checksum is {found[:12]}, expected {''.join(noted[:1])[:12]}; "
            "delete it and run the command again"
        )
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
    plain = {name: array.detach().cpu().contiguous() for name, array in arrays.items()}
    write_bytes(path, safetensors.torch.save(plain, dict(notes or {})))


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


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

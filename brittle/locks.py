"""One process at a time in a folder: the system lets go of the lock when its process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from brittle.errors import DiskError, RunFolderError


def hold(folder: Path, wait: bool = False) -> IO[str]:
    """Make `folder` and lock it until the file that is returned is closed.

    Raises `RunFolderError` where it is a file, or where another process holds it and `wait` is false, and
    `DiskError` where it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} must be a folder, found a file; name another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")  # noqa: SIM115  (open as long as the lock is held)
        _lock(file, folder, wait)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
    except OSError as error:
        raise DiskError(f"cannot write {folder}: {error.strerror}; free space or name another folder") from error
    return file


def _lock(file: IO[str], folder: Path, wait: bool) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read()
        file.close()
        raise RunFolderError(
            f"one process at a time may write to {folder}, found {holder or 'another'} at work in it; "
            "wait for its end, or name another folder"
        ) from error

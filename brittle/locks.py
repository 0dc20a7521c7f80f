"""Who may write in a folder: the system lets go of a lock when its process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from brittle.errors import DiskError, RunFolderError


def hold(folder: Path, wait: bool = False, shared: bool = False) -> IO[str]:
    """Make `folder` and lock it until the file that is returned is closed.

    wait: for another process that holds it. shared: hold it together with others that share it.

    Raises `RunFolderError` where it is a file, or where another process holds it and `wait` is false, and
    `DiskError` where it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} must be a folder, found a file; name another")
    file = claim(folder / ".lock", wait, shared)
    if file is None:
        holder = (folder / ".lock").read_text()
        raise RunFolderError(
            f"one run at a time may write to {folder}, found {holder or 'another'} at work in it; "
            "wait for its end, or name another folder"
        )
    return file


def claim(file: Path, wait: bool = False, shared: bool = False) -> IO[str] | None:
    """Make `file` and lock it until what is returned is closed; None where another process holds it.

    Raises `DiskError` where it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held = open(file, "a+")  # noqa: SIM115  (open as long as the lock is held)
        if not _locked(held, wait, shared):
            held.close()
            return None
        held.truncate(0)
        held.write(str(os.getpid()))
        held.flush()
    except OSError as error:
        raise DiskError(f"cannot write {file.parent}: {error.strerror}; free space or name another folder") from error
    return held


def _locked(file: IO[str], wait: bool, shared: bool) -> bool:
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True

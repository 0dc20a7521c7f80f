"""Whose code failed, and where: an exception in one line, with the line of the user's code it came from."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path


def described(error: BaseException) -> str:
    """An exception in one line: its type and the first line of its message.

    >>> described(ValueError("too long\\nby far"))
    'ValueError: too long'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def blame(error: BaseException) -> str | None:
    """`file:line` of the user's code where it raised the error; None where our own code did."""
    frames = _frames(error)
    return frames[-1][1] if frames and frames[-1][0] == "user" else None


def place(error: BaseException) -> str | None:
    """The innermost line of the user's code that an error passed through on its way."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    return next((where for whose, where in reversed(_frames(error)) if whose == "user"), None)


def _frames(error: BaseException) -> list[tuple[str, str]]:
    """Whose code an error passed through, and where, outermost first; libraries are left out."""
    library = tuple(sysconfig.get_path(key) + os.sep for key in ("purelib", "platlib", "stdlib"))
    ours = str(Path(__file__).parent) + os.sep
    frames = []
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename.startswith(ours):
            frames.append(("ours", f"{frame.filename}:{frame.lineno}"))
        elif not frame.filename.startswith((*library, "<")):
            frames.append(("user", f"{frame.filename}:{frame.lineno}"))
    return frames

"""How a command ends: every error as one line and an exit status, in one place.

0 ok    2 usage    3 the user's model or data    4 damaged file    5 too many inputs skipped
70 our bug    130 Ctrl-C and 143 SIGTERM: the same command resumes
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click

from brittle.blame import blame, described
from brittle.errors import BrittleError, SubjectError

OUR_BUG, INTERRUPTED, TERMINATED = 70, 130, 143
RESUMES = "the same command goes on from what is finished"


class Terminated(BaseException):
    """SIGTERM arrived."""


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM as an exception, so that files and locks are let go of."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def verdict(error: BaseException) -> tuple[str, int]:
    """What to say of an error, in one line, and the exit status."""
    if isinstance(error, click.Abort) and error.__cause__:
        error = error.__cause__
    if isinstance(error, BrittleError):
        line, status = str(error), error.exit_status
    elif isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        hint = f"; see `{context.command_path} --help`" if context else ""
        line, status = f"{error.format_message().rstrip('.')}{hint}", error.exit_code
    elif isinstance(error, (KeyboardInterrupt, click.Abort)):
        line, status = f"interrupted; {RESUMES}", INTERRUPTED
    elif isinstance(error, Terminated):
        line, status = f"terminated; {RESUMES}", TERMINATED
    elif isinstance(error, SystemExit):
        line, status = "", error.code if isinstance(error.code, int) else 1
    else:
        line, status = _unexpected(error)
    return " ".join(line.split()), status


def _unexpected(error: BaseException) -> tuple[str, int]:
    """The user's code, where the innermost line is theirs; otherwise ours."""
    line = blame(error)
    if line:
        return f"your code must not raise, found {described(error)} at {line}; mend it there", SubjectError.exit_status
    return f"this is a bug in brittle: {described(error)}; please report it with what --debug prints", OUR_BUG

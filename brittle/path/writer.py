"""Writes beside the training: one thread, in the order in which it is told, never far behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

AHEAD = 4
"""Writes that may wait: what they hold stays in memory until then."""


class Writer:
    """Runs writes one after the other; `busy` is for how many seconds so far.

    What one of them raises is raised by the next `submit` or `wait`. A write that fails is the last: what waits behind
    it is given up, since files build on each other.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="brittle-recorder")
        self._waiting: list[Future[Any]] = []
        self._failed: BaseException | None = None
        self.busy = 0.0

    def submit(self, write: Callable[..., Any], *arguments: Any) -> None:
        """Do `write(*arguments)` soon; waits where too many are still to be done."""
        self._forget_done(keep=AHEAD)
        self._waiting.append(self._thread.submit(self._run, write, arguments))

    def wait(self) -> None:
        """Return when all is written."""
        self._forget_done(keep=0)

    def stop(self) -> None:
        """Give up what has not begun; returns when nothing is being written any more."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _run(self, write: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        """In the thread: one write, unless an earlier one failed."""
        if self._failed is not None:
            return
        began = time.monotonic()
        try:
            write(*arguments)
        except BaseException as error:
            self._failed = error
        self.busy += time.monotonic() - began

    def _forget_done(self, keep: int) -> None:
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > keep):
            self._waiting.pop(0).result()
        if self._failed is not None:
            raise self._failed

"""Writes beside the training: one thread, in the order in which it is told, never far behind."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

AHEAD = 4
"""Writes that may wait: what they hold stays in memory until then."""


class Writer:
    """Runs writes one after the other. What one of them raises is raised by the next `submit` or `wait`."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="brittle-recorder")
        self._waiting: list[Future[Any]] = []

    def submit(self, write: Callable[..., Any], *arguments: Any) -> None:
        """Do `write(*arguments)` soon; waits where too many are still to be done."""
        self._forget_done(keep=AHEAD)
        self._waiting.append(self._thread.submit(write, *arguments))

    def wait(self) -> None:
        """Return when all is written."""
        self._forget_done(keep=0)

    def stop(self) -> None:
        """Give up what has not begun; returns when nothing is being written any more."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _forget_done(self, keep: int) -> None:
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > keep):
            self._waiting.pop(0).result()

"""What the doctor looks at, and what it says of one matter: a verdict, and one line with the value and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path as Folder
from typing import Literal

from brittle.exits import verdict
from brittle.path.replay import Path
from brittle.pipeline.context import PRESETS, Effort
from brittle.subject import Subject

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One matter. `ok`: nothing to do; `warn`: the audit runs, but says less; `fail`: the audit would fail."""

    name: str
    verdict: Verdict
    line: str
    error: BaseException | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Visit:
    """The subject, its path as far as it could be opened, and how the audit would run."""

    subject: Subject
    path: Path | None
    device: str
    preset: str
    queries: int
    folder: Folder

    @property
    def effort(self) -> Effort:
        return PRESETS[self.preset]


def looked_at(name: str, look: Callable[[], Check]) -> Check:
    """What a look found; whatever it raises is a failure that says so, and stops no other look."""
    try:
        return look()
    except Exception as error:
        return failed(name, error)


def failed(name: str, error: Exception) -> Check:
    """An error as a check."""
    return Check(name, "fail", verdict(error)[0], error)

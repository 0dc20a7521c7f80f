"""What the doctor looks at, and what it says of one matter: a verdict, and one line with the value and the remedy."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
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


Look = Callable[[Visit], Check | None]
"""A look at one matter; None where there is nothing to look at."""


def looked_at(name: str, look: Look, visit: Visit) -> Check | None:
    """What a look found, if anything; what it raises is a failure that says so, and stops no other look."""
    try:
        return look(visit)
    except Exception as error:
        return failed(name, error)


def failed(name: str, error: Exception) -> Check:
    """An error as a check."""
    return Check(name, "fail", verdict(error)[0], error)


def listed(checks: Sequence[Check], width: int | None = None) -> list[str]:
    """The checks as aligned text, one each; wrapped to `width` columns where that is given."""
    widest = max(len(check.name) for check in checks)
    heads = [f"{check.verdict:<4}  {check.name:<{widest}}  " for check in checks]
    if width is None or width < 2 * len(heads[0]):
        return [head + check.line for head, check in zip(heads, checks, strict=True)]
    wrapped = [textwrap.wrap(check.line, width - len(heads[0]), break_on_hyphens=False) for check in checks]
    return [head + f"\n{' ' * len(head)}".join(lines) for head, lines in zip(heads, wrapped, strict=True)]


def summary(checks: Sequence[Check], whole: bool = True) -> str:
    """One line about all of them. whole: whether there was a subject to look at."""
    wrong, doubtful = (sum(check.verdict == verdict for check in checks) for verdict in ("fail", "warn"))
    if not whole:
        return "the subject cannot be made, so that nothing further could be looked at; mend this first"
    mended = any(check.name == "subject" and check.verdict == "fail" for check in checks)
    as_if = "; what stands below the subject was looked at as if that were mended" if mended else ""
    if wrong:
        return f"an audit would fail: {wrong} of {len(checks)} checks do{as_if}"
    heed = f"; {doubtful} to heed" if doubtful else ""
    return f"an audit can run{heed}"


def size(count: float) -> str:
    """A number of bytes.

    >>> size(900), size(79_440), size(2 << 30), size(5.5e10)
    ('900 B', '78 KiB', '2 GiB', '51 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if count >= 10 or count == int(count) else f"{count:.1f} {unit}"

"""The run folder: the only place that knows what is written where.

    settings.json          enough to repeat the run; a folder with other settings is refused
    STAGE/STAGE.safetensors, STAGE/PART.safetensors      arrays of one stage (memory, ledger, shift, ...)
    pictures.safetensors   the images of the report
    NAME.json              documents: train (names and classes), holes, findings (schema-checked)
    failures.csv           one row per query and attack or probe
    report.html            the page

Each file is written whole, with its checksum beside it (`brittle.shards`). A stage's result that is there and
undamaged is loaded instead of computed: so the same command resumes. One process holds the folder, or several that
share the work of one map; then each claims what it computes.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pydantic
from torch import Tensor

from brittle.errors import DamagedFileError, RunFolderError, UsageError
from brittle.findings import Findings
from brittle.locks import claim, hold
from brittle.settings import as_written, difference, versions
from brittle.shards import read_arrays, read_bytes, read_notes, whole, write_arrays, write_bytes

OURS = (".json", ".csv", ".html", ".safetensors")
"""Endings of the files that this module writes."""

CLAIMS = ".claims"
"""The folder of the locks on what is being computed."""


def open_run(root: Path | str, settings: Mapping[str, Any], shared: bool = False) -> RunFolder:
    """Begin a run in `root`, or resume the run of the same settings, and hold the folder until it is closed.

    Args:
        root: an absent or empty folder (a recorded `path/` may lie in it), or the folder of an earlier run.
        settings: whatever the result depends on, as plain data; the versions of the libraries are added.
        shared: hold it together with other processes of the same settings that share it.

    Raises:
        RunFolderError: where the folder belongs to another audit, is no run folder, or is held by a process.
        DiskError: where it cannot be written.
    """
    root, wanted = Path(root), as_written({**settings, "versions": versions()})
    run = RunFolder(root, hold(root, shared=shared), shared)
    try:
        with run.claim("settings"):
            _settle(run, wanted)
        if not shared:
            for leftover in root.rglob(".*.tmp"):  # of a run that was killed while it wrote
                leftover.unlink(missing_ok=True)
            shutil.rmtree(root / CLAIMS, ignore_errors=True)
    except BaseException:
        run.close()
        raise
    return run


def _settle(run: RunFolder, wanted: Any) -> None:
    """Write the settings of a new run; hold those of an earlier one against them."""
    if not begun(run.root):
        run.save_document("settings", wanted)
        return
    other = difference(run.load_document("settings"), wanted)
    if other:
        raise RunFolderError(f"{run.root} belongs to another audit: {other}; name another --out, or delete the folder")


def read_run(root: Path | str) -> RunFolder:
    """The run in `root`, for reading. Raises `RunFolderError` where there is none."""
    root = Path(root)
    if not (root / "settings.json").exists():
        found = "has no settings.json" if root.is_dir() else "is a file" if root.exists() else "does not exist"
        raise RunFolderError(f"RUN must be a folder that `brittle audit --out` wrote, {root} {found}; correct its name")
    return RunFolder(root)


def begun(root: Path) -> bool:
    """Whether `root` is a run folder. An absent or empty one, or one whose run was killed at once, is not yet.

    Raises `RunFolderError` where something else lies there.
    """
    if not root.exists():
        return False
    if not root.is_dir():
        raise RunFolderError(f"--out must name a folder, {root} is a file; name another")
    settings = root / "settings.json"
    others = [p.name for p in root.iterdir() if p.name not in ("path", ".lock", CLAIMS) and p.suffix != ".tmp"]
    if set(others) <= {settings.name, f"{settings.name}.sha256"}:
        return whole(settings)
    if not settings.exists():
        raise RunFolderError(
            f"--out must name an absent or empty folder, or a run folder; {root} holds {len(others)} other files, "
            f"{min(others)} among them; name another"
        )
    return True


class RunFolder:
    """One audit's files. Made by `open_run` (to write, holding the folder) and `read_run` (to read)."""

    def __init__(self, root: Path, lock: IO[str] | None = None, shared: bool = False) -> None:
        self.root, self._lock, self._shared = root, lock, shared

    def has(self, name: str) -> bool:
        """Whether the arrays of a stage, or of a part `STAGE/PART`, are there and undamaged."""
        return whole(self.arrays_path(name))

    def save(self, name: str, arrays: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
        """Write the arrays of a stage, with text notes."""
        write_arrays(self.arrays_path(name), arrays, notes)

    def load(self, name: str) -> dict[str, Tensor]:
        """The arrays of a stage. Raises `DamagedFileError` where they are missing or damaged."""
        return read_arrays(self.arrays_path(name))

    def notes(self, name: str) -> dict[str, str]:
        """The text notes beside the arrays of a stage."""
        return read_notes(self.arrays_path(name))

    @contextmanager
    def claim(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Claim what is computed under a name, so that no other process computes it at the same time.

        Yields whether it is claimed: always, after the other's end, where `wait` is true.
        """
        if not self._shared:
            yield True
            return
        held = claim(self.root / CLAIMS / name.replace("/", "-"), wait)
        try:
            yield held is not None
        finally:
            if held is not None:
                held.close()

    def drop(self, name: str) -> None:
        """Delete a folder of parts that are not needed any more."""
        shutil.rmtree(self.root / name, ignore_errors=True)

    def has_document(self, name: str) -> bool:
        """Whether NAME.json is there and undamaged."""
        return whole(self.root / f"{name}.json")

    def save_document(self, name: str, value: Any) -> None:
        """Write plain data as NAME.json. Raises `ValueError` for numbers that JSON does not know."""
        write_bytes(self.root / f"{name}.json", json.dumps(value, indent=1, allow_nan=False).encode())

    def load_document(self, name: str) -> Any:
        """The plain data of NAME.json."""
        return _read_json(self.root / f"{name}.json")

    def save_findings(self, findings: Findings) -> None:
        """Write findings.json, after a look that it can be read back."""
        content = findings.model_dump_json(indent=1)
        Findings.model_validate_json(content)
        write_bytes(self.root / "findings.json", content.encode())

    def findings(self) -> Findings:
        """The audit's findings. Raises `DamagedFileError` where they break the schema, `UsageError` before the end."""
        path = self.root / "findings.json"
        if not path.exists():
            raise UsageError(f"{self.root} has no findings yet; run its audit to the end with the same command")
        try:
            return Findings.model_validate_json(read_bytes(path))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise DamagedFileError(
                f"{path} must obey `brittle schema`, found at {where or 'its top'}: {first['msg']}; audit again"
            ) from error

    def save_failures(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Write failures.csv; the first row's keys are the columns."""
        rows = list(rows)
        text = io.StringIO()
        table = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_bytes(self.root / "failures.csv", text.getvalue().encode())

    def add_failures(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Put rows into failures.csv, in place of those of the same query, kind, name and norm; the others stay."""
        key = lambda row: tuple(str(row[name]) for name in ("query", "kind", "name", "norm"))  # noqa: E731
        rows = list(rows)
        fresh = {key(row) for row in rows}
        before = self.failures() if (self.root / "failures.csv").exists() else []
        self.save_failures([*rows, *(row for row in before if key(row) not in fresh)])

    def failures(self) -> list[dict[str, str]]:
        """The rows of failures.csv, as text."""
        return list(csv.DictReader(io.StringIO(read_bytes(self.root / "failures.csv").decode())))

    def save_report(self, page: str) -> Path:
        """Write report.html; returns its path."""
        write_bytes(self.root / "report.html", page.encode())
        return self.root / "report.html"

    def verify(self) -> int:
        """Check every file against its checksum and the findings against their schema.

        Returns how many files are whole. Raises `DamagedFileError` that names the first damaged one.
        """
        files = sorted(p for p in self.root.rglob("*") if p.suffix in OURS and not p.name.startswith("."))
        noted = {p.with_suffix("") for p in self.root.rglob("*.sha256")}
        for path in sorted({*files, *noted}):
            read_bytes(path)
        if self.root / "findings.json" in files:
            self.findings()
        return len(files)

    def arrays_path(self, name: str) -> Path:
        """Where the arrays of a stage (`ledger`) or of its part (`ledger/3`) lie."""
        if name == "pictures":
            return self.root / "pictures.safetensors"
        return self.root / f"{name if '/' in name else f'{name}/{name}'}.safetensors"

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_bytes(path))
    except json.JSONDecodeError as error:
        raise DamagedFileError(f"{path} must be JSON, found {error}; delete it and run the command again") from error

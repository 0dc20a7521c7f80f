"""What is shipped: the source archive, and the wheel that is built from it, hold every file as a file."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLAIN = {"brittle/py.typed"}
"""Files besides modules, and the templates and styles of the report."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the archive and the wheel, built offline from a copy of the sources."""
    source = tmp_path_factory.mktemp("source") / "brittle"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("brittle", "attacks"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(source / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(built.glob("*.whl")))


def expected() -> set[str]:
    """Every module, and what is not a module, of the checkout; the attacks are found through their link."""
    modules = [*(ROOT / "brittle").rglob("*.py"), *(ROOT / "brittle" / "attacks").rglob("*.py")]
    report = [p for ending in ("*.jinja", "*.css", "*.js") for p in (ROOT / "brittle" / "report").rglob(ending)]
    return {str(p.relative_to(ROOT)) for p in [*modules, *report]} | PLAIN


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == expected()
    assert {"brittle/attacks/__init__.py", "brittle/py.typed", "brittle/cli.py"} <= names


@pytest.mark.slow
def test_the_attacks_are_files_with_their_content(wheel: zipfile.ZipFile, built: Path) -> None:
    for path in (ROOT / "attacks").glob("*.py"):
        assert wheel.read(f"brittle/attacks/{path.name}") == path.read_bytes()
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        kinds = {m.name.partition("/")[2]: m for m in archive.getmembers()}
        assert kinds["brittle/attacks/__init__.py"].isfile()
        assert not any(member.issym() or member.islnk() for member in kinds.values())


@pytest.mark.slow
def test_the_metadata_are_those_of_setup_cfg(wheel: zipfile.ZipFile) -> None:
    info = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(info).decode())
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    needed = [line for line in config["options"]["install_requires"].split("\n") if line and not line.startswith("#")]
    plain = [r for r in metadata.get_all("Requires-Dist") or [] if "extra ==" not in r]
    assert (metadata["Name"], metadata["License-Expression"]) == ("brittle", "MIT")
    assert {r.split(">")[0].split("<")[0] for r in plain} == {r.split(">")[0] for r in needed}
    assert metadata["Requires-Python"] == ">=3.11"
    scripts = wheel.read(info.replace("METADATA", "entry_points.txt")).decode()
    assert "brittle = brittle.cli:main" in scripts

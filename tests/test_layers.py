"""The rooms of the package in import order: each module imports only from rooms above its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import brittle

ROOMS = (
    "_version",
    "errors",
    "bounds",
    "blame",
    "records",
    "findings",
    "safe",
    "shards",
    "locks",
    "shares",
    "deterministic",
    "checks",
    "data",
    "augmentation",
    "subject",
    "split",
    "path",
    "kernel",
    "mass",
    "probes",
    "shift",
    "outcomes",
    "flips",
    "accounts",
    "holes",
    "natural_holes",
    "scores",
    "agreement",
    "suggest",
    "report",
    "attacks",
    "settings",
    "runs",
    "packing",
    "stages",
    "exhibits",
    "assemble",
    "pipeline",
    "loading",
    "integrations",
    "examples",
    "terminal",
    "exits",
    "doctor",
    "cli",
    "__main__",
)
"""From the ground up. `brittle/__init__` stands outside: it imports names when they are first used."""

ONLY_IN = {
    "matplotlib": "report/figures",
    "foolbox": "attacks/",
    "jinja2": "report/",
    "click": ("cli.py", "exits.py"),
    "lightning": "integrations/",
    "pytorch_lightning": "integrations/",
    "transformers": "integrations/",
    "accelerate": "integrations/",
}
"""Libraries that belong to one place."""

PACKAGE = Path(brittle.__file__).parent


def modules() -> list[Path]:
    """Every module of the package, below the link to attacks/ as well."""
    linked = [p for folder in PACKAGE.iterdir() if folder.is_symlink() for p in folder.rglob("*.py")]
    return sorted({*PACKAGE.rglob("*.py"), *linked} - {PACKAGE / "__init__.py"})


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            assert node.module is not None
            if node.module == "brittle":
                yield from (f"brittle.{alias.name}" for alias in node.names)
            else:
                yield node.module


def room(module: str) -> str:
    """The room that holds `brittle.ROOM.rest`."""
    return module.split(".")[1]


def name(path: Path) -> str:
    return ".".join(("brittle", *path.relative_to(PACKAGE).with_suffix("").parts))


@pytest.mark.parametrize("path", modules(), ids=name)
def test_each_module_imports_only_from_rooms_above(path: Path) -> None:
    own, needed = room(name(path)), {m: room(m) for m in imports(path) if m.startswith("brittle.")}
    unknown = {own, *needed.values()} - set(ROOMS)
    assert not unknown, f"write {unknown} into ROOMS, at its place in the import order"
    below = [m for m, other in needed.items() if ROOMS.index(other) > ROOMS.index(own)]
    assert not below, f"{name(path)} may not import {below}"


@pytest.mark.parametrize("path", modules(), ids=name)
def test_libraries_stay_in_their_place(path: Path) -> None:
    place = str(path.relative_to(PACKAGE))
    for library, where in ONLY_IN.items():
        if any(m.split(".")[0] == library for m in imports(path)):
            assert place.startswith(where), f"{place} may not import {library}"


def test_modules_of_one_room_do_not_import_each_other_in_a_circle() -> None:
    names = {name(p).removesuffix(".__init__"): p for p in modules()}
    edges = {m: {i for i in imports(p) if i in names and room(i) == room(m) and i != m} for m, p in names.items()}
    while leaves := [m for m, targets in edges.items() if not targets]:
        for leaf in leaves:
            del edges[leaf]
        for targets in edges.values():
            targets.difference_update(leaves)
    assert not edges, f"a circle of imports among {sorted(edges)}"


def test_attacks_are_a_link_inside_the_package() -> None:
    link = PACKAGE / "attacks"
    if link.is_symlink():  # in a checkout; a wheel holds the files
        assert str(link.readlink()) == "../attacks"
    assert any(name(p).startswith("brittle.attacks") for p in modules())


def test_a_wrong_import_would_be_found(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "import brittle.cli\ndef late():\n    from brittle.report.view import x\n    from brittle import cli\n"
    )
    assert list(imports(file)) == ["brittle.cli", "brittle.report.view", "brittle.cli"]

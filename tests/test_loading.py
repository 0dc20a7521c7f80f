"""Subjects by name: what a spec may be, how options arrive, and one line for whatever goes wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from brittle.blame import blame
from brittle.errors import BrittleError, DataError, SubjectError, UsageError
from brittle.loading import load_subject

HEAD = """
from __future__ import annotations
from pathlib import Path
import torch
import brittle

def subject(**changes):
    data = torch.rand(9, 4), torch.arange(9) % 3
    return brittle.Subject(**({"model": torch.nn.Linear(4, 3).eval(), "train": data, "test": data} | changes))

"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write a factory file into the working directory; returns its path."""
    monkeypatch.chdir(tmp_path)

    def write(body: str, name: str = "mine.py", head: str = HEAD) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(head + body)
        return str(path)

    return write


MAKE = "def make(): return subject(name='mine')\n"


def test_a_file_is_named_by_an_absolute_or_a_relative_path(write: Callable[..., str]) -> None:
    path = write(MAKE, "deep/er/mine.py")
    assert load_subject(f"{path}:make").name == "mine"
    assert load_subject("deep/er/mine.py:make").name == "mine"
    assert load_subject("./deep/er/mine.py:make").name == "mine"


def test_a_package_in_the_working_directory_is_importable(write: Callable[..., str]) -> None:
    write(MAKE, "audited_package/subjects.py")
    assert load_subject("audited_package.subjects:make").name == "mine"


def test_files_of_one_name_are_different_modules(write: Callable[..., str]) -> None:
    for name in "ab":
        write(f"def make(): return subject(name='{name}')\n", f"{name}/same.py")
    assert [load_subject(f"{name}/same.py:make").name for name in "ab"] == ["a", "b"]


def test_a_file_may_import_its_neighbour_early_and_late(write: Callable[..., str]) -> None:
    write("NAME = 'early'\n", "one/neighbour_early.py", head="")
    write("NAME = 'late'\n", "one/neighbour_late.py", head="")
    body = """
import neighbour_early
def make():
    import neighbour_late
    return subject(name=neighbour_early.NAME + neighbour_late.NAME)
"""
    before = list(sys.path)
    assert load_subject(f"{write(body, 'one/mine.py')}:make").name == "earlylate"
    assert sys.path == before


def test_dataclasses_work_in_a_factory_file(write: Callable[..., str]) -> None:
    body = """
from dataclasses import dataclass

@dataclass
class Width:
    value: int

def make(): return subject(name=str(Width(3).value))
"""
    assert load_subject(f"{write(body)}:make").name == "3"


OPTIONS = """
def make(n: int = 1, r: float = 0.5, flag: bool = True, root: Path = Path("."), text: str = "", plain="",
         maybe: int | None = None):
    return subject(name=repr((n, r, flag, root, text, plain, maybe)))
"""


def test_options_are_converted_by_their_annotations(write: Callable[..., str]) -> None:
    spec = f"{write(OPTIONS)}:make"
    assert load_subject(spec).name == repr((1, 0.5, True, Path("."), "", "", None))
    given = {"n": "7", "r": "1e-3", "flag": "No", "root": "/data", "text": "7", "plain": "7", "maybe": "3"}
    assert load_subject(spec, given).name == repr((7, 0.001, False, Path("/data"), "7", "7", 3))
    anything = write("def make(**options): return subject(name=repr(options))\n", "any.py")
    assert load_subject(f"{anything}:make", {"n": "7"}).name == "{'n': '7'}"


@pytest.mark.parametrize(
    ("body", "options", "message"),
    [
        (OPTIONS, {"m": "1"}, r"^-p m is unknown to .*mine.py:make, found m=1; its options are n, r, flag, root, text"),
        (MAKE, {"m": "1"}, r"^-p m is unknown to .*:make, found m=1; it has no options$"),
        (OPTIONS, {"n": "many"}, r"^-p n must be int, found 'many'; write -p n=5$"),
        (OPTIONS, {"r": "fast"}, r"^-p r must be float, found 'fast'; write -p r=0.5$"),
        (OPTIONS, {"flag": "maybe"}, r"^-p flag must be bool, found 'maybe'; write -p flag=true$"),
        (
            "def make(root): return subject()\n",
            {},
            r"mine.py:make needs the option root, found none; add -p root=\.\.\.$",
        ),
    ],
)
def test_options_that_are_refused(write: Callable[..., str], body: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_subject(f"{write(body)}:make", options)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine.py", r"SPEC must be file.py:make or package.module:make, found 'mine.py'; name the file"),
        ("mine:", r"SPEC must be file.py:make or package.module:make, found 'mine:'"),
        ("dir/mine:make", r"SPEC must be file.py:make or package.module:make, found 'dir/mine:make'"),
        (":make", r"SPEC must be file.py:make or package.module:make, found ':make'"),
        ("absent.py:make", r"SPEC must name a Python file, absent.py does not exist below /.*; correct its path"),
        ("no_such_package.module:make", r"can be imported, there is no no_such_package; correct it, install it"),
        ("brittle.no_such:make", r"can be imported, there is no brittle.no_such; correct it"),
        ("mine.py:mak", r"mine.py must have a function mak, found none; its functions are subject, make$"),
        ("mine.py:NUMBER", r"mine.py must have a function NUMBER, found int; its functions are subject, make$"),
    ],
)
def test_specs_that_name_nothing(write: Callable[..., str], spec: str, message: str) -> None:
    write(MAKE + "NUMBER = 3\n")
    with pytest.raises(UsageError, match=message) as caught:
        load_subject(spec)
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)


FIRST = HEAD.count("\n") + 1
"""Line number of the body's first line."""


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (
            "def make(:\n",
            SubjectError,
            rf"mine.py must import, it raised SyntaxError: .* at .*mine.py:{FIRST}; mend it",
        ),
        (
            "import no_such_thing\n",
            SubjectError,
            rf"ModuleNotFoundError: No module named 'no_such_thing' at .*mine.py:{FIRST};",
        ),
        ("import sys\nsys.exit(4)\n", SubjectError, rf"must import, it raised SystemExit: 4 at .*mine.py:{FIRST + 1};"),
        (
            "def make():\n    return {}['a']\n",
            SubjectError,
            rf"must return a brittle.Subject, it raised KeyError: 'a' at .*mine.py:{FIRST + 1};",
        ),
        (
            "def make():\n    torch.eye(2) @ torch.eye(3)\n",
            SubjectError,
            rf"it raised RuntimeError: .* at .*mine.py:{FIRST + 1};",
        ),
        (
            "def make(): raise ValueError('one\\ntwo')\n",
            SubjectError,
            rf"it raised ValueError: one at .*mine.py:{FIRST};",
        ),
        (
            "def make():\n    return subject(bounds=(0, 0.1))\n",
            DataError,
            r"lie in the bounds \[0, 0.1\].*\(at .*mine.py:9\)$",
        ),
        (
            "def make():\n    pass\n",
            SubjectError,
            r"must return a brittle.Subject, found NoneType; end it with `return",
        ),
    ],
)
def test_code_that_fails_is_named_with_its_line(
    write: Callable[..., str], body: str, kind: type[BrittleError], message: str
) -> None:
    with pytest.raises(BrittleError, match=message) as caught:
        load_subject(f"{write(body)}:make")
    assert type(caught.value) is kind
    assert caught.value.exit_status == 3
    assert "\n" not in str(caught.value)


def test_a_broken_import_inside_a_package_is_not_a_wrong_spec(write: Callable[..., str]) -> None:
    write("import no_such_thing\n", "audited_broken/subjects.py", head="")
    with pytest.raises(
        SubjectError, match=r"audited_broken.subjects must import, .*no_such_thing.* at .*subjects.py:1"
    ):
        load_subject("audited_broken.subjects:make")


def test_blame_tells_the_users_code_from_ours(write: Callable[..., str]) -> None:
    def caught(call: Callable[[], object]) -> BaseException:
        try:
            call()
        except Exception as error:
            return error
        raise AssertionError("nothing was raised")

    made = load_subject(f"{write('def make(): return subject(retrain=lambda data, seed: 1 / 0)')}:make")
    assert made.retrain is not None
    assert blame(caught(lambda: made.retrain(made.train, 0))).endswith(f"mine.py:{FIRST}")  # type: ignore[union-attr]
    assert blame(caught(lambda: made.train.inputs @ made.train.inputs)).endswith(f"test_loading.py:{here()}")
    assert blame(caught(lambda: made.train.join(None))) is None  # type: ignore[arg-type]
    assert blame(ValueError("never raised")) is None


def here() -> int:
    """The line before the caller's comparison: where its lambda stands."""
    return sys._getframe(1).f_lineno

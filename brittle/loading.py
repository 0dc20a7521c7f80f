"""Subjects by name: `file.py:make` or `package.module:make`, a factory called with `-p key=value` options.

The file's folder, or the working directory for a package, is importable while the factory runs. Options reach
the factory's keyword arguments, converted by their annotations. Whatever fails is said in one line, with the
line of the user's code that failed.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from brittle.blame import described, place
from brittle.errors import BrittleError, SubjectError, UsageError
from brittle.subject import Subject

TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}

Factory = Callable[..., Any]


def load_subject(spec: str, options: Mapping[str, str] | None = None) -> Subject:
    """The subject that a factory makes.

    Args:
        spec: `file.py:make` or `package.module:make`.
        options: the factory's keyword arguments, as text.

    Raises:
        UsageError: where the spec names nothing, or an option is unknown or cannot be converted.
        SubjectError: where the user's code fails, naming its file and line.
    """
    home, name = _parsed(spec)
    with _importable(Path(home).resolve().parent if home.endswith(".py") else Path.cwd()):
        module = _load_file(Path(home)) if home.endswith(".py") else _load_module(home)
        factory = _function(module, name, home)
        arguments = _arguments(factory, dict(options or {}), spec)
        with _named(f"the factory {spec} must return a brittle.Subject"):
            subject = factory(**arguments)
    if not isinstance(subject, Subject):
        raise SubjectError(
            f"the factory {spec} must return a brittle.Subject, found {type(subject).__name__}; "
            "end it with `return brittle.Subject(...)`"
        )
    return subject


def _parsed(spec: str) -> tuple[str, str]:
    home, _, name = spec.rpartition(":")
    module = home.endswith(".py") or all(part.isidentifier() for part in home.split("."))
    if not (module and name.isidentifier()):
        raise UsageError(
            f"SPEC must be file.py:make or package.module:make, found {spec!r}; name the file or module, "
            "a colon, and the function that makes the subject"
        )
    return home, name


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Modules in the folder can be imported."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _load_file(path: Path) -> types.ModuleType:
    """The file as a module of a name that no other has."""
    if not path.is_file():
        raise UsageError(f"SPEC must name a Python file, {path} does not exist below {Path.cwd()}; correct its path")
    path = path.resolve()
    name = f"brittle_subject_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up
    with _named(f"{path.name} must import"):
        spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> types.ModuleType:
    with _named(f"{name} must import"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise UsageError(
                f"SPEC must name a module that can be imported, there is no {error.name}; correct it, install it, or "
                "run the command in the folder that holds it"
            ) from error


def _function(module: types.ModuleType, name: str, home: str) -> Factory:
    found = getattr(module, name, None)
    if not callable(found):
        own = [
            k for k, v in vars(module).items() if isinstance(v, types.FunctionType) and v.__module__ == module.__name__
        ]
        raise UsageError(f"{home} must have a function {name}, {_found(found)}; {_there(own, 'functions')}")
    return found


def _found(value: Any) -> str:
    return "found none" if value is None else f"found {type(value).__name__}"


def _there(names: list[str], what: str) -> str:
    return f"its {what} are {', '.join(names)}" if names else f"it has no {what}"


def _arguments(factory: Factory, options: dict[str, str], spec: str) -> dict[str, Any]:
    """The options as the factory's arguments, converted by its annotations."""
    parameters = inspect.signature(factory).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = [n for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for key in options:
        if key not in names and not anything:
            raise UsageError(f"-p {key} is unknown to {spec}, found {key}={options[key]}; {_there(names, 'options')}")
    missing = [n for n in names if parameters[n].default is inspect.Parameter.empty and n not in options]
    if missing:
        raise UsageError(f"{spec} needs the option {missing[0]}, found none; add -p {missing[0]}=...")
    try:
        hints = typing.get_type_hints(factory)
    except (NameError, TypeError, AttributeError):  # an annotation that cannot be looked up here converts nothing
        hints = {}
    return {key: _converted(key, text, hints.get(key, str)) for key, text in options.items()}


def _converted(key: str, text: str, kind: Any) -> Any:
    """The text as int, float, bool or Path; of a union its first such member; anything else stays text."""
    kinds = [k for k in (typing.get_args(kind) or (kind,)) if k in (bool, int, float, Path)]
    if not kinds:
        return text
    try:
        return TRUTH[text.lower()] if kinds[0] is bool else kinds[0](text)
    except (KeyError, ValueError) as error:
        example = {bool: "true", int: "5", float: "0.5"}[kinds[0]]
        raise UsageError(f"-p {key} must be {kinds[0].__name__}, found {text!r}; write -p {key}={example}") from error


@contextmanager
def _named(rule: str) -> Iterator[None]:
    """The user's errors in one line with their place; our own, raised from the user's code, keep their kind."""
    try:
        yield
    except BrittleError as error:
        line = place(error)
        raise (type(error)(f"{error} (at {line})") if line else error) from error
    except (Exception, SystemExit) as error:
        line = place(error)
        where = f" at {line}" if line else ""
        raise SubjectError(f"{rule}, it raised {described(error)}{where}; mend it there") from error

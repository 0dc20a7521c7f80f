"""The door: a subject is made, and where its own checks refuse it, all that they refuse is found in one go.

`Subject` stops at the first thing that is wrong. Here what was wrong is put right in the simplest way that lets the
subject stand (`MENDINGS`), again and again, so that one mistake does not hide the next; what is looked at afterwards
is the mended subject.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from brittle.data import Examples
from brittle.doctor.check import Check, failed
from brittle.errors import BrittleError, UsageError
from brittle.loading import load_subject
from brittle.subject import Subject

PARTS = ("train", "test", "pool")
Given = dict[str, Any]
"""The arguments of a subject, by name."""


def admitted(spec: str, options: Mapping[str, str] | None = None) -> tuple[Subject | None, list[Check]]:
    """The subject that a factory makes, mended where its checks refuse it; and one failure for each refusal.

    None where the factory itself fails, or where nothing here mends what is wrong. Raises `UsageError` where the spec
    or an option cannot be understood.
    """
    try:
        return load_subject(spec, options), []
    except UsageError:
        raise
    except BrittleError as error:
        half = _half_made(error)
        if half is None:
            return None, [failed("subject", error)]
        subject, further = mended(_given(half))
        return subject, [failed("subject", error), *further[1:]]


def mended(given: Given) -> tuple[Subject | None, list[Check]]:
    """The subject of some arguments, put right until it stands; and one failure for each thing that was wrong."""
    found: list[Check] = []
    while True:
        made = _made(given)
        if isinstance(made, Subject):
            return made, found
        found.append(failed("subject", made))
        better = next((new for new in _attempts(given, made) if str(_made(new)) != str(made)), None)
        if better is None:
            return None, found
        given = better


def _made(given: Given) -> Subject | BrittleError:
    try:
        return Subject(**given)
    except BrittleError as error:
        return error


def _attempts(given: Given, error: BrittleError) -> list[Given]:
    """The arguments changed by each mending that changes something; filled in as far as the checks had come."""
    half = _half_made(error)
    given = given if half is None else _given(half)
    changes = [mending(given) for mending in MENDINGS]
    return [given | change for change in changes if change]


def _half_made(error: BaseException | None) -> Subject | None:
    """The subject whose checks raised an error, as far as it had come."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            own = frame.f_locals.get("self")
            if isinstance(own, Subject) and frame.f_code.co_name == "__post_init__":
                return own
        error = error.__cause__
    return None


def _given(half: Subject) -> Given:
    return {f.name: getattr(half, f.name) for f in fields(Subject) if f.init}


def _in_evaluation_mode(given: Given) -> Given:
    return {"model": copy.deepcopy(given["model"]).eval()} if isinstance(given["model"], nn.Module) else {}


def _finite_inputs(given: Given) -> Given:
    pairs = {part: _pair(given[part]) for part in PARTS}
    zero = lambda inputs: torch.as_tensor(inputs).nan_to_num(0.0, 0.0, 0.0)  # noqa: E731
    return {part: (zero(pair[0]), pair[1]) for part, pair in pairs.items() if pair is not None}


def _wide_bounds(given: Given) -> Given:
    parts = [given[part].inputs for part in PARTS if isinstance(given[part], Examples)]
    return {"bounds": (min(p.min().item() for p in parts), max(p.max().item() for p in parts))} if parts else {}


def _labels_in_range(given: Given) -> Given:
    """Numbered from their smallest where that is all that is wrong; else those outside put to the nearest class."""
    held = {part: given[part] for part in PARTS if isinstance(given[part], Examples)}
    most = len(given["class_names"]) - 1
    if not held or most < 1:
        return {}
    low, high = (int(f(f(v.targets) for v in held.values())) for f in (min, max))
    moved = low if high - low <= most else 0
    return {k: Examples(v.inputs, (v.targets - moved).clamp(0, most), v.names) for k, v in held.items()}


def _left_out(name: str, value: Any = None) -> Callable[[Given], Given]:
    return lambda given: {name: value} if given[name] is not None and given[name] != value else {}


def _pair(part: Any) -> tuple[Any, Any] | None:
    """Inputs and labels, where a part of the data holds them as arrays."""
    if isinstance(part, Examples):
        return part.inputs, part.targets
    arrays = isinstance(part, tuple) and len(part) == 2 and all(isinstance(t, Tensor | np.ndarray) for t in part)
    return part if arrays else None


MENDINGS: tuple[Callable[[Given], Given], ...] = (
    _in_evaluation_mode,
    _labels_in_range,
    _finite_inputs,
    _wide_bounds,
    _left_out("normalize"),
    _left_out("class_names", ()),
    _left_out("ids"),
    _left_out("loss"),
    _left_out("checkpoints"),
    _left_out("pool"),
)
"""What lets a refused subject stand, one mistake each: arguments -> those that it changes."""

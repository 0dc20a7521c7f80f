"""brittle audits a trained classifier: where it fails, why there, whether that is true, which data is missing.

>>> import brittle
>>> subject = brittle.Subject(model, train, test, path="runs/path")  # doctest: +SKIP
>>> findings = brittle.audit(subject, out="runs/mine")  # doctest: +SKIP

`brittle.pipeline` has the stages in order. Names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from brittle._version import __version__

if TYPE_CHECKING:
    from brittle.augmentation import Augmentation, Augmented
    from brittle.data import Examples
    from brittle.path.recorder import Recorder
    from brittle.pipeline import audit
    from brittle.subject import Subject

__all__ = ["Augmentation", "Augmented", "Examples", "Recorder", "Subject", "__version__", "audit"]

_HOMES = {
    "Augmentation": "brittle.augmentation",
    "Augmented": "brittle.augmentation",
    "Examples": "brittle.data",
    "Recorder": "brittle.path.recorder",
    "Subject": "brittle.subject",
    "audit": "brittle.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'brittle' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

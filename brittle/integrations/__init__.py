"""Recording under a training framework: a callback for Lightning and one for Hugging Face's Trainer.

Each is imported from its own module, which needs the framework; this one needs nothing:

    from brittle.integrations.lightning import RecorderCallback
    from brittle.integrations.huggingface import RecorderCallback
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from brittle.errors import DataError, UsageError


class MissingPackageError(UsageError, ImportError):
    """A framework that is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"brittle.integrations.{extra} needs the package {package}, which is not installed; "
            f'pip install "brittle[{extra}]"'
        )


POSITIONS = "the positions of its examples in the training data"


def part_of(batch: Mapping[str, Any], key: str, what: str, remedy: str) -> Any:
    """What a batch holds under `key`. Raises `DataError`, with the keys found and the remedy."""
    if batch.get(key) is None:
        found = sorted(map(str, batch))
        raise DataError(f"a batch must hold {what} under {key!r}, found the keys {found}; {remedy}")
    return batch[key]


def tell_epoch(loader: Any, epoch: int) -> None:
    """Tell a loader's data set which epoch begins, if it asks, as `brittle.Augmented` does."""
    set_epoch = getattr(getattr(loader, "dataset", None), "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)

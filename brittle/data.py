"""Labelled examples, read from tensors, numpy arrays or a map-style data set of tuples or dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brittle.blame import described
from brittle.checks import as_numbers, checked_inputs, checked_names, checked_targets
from brittle.errors import DataError, SubjectError

INPUT_KEYS = ("image", "images", "input", "inputs", "x", "pixel_values", "features")
TARGET_KEYS = ("label", "labels", "target", "targets", "y", "class")
IN_MEMORY_LIMIT = 2 << 30
"""Bytes up to which a map-style data set is read into memory once."""


@dataclass(frozen=True)
class Examples:
    """Labelled examples: `inputs` (N, *shape) float raw inputs, `targets` (N,) int64, `names` one id each."""

    inputs: Tensor
    targets: Tensor
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, ids: Tensor | slice) -> Examples:
        """The examples at `ids` (a LongTensor or a slice), names included."""
        rows = torch.arange(len(self))[ids]
        names = tuple(self.names[i] for i in rows.tolist()) if self.names else ()
        return Examples(self.inputs[ids], self.targets[ids], names)

    def name(self, i: int) -> str:
        """The id or file name of example `i`; its number where the user gave none."""
        return self.names[i] if self.names else str(i)

    def join(self, other: Examples) -> Examples:
        """These examples followed by `other`."""
        names = tuple(e.name(i) for e in (self, other) for i in range(len(e)))
        return Examples(
            torch.cat([self.inputs, other.inputs]),
            torch.cat([self.targets, other.targets]),
            names if self.names or other.names else (),
        )

    @classmethod
    def of(cls, data: Any, what: str, names: Sequence[str] | None = None) -> Examples:
        """Read tensors, numpy arrays or a map-style data set (items: tuples or dicts).

        `data` is `Examples`, a pair (inputs, targets), a dict of two arrays, or a data set with `__len__`
        and `__getitem__`. Raises `DataError` where it is empty, ragged, or labels are not whole numbers, and
        `NotFiniteError` where inputs are not finite.
        """
        if isinstance(data, Examples):
            inputs, targets, names = data.inputs, data.targets, (data.names or None) if names is None else names
        elif isinstance(data, Mapping):
            inputs, targets = _pick(data, what)
        elif isinstance(data, (tuple, list)) and len(data) == 2 and _is_array(data[0]):
            inputs, targets = data
        elif hasattr(data, "__getitem__") and hasattr(data, "__len__"):
            inputs, targets = _read(data, what)
        else:
            hint = "pass its .dataset" if hasattr(data, "dataset") else "pass (inputs, targets) or such a data set"
            raise DataError(
                f"{what} must be tensors, numpy arrays or a map-style data set with __len__ and __getitem__, "
                f"found {type(data).__name__}; {hint}"
            )
        inputs = checked_inputs(as_numbers(inputs, f"{what} inputs"), what)
        targets = checked_targets(as_numbers(targets, f"{what} labels"), len(inputs), what)
        return cls(inputs, targets, checked_names(names, len(inputs), what))


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def _pick(item: Mapping[str, Any], what: str) -> tuple[Any, Any]:
    found = [next((item[k] for k in keys if k in item), None) for keys in (INPUT_KEYS, TARGET_KEYS)]
    if any(value is None for value in found):
        raise DataError(
            f"{what} dicts need one input key of {INPUT_KEYS} and one target key of {TARGET_KEYS}, "
            f"found {list(item)}; rename the keys or pass tuples"
        )
    return found[0], found[1]


def _read(data: Any, what: str) -> tuple[Tensor, Tensor]:
    """Read a map-style data set into memory once."""
    if not len(data):
        raise DataError(f"{what} must not be empty, found 0 examples; pass at least one labelled example")
    first = _item(data, 0, what)[0]
    size = len(data) * first.numel() * first.element_size()
    if size > IN_MEMORY_LIMIT:
        raise DataError(
            f"{what} must fit into {IN_MEMORY_LIMIT >> 30} GiB of memory, its {len(data)} inputs take "
            f"{size / 2**30:.1f} GiB; audit a subset, or raise brittle.data.IN_MEMORY_LIMIT"
        )
    inputs = torch.empty((len(data), *first.shape), dtype=first.dtype)
    targets = torch.empty(len(data), dtype=torch.float64)
    for i in range(len(data)):
        x, y = _item(data, i, what)
        if x.shape != first.shape:
            raise DataError(
                f"{what} must hold inputs of one shape, found {tuple(first.shape)} at 0 and {tuple(x.shape)} at {i}; "
                "resize or pad them in the data set"
            )
        inputs[i], targets[i] = x, y
    return inputs, targets


def _item(data: Any, i: int, what: str) -> tuple[Tensor, float]:
    """Input and label of item `i`, whatever of it raises named as the data set's."""
    try:
        item = data[i]
        if isinstance(item, Mapping):
            x, y = _pick(item, what)
        elif isinstance(item, (tuple, list)) and len(item) >= 2:
            x, y = item[0], item[1]
        else:
            raise TypeError(f"not a pair but {type(item).__name__}")
        return as_numbers(x, f"{what} inputs"), float(y)
    except SubjectError:
        raise
    except Exception as error:
        raise DataError(
            f"{what} must give (input, label) at every position, item {i} gave {described(error)}; "
            f"correct the data set's __getitem__"
        ) from error

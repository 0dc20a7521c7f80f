"""Labelled examples, read from tensors, numpy arrays or a map-style data set of tuples or dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brittle.errors import DataError, NotFiniteError

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
        and `__getitem__`. Raises `DataError` where it is empty, ragged, or labels are not whole numbers.
        """
        if isinstance(data, Examples):
            return replace(data, names=tuple(names)) if names is not None else data
        if isinstance(data, Mapping):
            inputs, targets = _pick(data, what)
        elif isinstance(data, (tuple, list)) and len(data) == 2 and _is_array(data[0]):
            inputs, targets = data
        elif hasattr(data, "__getitem__") and hasattr(data, "__len__"):
            inputs, targets = _read(data, what)
        else:
            raise DataError(
                f"{what} must be tensors, numpy arrays or a map-style data set, found {type(data).__name__}; "
                "pass (inputs, targets) or an object with __len__ and __getitem__"
            )
        inputs = torch.as_tensor(np.asarray(inputs) if not isinstance(inputs, Tensor) else inputs)
        targets = torch.as_tensor(np.asarray(targets) if not isinstance(targets, Tensor) else targets)
        return cls(
            _checked_inputs(inputs, what),
            _checked_targets(targets, len(inputs), what),
            _names(names, inputs, what),
        )


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def _pick(item: Mapping[str, Any], what: str) -> tuple[Any, Any]:
    found = [next((item[k] for k in keys if k in item), None) for keys in (INPUT_KEYS, TARGET_KEYS)]
    if any(value is None for value in found):
        raise DataError(
            f"{what}: dict items need one input key of {INPUT_KEYS} and one target key of {TARGET_KEYS}, "
            f"found {list(item)}; rename them or pass tuples"
        )
    return found[0], found[1]


def _read(data: Any, what: str) -> tuple[Tensor, Tensor]:
    """Read a map-style data set into memory once."""
    if not len(data):
        raise DataError(f"{what} must not be empty, found 0 examples")
    first = _item(data[0], what)[0]
    size = len(data) * first.numel() * first.element_size()
    if size > IN_MEMORY_LIMIT:
        raise DataError(
            f"{what} must fit into {IN_MEMORY_LIMIT >> 30} GiB of memory, its {len(data)} inputs take "
            f"{size / 2**30:.1f} GiB; audit a subset, or raise brittle.data.IN_MEMORY_LIMIT"
        )
    inputs = torch.empty((len(data), *first.shape), dtype=first.dtype)
    targets = torch.empty(len(data), dtype=torch.int64)
    for i in range(len(data)):
        x, y = _item(data[i], what)
        if x.shape != first.shape:
            raise DataError(
                f"{what} must hold inputs of one shape, found {tuple(first.shape)} and {tuple(x.shape)} at {i}"
            )
        inputs[i], targets[i] = x, int(y)
    return inputs, targets


def _item(item: Any, what: str) -> tuple[Tensor, Any]:
    x, y = _pick(item, what) if isinstance(item, Mapping) else (item[0], item[1])
    return torch.as_tensor(np.asarray(x) if not isinstance(x, Tensor) else x), y


def _checked_inputs(inputs: Tensor, what: str) -> Tensor:
    if len(inputs) == 0:
        raise DataError(f"{what} must not be empty, found 0 examples")
    if inputs.dim() < 2:
        raise DataError(f"{what} inputs must have shape (N, *shape), found {tuple(inputs.shape)}")
    if not inputs.is_floating_point():
        raise DataError(
            f"{what} inputs must be floating point, found {inputs.dtype}; convert them to the range the model expects"
        )
    if not inputs.isfinite().all():
        raise NotFiniteError(f"{what} inputs must be finite, found NaN or infinity")
    return inputs.to(torch.get_default_dtype())


def _checked_targets(targets: Tensor, count: int, what: str) -> Tensor:
    targets = targets.reshape(-1) if targets.dim() == 2 and targets.shape[1] == 1 else targets
    if targets.shape != (count,):
        raise DataError(f"{what} needs one label an input: {count} inputs, labels of shape {tuple(targets.shape)}")
    if targets.is_floating_point() and not (targets == targets.round()).all():
        raise DataError(f"{what} labels must be whole numbers from 0, found {targets[targets != targets.round()][0]}")
    return targets.to(torch.int64)


def _names(names: Sequence[str] | None, inputs: Tensor, what: str) -> tuple[str, ...]:
    if names is not None and len(names) != len(inputs):
        raise DataError(f"ids must hold one name an example: {len(inputs)} {what} examples, {len(names)} names")
    return tuple(map(str, names)) if names is not None else ()

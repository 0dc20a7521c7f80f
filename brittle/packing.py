"""Records to named arrays and back, so that a stage's result can lie in the run folder.

A record's tensors become arrays named by their place (`ledger.contributions`); everything else becomes one JSON
tree. Only the record classes that the caller names are ever made: nothing is executed on reading.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from brittle.errors import DamagedFileError

Arrays = dict[str, Tensor]


def pack(value: Any) -> tuple[Arrays, str]:
    """Arrays by name, and the JSON tree that says how they fit together."""
    arrays: Arrays = {}
    tree = _down(value, "", arrays)
    return arrays, json.dumps(tree)


def unpack(arrays: Mapping[str, Tensor], tree: str, records: Mapping[str, type]) -> Any:
    """The value that `pack` took apart. Raises `DamagedFileError` for a record class that is not in `records`."""
    return _up(json.loads(tree), arrays, records)


def _down(value: Any, place: str, arrays: Arrays) -> Any:
    inside = lambda key: f"{place}.{key}" if place else str(key)  # noqa: E731
    if isinstance(value, Tensor):
        name = place or "value"
        while name in arrays:  # {"a.b": x, "a": {"b": y}}
            name += "'"
        arrays[name] = value
        return {"array": name}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _down(getattr(value, f.name), inside(f.name), arrays) for f in dataclasses.fields(value)}
        return {"record": type(value).__name__, "fields": fields}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(
                f"a stage's result may have text keys only, found {list(value)[:3]} at {place or 'its top'}"
            )
        return {"dict": {key: _down(v, inside(key), arrays) for key, v in value.items()}}
    if isinstance(value, (tuple, list)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_down(v, inside(k), arrays) for k, v in enumerate(value)]}
    return {"value": value}


def _up(tree: Any, arrays: Mapping[str, Tensor], records: Mapping[str, type]) -> Any:
    [(kind, content)] = [(k, v) for k, v in tree.items() if k != "fields"]
    again = lambda part: _up(part, arrays, records)  # noqa: E731
    if kind == "array":
        return arrays[content]
    if kind == "dict":
        return {key: again(v) for key, v in content.items()}
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)(again(v) for v in content)
    if kind == "record":
        if content not in records:
            raise DamagedFileError(
                f"a stage's file may hold {sorted(records)}, found {content!r}; delete it, run again"
            )
        return records[content](**{name: again(v) for name, v in tree["fields"].items()})
    return content

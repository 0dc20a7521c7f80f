"""Results that take long, kept in a file with what they were made of; made again where that is another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from brittle.packing import pack, unpack
from brittle.shards import read_arrays, read_notes, whole, write_arrays

Record = TypeVar("Record")


def kept(file: Path, made_of: str, record: type[Record], make: Callable[[], Record]) -> Record:
    """The record in `file`, or a new one. made_of: a digest of everything that it depends on."""
    if whole(file):
        notes = read_notes(file)
        if notes.get("of") == made_of:
            found: Record = unpack(read_arrays(file), notes["tree"], {record.__name__: record})
            return found
    made = make()
    arrays, tree = pack(made)
    write_arrays(file, {name: array.contiguous() for name, array in arrays.items()}, {"of": made_of, "tree": tree})
    return made

"""Named arrays as the parts of one safetensors file, in the order in which they are written: nothing is copied.

    8 bytes, the length of the header | the header, JSON | the arrays' bytes, one after the other

Source: the format's description, https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Rows = Tensor | Sequence[Tensor]
"""An array, or the rows (K, ...) of one."""

Part = bytes | memoryview
"""A stretch of a file."""

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The types of numbers, as the format names them."""


def parts(arrays: Mapping[str, Rows], notes: Mapping[str, str]) -> Iterator[Part]:
    """The parts of a file of named arrays and text notes."""
    header: dict[str, Any] = {"__metadata__": dict(notes)} if notes else {}
    pieces: list[Tensor] = []
    end = 0
    wide_first = sorted(arrays, key=lambda name: -_first(arrays[name]).element_size())  # so that all are aligned
    for name in wide_first:
        rows, first = arrays[name], _first(arrays[name])
        shape = list(first.shape) if isinstance(rows, Tensor) else [len(rows), *first.shape]
        begin, end = end, end + torch.Size(shape).numel() * first.element_size()
        header[name] = {"dtype": NAMES[first.dtype], "shape": shape, "data_offsets": [begin, end]}
        pieces += [rows] if isinstance(rows, Tensor) else rows
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for piece in pieces:
        if piece.numel():
            yield piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _first(rows: Rows) -> Tensor:
    return rows if isinstance(rows, Tensor) else rows[0]

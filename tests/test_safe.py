"""Files of named arrays, written without copies, are what the format's own library reads and writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from brittle.safe import NAMES, parts


def joined(arrays: dict[str, Any], notes: dict[str, str] | None = None) -> bytes:
    return b"".join(map(bytes, parts(arrays, notes or {})))


@pytest.mark.parametrize("dtype", NAMES)
def test_the_library_reads_every_type_as_it_went_in(dtype: torch.dtype) -> None:
    values = (torch.arange(24).reshape(2, 3, 4) % 2).to(dtype)
    arrays = {"odd": torch.ones(3, dtype=torch.uint8), "a": values, "b.1": values[0, 0, 0], "none": values[:0]}
    found = safetensors.torch.load(joined(arrays))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert torch.equal(found[name], array)


def test_rows_are_one_array_and_need_not_lie_together() -> None:
    whole = torch.randn(4, 6)
    apart = [whole[k, ::2] for k in range(4)]
    found = safetensors.torch.load(joined({"rows": apart, "whole": whole.T}))
    assert torch.equal(found["rows"], whole[:, ::2])
    assert torch.equal(found["whole"], whole.T)


def test_notes_and_the_order_of_bytes_are_the_librarys(tmp_path: Path) -> None:
    """Wide numbers first, so that every array is aligned."""
    arrays, notes = {"flags": torch.tensor([True, False, True]), "x": torch.randn(5).double()}, {"a": "1"}
    content = joined(arrays, notes)
    (tmp_path / "file").write_bytes(content)
    with safetensors.safe_open(str(tmp_path / "file"), framework="pt") as file:
        assert file.metadata() == notes
    assert content[-3:] == bytes([1, 0, 1])
    assert int.from_bytes(content[:8], "little") % 8 == 0

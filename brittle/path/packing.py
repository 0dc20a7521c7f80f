"""Steps and states as named arrays, and back: the layout of the files that `store` writes.

Steps lie in arrays with one row a step, their batches in arrays with one row a batch, the examples' ids one after
the other; the tensors that only some batches have lie under their own names, `inputs.3` for those of batch 3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from brittle.path.observed import KEPT, Batch, Manner, Snapshot, Step
from brittle.safe import Rows

Arrays = dict[str, Tensor]


def packed_steps(steps: Sequence[Step]) -> tuple[Arrays, dict[str, str]]:
    """The arrays and the notes of consecutive steps."""
    batches = [batch for step in steps for batch in step.batches]
    real = lambda values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    whole = lambda values: torch.tensor(values, dtype=torch.int64)  # noqa: E731
    arrays = {
        "batches": whole([len(s.batches) for s in steps]),
        "groups": whole([len(s.lr) for s in steps]),
        "lr": real([lr for s in steps for lr in s.lr]),
        "counts": torch.stack([s.counts for s in steps]),
        "factors": torch.stack([s.factors for s in steps]),
        "bounds": torch.stack([s.bounds for s in steps]),
        "length": real([s.length for s in steps]),
        "extra": torch.stack([s.extra for s in steps]),
        "averaged": real([s.averaged for s in steps]),
        "ids": torch.cat([b.ids.reshape(-1) for b in batches]),
        "rows": whole([len(b) for b in batches]),
        "width": whole([b.ids.shape[1] if b.ids.dim() == 2 else 0 for b in batches]),
        "epoch": whole([b.epoch for b in batches]),
        "norm": real([b.norm for b in batches]),
        "autocast": whole([b.autocast for b in batches]),
        "seen": real([b.seen for b in batches]),
    }
    arrays |= {f"statistics.{k}": s.statistics for k, s in enumerate(steps) if s.statistics is not None}
    for k, batch in enumerate(batches):
        arrays |= {f"{name}.{k}": tensor for name in KEPT if (tensor := getattr(batch, name)) is not None}
    changes = [k for k, s in enumerate(steps) if k == 0 or s.manner != steps[k - 1].manner]
    return arrays, {"manner": json.dumps([[k, vars(steps[k].manner)] for k in changes])}


def unpacked_steps(arrays: Arrays, notes: Mapping[str, str]) -> list[Step]:
    """The steps that `packed_steps` packed."""
    batches = _unpacked_batches(arrays)
    changes = {k: _manner(v) for k, v in json.loads(notes["manner"])}
    counts, groups = arrays["batches"].tolist(), arrays["groups"].tolist()
    ends, rates = [0, *accumulate(counts)], [0, *accumulate(groups)]
    lr, length, averaged = (arrays[name].tolist() for name in ("lr", "length", "averaged"))
    steps, manner = [], changes[0]
    for k in range(len(counts)):
        manner = changes.get(k, manner)
        steps.append(
            Step(
                batches=tuple(batches[ends[k] : ends[k + 1]]),
                lr=tuple(lr[rates[k] : rates[k + 1]]),
                manner=manner,
                counts=arrays["counts"][k],
                factors=arrays["factors"][k],
                bounds=arrays["bounds"][k],
                extra=arrays["extra"][k],
                length=length[k],
                averaged=averaged[k],
                statistics=arrays.get(f"statistics.{k}"),
            )
        )
    return steps


def packed_states(snapshots: Sequence[Snapshot]) -> dict[str, Rows]:
    """The arrays of some states; the states themselves row by row."""
    arrays: dict[str, Rows] = {
        "at": torch.tensor([s.step for s in snapshots], dtype=torch.int64),
        "state": [s.state for s in snapshots],
        "counts": torch.stack([s.counts for s in snapshots]),
        "extra": torch.stack([s.extra for s in snapshots]),
    }
    for k, snapshot in enumerate(snapshots):
        arrays |= {f"{name}.{k}": buffer for name, buffer in snapshot.buffers.items()}
    return arrays


def unpacked_states(arrays: Arrays) -> list[Snapshot]:
    """The states that `packed_states` packed."""
    found = []
    for k, step in enumerate(arrays["at"].tolist()):
        own = [name for name in arrays if name.endswith(f".{k}")]
        buffers = {name.rpartition(".")[0]: arrays[name] for name in own}
        found.append(Snapshot(step, arrays["state"][k], buffers, arrays["counts"][k], arrays["extra"][k]))
    return found


def _unpacked_batches(arrays: Arrays) -> list[Batch]:
    rows, widths = arrays["rows"].tolist(), arrays["width"].tolist()
    ids = arrays["ids"].split([r * max(w, 1) for r, w in zip(rows, widths, strict=True)])
    columns = zip(*(arrays[name].tolist() for name in ("epoch", "norm", "autocast", "seen")), strict=True)
    return [
        Batch(
            ids[k] if widths[k] == 0 else ids[k].reshape(rows[k], widths[k]),
            epoch,
            norm,
            autocast,
            tuple(seen),
            **{name: arrays[f"{name}.{k}"] for name in KEPT if f"{name}.{k}" in arrays},
        )
        for k, (epoch, norm, autocast, seen) in enumerate(columns)
    ]


def _manner(plain: Mapping[str, Any]) -> Manner:
    """As JSON gives it back: lists for tuples."""
    return Manner(tuple(plain["owner"]), tuple(plain["settings"]), tuple(plain["resting"]))

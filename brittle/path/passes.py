"""Which call of `batch()` belongs to which backward pass of a step, and the checks of what it was given."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from brittle.errors import DataError
from brittle.path.forwards import ForwardPass
from brittle.path.observed import Batch
from brittle.path.watch import BackwardPass


@dataclass(frozen=True)
class Call:
    """One call of `batch()`, and how many backward passes had begun by then."""

    ids: Tensor
    epoch: int
    given: Mapping[str, Tensor]
    at: int


def checked_call(
    ids: Tensor | Sequence[int], epoch: int, given: Mapping[str, Tensor | None], repeats: bool, at: int
) -> Call:
    """A call of `batch()`, checked and copied. Raises `DataError`."""
    ids = torch.as_tensor(ids)
    if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8) or ids.dim() not in (1, 2):
        raise DataError(
            f"batch() needs the positions of the batch's examples as whole numbers (B,), found {ids.dtype} of shape "
            f"{tuple(ids.shape)}; let the data set return the index of each example"
        )
    ids = ids.detach().to("cpu", torch.int64, copy=True)
    rows = ids if ids.dim() == 1 else ids[:, 0]
    listed = rows.tolist()
    if min(ids.flatten().tolist(), default=-1) < 0:
        raise DataError(
            f"batch() needs the positions of the batch's examples, counted from 0, found {ids.flatten().tolist()[:5]}"
        )
    if not repeats and len(set(listed)) < len(listed):
        values, counts = rows.unique(return_counts=True)
        raise DataError(
            f"ids may not repeat within a batch, found {int(values[counts.argmax()])} {int(counts.max())} times in "
            f"{len(rows)}; pass positions in the training data, not labels, or Recorder(repeats=True) where the "
            "sampler draws with replacement"
        )
    kept = {name: torch.as_tensor(v).detach().cpu().clone() for name, v in given.items() if v is not None}
    for name, value in kept.items():
        expected = tuple(ids.shape) if name == "shares" else tuple(rows.shape)
        if tuple(value.shape[: len(expected)]) != expected:
            raise DataError(
                f"batch({name}=) must have one row an example, {expected}, found shape {tuple(value.shape)}; pass them "
                "in the order of the ids"
            )
    if ids.dim() == 2 and "shares" not in kept:
        raise DataError(f"ids of shape {tuple(ids.shape)} need shares of the same shape, found none; pass shares=")
    return Call(ids, int(epoch), kept, at)


def matched(
    calls: Sequence[Call], passes: Sequence[BackwardPass], alive: Sequence[BackwardPass]
) -> list[tuple[Call, BackwardPass]]:
    """The calls of one step, each with its backward pass.

    Either every call stands behind its pass, or every call before it: the reading is taken that gives each call a pass
    and each live pass a call. The passes of an attack, and of steps that were skipped, are not alive.
    Raises `DataError` where neither does.
    """
    if passes and not alive:
        raise DataError(
            "each step must begin without gradients, found those of the step before; call optimizer.zero_grad() before "
            "the backward pass"
        )
    if len(calls) == len(passes) == len(alive) == 1:  # the usual step, either reading
        return [(calls[0], passes[0])]
    places = [k for k, one in enumerate(passes) if any(one is living for living in alive)]
    cuts = [call.at for call in calls]
    behind = [(call, start, stop) for call, (start, stop) in zip(calls, pairwise([0, *cuts]), strict=True)]
    before = [(call, start, stop) for call, (start, stop) in zip(calls, pairwise([*cuts, len(passes)]), strict=True)]
    kept = [(call, start, stop) for call, start, stop in before[:-1] if start < stop] + before[-1:]  # others: replaced
    for reading in (behind, kept):
        mine = [stop - 1 for _, start, stop in reading if stop > start]  # the last pass of each window
        if len(mine) == len(reading) and [k for k in mine if k in places] == places and places:
            return [(r[0], passes[k]) for r, k in zip(reading, mine, strict=True) if k in places]
    raise DataError(
        "call recorder.batch(ids) once for every backward pass before optimizer.step(), found "
        f"{len(calls)} calls for {len(alive)} passes whose gradients this step takes"
    )


def batch_of(call: Call, one: BackwardPass, taken: Collection[str]) -> Batch:
    """What was observed of one pass. taken: the tensors whose gradients count. Raises `DataError` for too few ids."""
    forward = one.forward or ForwardPass()
    if forward.rows is not None and forward.rows != len(call.ids):
        raise DataError(
            f"batch() needs one id a row, found {len(call.ids)} ids for a forward pass of {forward.rows} inputs; pass "
            "the ids of this very batch"
        )
    return Batch(
        call.ids,
        call.epoch,
        one.norm(taken),
        forward.autocast,
        forward.seen,
        random=forward.random,
        **call.given,
    )

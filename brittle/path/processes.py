"""Training over several processes (DistributedDataParallel): the first one records what all of them saw.

Each process has its own batch, and the optimizer takes the mean of their gradients: a step of several batches. What
happened to that mean before the optimizer saw it is known by its length alone, which a factor (clipping by norm)
explains, and by the bound that clipping by value leaves.
"""

from __future__ import annotations

from datetime import timedelta
from itertools import count

import torch
from torch import distributed

from brittle.errors import UnsupportedError
from brittle.path.observed import Batch

PATIENCE = timedelta(seconds=60)
"""How long the first process waits for the recorders of the others."""

_made = count()


def world() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def check_all_record() -> None:
    """Wait until every process has made its recorder. Raises `UnsupportedError` in the first one where some do not."""
    rank, processes = world()
    if processes == 1:
        return
    store, which = distributed.distributed_c10d._get_default_store(), next(_made)
    store.set(f"brittle/{which}/{rank}", "recording")
    if rank:
        return
    try:
        store.wait([f"brittle/{which}/{other}" for other in range(processes)], PATIENCE)
    except RuntimeError as error:
        raise UnsupportedError(
            f"rank 0 must see the ids of all {processes} processes, not all of them made a Recorder; make it, and call "
            "batch(ids), in every process: the first one writes"
        ) from error


def gathered(batches: list[Batch]) -> list[Batch]:
    """The batches of all processes, in the order of their ranks. Every process must call it."""
    if world()[1] == 1:
        return batches
    parts: list[list[Batch]] = [[] for _ in range(world()[1])]
    distributed.all_gather_object(parts, batches)
    return [batch for part in parts for batch in part]


def length_of(gradients: list[torch.Tensor]) -> float:
    """Euclidean norm of all gradients together."""
    norms = [torch.linalg.vector_norm(g.detach(), dtype=torch.float64) for g in gradients]
    return torch.stack(norms).square().sum().sqrt().item() if norms else 0.0

"""The same bits every time: one thread a process, and only algorithms whose results do not depend on their scheduling.

How sums are split among threads decides how they are rounded, so that the number of threads is part of the result. The
number of processes is not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic(wanted: bool = True) -> Iterator[None]:
    """Compute deterministically in this block, if it is wanted, and as before after it.

    A model with an operation that has no deterministic form on its device raises torch's own error, which names it.
    """
    if not wanted:
        yield
        return
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is first used
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)

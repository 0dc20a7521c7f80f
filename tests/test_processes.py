"""Training over two processes: the first one records what both saw, and the account is that of the whole training."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from by_hand import COUNT, account, assert_adds_up, assert_replays, data, normalized, seeded, tanh
from cases import float64 as float64
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from brittle.errors import BrittleError
from brittle.path import processes
from brittle.path.flat import state_of
from brittle.path.match import check_path
from brittle.path.recorder import Recorder
from brittle.path.store import PathReader
from brittle.subject import Subject

STEPS, BATCH = 6, 3
SCENARIOS = (
    "plain",
    "clipped",
    "by value",
    "every tensor by value",
    "by norm, then by value",
    "adamw",
    "normalized",
    "dropout",
    "accumulated",
    "accumulated, by value",
    "uneven",
    "mean by hand",
    "average",
    "few states",
)


def model_of(name: str) -> nn.Sequential:
    if name == "normalized":
        return normalized()
    if name == "dropout":
        return seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3)))
    return tanh()


def drawn(name: str, step: int, rank: int, part: int) -> torch.Tensor:
    """The ids of one process's batch: no example is in both."""
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(10 * step + part))
    size = BATCH - 1 if name == "uneven" and rank else BATCH
    return order[BATCH * rank : BATCH * rank + size]


def train(name: str, rank: int, root: Path) -> None:
    """One of the processes."""
    torch.manual_seed(rank)
    inputs, targets = data()
    model = model_of(name)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.6)) if name == "average" else None
    outer = model if name == "mean by hand" else DistributedDataParallel(model)
    adam = name == "adamw"
    optimizer = AdamW(outer.parameters(), lr=0.02, eps=1e-3) if adam else SGD(outer.parameters(), lr=0.1, momentum=0.9)
    budget = 2000 if name == "few states" else 1 << 30
    states, passes = [], 2 if name.startswith("accumulated") else 1
    with Recorder(outer, optimizer, root / name, budget, average=average) as recorder:
        for step in range(STEPS):
            states.append(state_of(model))
            optimizer.zero_grad()
            for part in range(passes):
                ids = drawn(name, step, rank, part)
                recorder.batch(ids)
                loss = F.cross_entropy(outer(inputs[ids]), targets[ids]) / passes
                if part < passes - 1:
                    assert isinstance(outer, DistributedDataParallel)
                    with outer.no_sync():
                        loss.backward()
                else:
                    loss.backward()
            for parameter in outer.parameters() if name == "mean by hand" else ():
                distributed.all_reduce(parameter.grad)
                parameter.grad.div_(2)
            if name in ("clipped", "by norm, then by value"):
                nn.utils.clip_grad_norm_(outer.parameters(), 0.1)
            if "by value" in name:
                nn.utils.clip_grad_value_(outer.parameters(), 0.003 if name.startswith("every tensor") else 0.03)
            optimizer.step()
            if average is not None:
                average.update_parameters(model)
    states.append(state_of(model))
    if rank == 0:
        torch.save(torch.stack(states), root / f"{name}.pt")
        torch.save((model if average is None else average.module).state_dict(), root / f"{name} audited.pt")


def refusals(rank: int, root: Path) -> None:
    """What goes wrong in one process, in words."""
    processes.PATIENCE = timedelta(seconds=0.5)
    if rank == 0:
        model = tanh()
        try:
            Recorder(model, SGD(model.parameters(), lr=0.1), root / "alone")
        except BrittleError as error:
            (root / "alone.txt").write_text(str(error))
    next(processes._made) if rank else None
    distributed.barrier()


def both(folder: str) -> None:
    """Split into two processes, and train all scenarios in each."""
    SGD(tanh().parameters())  # imports what torch imports late, once
    root, other = Path(folder), os.fork()
    rank = int(other == 0)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    distributed.init_process_group("gloo", init_method=f"file://{root}/meeting", rank=rank, world_size=2)
    for name in SCENARIOS:
        train(name, rank, root)
    refusals(rank, root)
    distributed.barrier()
    distributed.destroy_process_group()
    if rank:
        os._exit(0)
    assert os.waitpid(other, 0)[1] == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-c", f"import test_processes; test_processes.both({str(root)!r})"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_account_is_that_of_both_processes(name: str, trained: Path) -> None:
    path, states = PathReader(trained / name), torch.load(trained / f"{name}.pt")
    model = model_of(name)
    model.load_state_dict(torch.load(trained / f"{name} audited.pt"))
    subject = Subject(model.eval(), data(), data(seed=9))
    check_path(path, subject)
    assert_replays(path, subject, states, atol=1e-10)
    assert_adds_up(account(path, subject), unexplained=1e-8)
    parts = 2 if name.startswith("accumulated") else 1
    for step in range(STEPS):
        expected = [drawn(name, step, rank, part).tolist() for rank in (0, 1) for part in range(parts)]
        assert [batch.ids.tolist() for batch in path.step(step).batches] == expected
    if name == "few states":
        assert len(path.marks) < STEPS


def test_a_process_without_a_recorder_is_missed(trained: Path) -> None:
    line = (trained / "alone.txt").read_text()
    assert "rank 0 must see the ids of all 2 processes, not all of them made a Recorder" in line

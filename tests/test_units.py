"""Units of work: they add up to the whole account, whoever computes them, in whatever pieces, however often killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Training, queries, train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from brittle.cli import main
from brittle.errors import OutOfMemoryError, RunFolderError, UsageError
from brittle.kernel import units
from brittle.kernel.sweep import Quadrature, Swept, stretches, sweep
from brittle.kernel.units import Part, Unit, account_unit, cut, in_halves, total
from brittle.loading import load_subject
from brittle.path.flat import layout
from brittle.path.store import PathReader
from brittle.pipeline import make_map
from brittle.pipeline.accounting import PAUSE, Accounting, first_account
from brittle.pipeline.context import PRESETS, Asked, begin
from brittle.records import Ledger
from brittle.runs import RunFolder, read_run
from brittle.shares import Share, share_of
from brittle.subject import Subject, replace_quietly

ROWS = ("start", "contributions", "decay", "buffers", "unexplained", "residual", "output")
FIXED = Quadrature(segment=1, nodes=3, most=3, tolerance=0.0)
STEPS, QUERIES = 150, 11

# ------------------------------------------------------------------------------------------------------ the mathematics


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Training]:
    """Twelve steps in float64, which count as three stretches with all of their warm-up."""
    monkeypatch.setattr("brittle.kernel.sweep.TAIL", 1e-14)
    monkeypatch.setattr(units, "stretches", lambda path, quadrature: [(0, 3), (3, 4), (4, path.steps)])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield train("cnn batch norm", "momentum l2", tmp_path)
    torch.set_default_dtype(before)


def bytes_for(subject: Subject, count: int) -> int:
    """The budget of a block of `count` queries."""
    itemsize = next(subject.model.parameters()).element_size()
    return count * units.bytes_each(layout(subject.model)[-1].stop, itemsize, len(subject.train))


def accounted(training: Training, count: int, block: int) -> Swept:
    """The account of `count` queries in blocks, from its units."""
    path, subject = training.path, training.subject
    inputs, pairs = queries(subject, count)
    work = cut(path, subject, count, bytes_for(subject, block))
    parts = [account_unit(path, subject, inputs, pairs, unit, FIXED) for unit in work]
    return total(work, parts, count, len(subject.train))


@pytest.mark.parametrize("block", [1, 2, 5])
def test_units_add_up_to_the_whole_account(training: Training, block: int) -> None:
    inputs, pairs = queries(training.subject, 5)
    whole = sweep(training.path, training.subject, inputs, pairs, FIXED)
    found = accounted(training, 5, block)
    for row in ROWS:
        assert torch.allclose(getattr(found.ledger, row), getattr(whole.ledger, row), rtol=0, atol=1e-10), row
    assert torch.allclose(found.ledger.total(), found.ledger.output, atol=1e-12)
    assert found.ledger.contributions.abs().min() > 0
    assert found.evaluations >= whole.evaluations
    assert found.drift == whole.drift


def test_a_part_holds_the_examples_that_it_met_alone(training: Training) -> None:
    inputs, pairs = queries(training.subject)
    part = account_unit(training.path, training.subject, inputs, pairs, Unit((3, 4), (0, 3)), FIXED)
    [batch] = training.path.step(3).batches
    assert part.examples.tolist() == sorted(batch.ids.tolist())
    assert part.ledger.contributions.shape == (3, len(batch.ids))


@settings(max_examples=30, deadline=None)
@given(count=st.integers(0, 300), block=st.integers(1, 400))
def test_the_cut_covers_every_step_of_every_query_once_within_the_budget(
    small: Subject, count: int, block: int
) -> None:
    path = PathReader(small.path)
    work = cut(path, small, count, bytes_for(small, block))
    assert {unit.steps for unit in work} == (set(stretches(path)) if count else set())
    for steps in {unit.steps for unit in work}:
        rows = [unit.rows for unit in work if unit.steps == steps]
        assert (rows[0][0], rows[-1][1]) == (0, count)
        assert all(first[1] == second[0] for first, second in pairwise(rows))
        sizes = [stop - start for start, stop in rows]
        assert max(sizes) <= block
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == -(-count // block)
    assert len({str(unit) for unit in work}) == len(work)


def test_a_budget_for_less_than_one_query_is_refused(small: Subject) -> None:
    path = PathReader(small.path)
    assert len(cut(path, small, 3, bytes_for(small, 1))) == 3 * len(stretches(path))
    with pytest.raises(
        UsageError, match=r"--memory-budget must hold one query at least, .* MB here, found .* MB; allow"
    ):
        cut(path, small, 3, bytes_for(small, 1) - 1)


# -------------------------------------------------------------------------------------------------------- out of memory

RAN_OUT = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: not enough memory: you tried to allocate"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1024 bytes."),
]


@pytest.mark.parametrize("error", RAN_OUT, ids=["python", "cuda", "windows", "linux"])
def test_a_unit_that_runs_out_of_memory_is_halved_and_goes_on(
    training: Training, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    expected, taken = accounted(training, 5, 5), []

    def tight(path: Any, subject: Any, inputs: Tensor, *more: Any, **options: Any) -> Swept:
        if len(inputs) > 2:
            raise error
        taken.append(len(inputs))
        return sweep(path, subject, inputs, *more, **options)

    monkeypatch.setattr(units, "sweep", tight)
    found = accounted(training, 5, 5)
    assert taken == [2, 1, 2] * 3
    for row in ROWS:
        assert torch.allclose(getattr(found.ledger, row), getattr(expected.ledger, row), rtol=0, atol=1e-12), row
    assert found.evaluations > expected.evaluations - 3 * 5


def test_nothing_of_a_failed_attempt_is_held_when_its_halves_begin() -> None:
    held: list[weakref.ref[Tensor]] = []

    def compute(rows: slice) -> int:
        assert all(kept() is None for kept in held)
        gradients = torch.zeros(rows.stop - rows.start)
        held.append(weakref.ref(gradients))
        if len(gradients) > 1:
            raise MemoryError
        return rows.start

    assert in_halves(compute, 3, 7) == [3, 4, 5, 6]
    assert len(held) == 7


def test_where_not_even_one_query_fits_it_says_so() -> None:
    def compute(rows: slice) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(OutOfMemoryError, match=r"one query at a time must fit into memory, it ran out; end other"):
        in_halves(compute, 0, 4)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def compute(rows: slice) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (memory format)")

    with pytest.raises(RuntimeError, match="shapes"):
        in_halves(compute, 0, 4)


# --------------------------------------------------------------------------------------------------------------- shares


@given(count=st.integers(1, 9), units=st.integers(0, 40))
def test_shares_deal_out_every_unit_once_and_ranks_try_all(count: int, units: int) -> None:
    lone = [k for i in range(count) for k in Share(i, count, lone=True).order(units)]
    assert sorted(lone) == list(range(units))
    for i in range(count):
        own = Share(i, count, lone=True).order(units)
        order = Share(i, count).order(units)
        assert order[: len(own)] == own
        assert sorted(order) == list(range(units))


def test_a_share_comes_from_torchruns_environment_or_the_option() -> None:
    assert share_of(None, {}) == Share(0, 1)
    assert share_of(None, {"RANK": "2", "WORLD_SIZE": "3"}) == Share(2, 3)
    assert share_of("3/4", {}) == Share(3, 4, lone=True)
    assert share_of("3/4", {"RANK": "1", "WORLD_SIZE": "2"}) == Share(7, 8, lone=True)
    assert Share(0, 3).leads
    assert not Share(1, 3).leads


@pytest.mark.parametrize("shard", ["2/2", "1", "-1/2", "1/0", "a/b", "1/2/3", "", "0.5/2"])
def test_a_wrong_shard_is_refused_in_one_line(shard: str) -> None:
    with pytest.raises(
        UsageError, match=rf"^--shard must be I/N with I from 0 to N-1, found '{re.escape(shard)}'; numb"
    ):
        share_of(shard, {})
    with pytest.raises(UsageError, match="RANK/WORLD_SIZE must be I/N"):
        share_of(None, {"RANK": "3", "WORLD_SIZE": "2"})


# ------------------------------------------------------------------------------------------------------- the run folder

FACTORY = """
import pathlib
import torch
from torch import nn
import brittle

HOME = pathlib.Path(__file__).parent

def points(count, seed):
    targets = torch.arange(count) % 3
    return torch.eye(3)[targets] / 2 + torch.rand(count, 3, generator=torch.Generator().manual_seed(seed)) / 2, targets

def train():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3))
    inputs, targets = points(45, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.3)
    with brittle.Recorder(model, optimizer, HOME / "path") as recorder:
        for _ in range(STEPS):
            ids = torch.randperm(len(inputs))[:8]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[ids]), targets[ids]).backward()
            recorder.batch(ids)
            optimizer.step()
    torch.save(model.state_dict(), HOME / "weights.pt")

def make():
    if not (HOME / "weights.pt").exists():
        train()
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3))
    model.load_state_dict(torch.load(HOME / "weights.pt", weights_only=True))
    return brittle.Subject(model.eval(), points(45, 0), points(60, 1), path=HOME / "path", name="points")
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small subject with a path of 150 steps, which are two stretches."""
    file = tmp_path_factory.mktemp("subject") / "mine.py"
    file.write_text(FACTORY.replace("STEPS", str(STEPS)))
    return f"{file}:make"


@pytest.fixture(scope="module")
def small(spec: str) -> Subject:
    return load_subject(spec, {})


@pytest.fixture(scope="module")
def budget(small: Subject) -> int:
    """Three blocks of queries."""
    return bytes_for(small, 4)


@pytest.fixture(scope="module")
def expected(small: Subject, budget: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The account by one process."""
    out = tmp_path_factory.mktemp("one")
    assert work(small, out, budget) == 0
    return arrays(out)


def asked(budget: int, **more: Any) -> Asked:
    usual = {"queries": QUERIES, "seed": 0, "device": "cpu", "preset": "quick", "spec": None, "options": {}}
    usual |= {"progress": False, "memory_budget": budget, "deterministic": True}
    return Asked(**(usual | more))


def work(
    subject: Subject, out: Path, budget: int, share: Share | None = None, look: Callable[[Accounting], None] = id
) -> int:
    """One process's share of the units, which are added up if none is missing; how many are missing."""
    with begin(subject, out, asked(budget), share or Share()) as c:
        making = first_account(c)
        look(making)
        if making.finish():
            making.made()
            return 0
        return len(making.missing())


def arrays(out: Path) -> dict[str, Tensor]:
    return read_run(out).load("ledger")


def shards(out: Path) -> list[Path]:
    return sorted((out / "ledger" / "units").glob("*.safetensors"))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To the last bit."""
    assert set(found) == set(expected)
    assert {"contributions", "ledger.contributions", "ledger.output"} <= set(found)
    for name, array in expected.items():
        assert torch.equal(found[name], array), name


def test_the_account_closes_and_its_units_are_gone(small: Subject, budget: int, tmp_path: Path) -> None:
    def look(making: Accounting) -> None:
        assert len(making.units) == 6
        assert making.length == 3 * STEPS

    assert work(small, tmp_path, budget, look=look) == 0
    found = arrays(tmp_path)
    ledger = Ledger(*(found[f"ledger.{row}"] for row in ROWS))
    assert torch.allclose(ledger.total(), ledger.output, atol=1e-4)
    assert ledger.relative_residual < 0.02
    assert ledger.relative_unexplained < 1e-3
    assert shards(tmp_path) == []
    assert read_run(tmp_path).verify() == 2


def test_jobs_of_an_array_in_any_order_give_what_one_process_gives(
    small: Subject, budget: int, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    missing = [work(small, tmp_path, budget, Share(i, 3, lone=True)) for i in (2, 0)]
    assert missing == [4, 2]
    assert len(shards(tmp_path)) == 4
    assert work(small, tmp_path, budget, Share(1, 3, lone=True)) == 0
    assert_same(arrays(tmp_path), expected)


def test_a_last_run_without_a_shard_does_what_is_missing(
    small: Subject, budget: int, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    assert work(small, tmp_path, budget, Share(1, 2, lone=True)) == 3
    assert work(small, tmp_path, budget) == 0
    assert_same(arrays(tmp_path), expected)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [flip, os.unlink, lambda p: os.unlink(f"{p}.sha256")], ids=["flip", "lost", "bare"])
def test_a_damaged_unit_is_done_again_and_no_other(
    small: Subject, budget: int, expected: dict[str, Tensor], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    assert work(small, tmp_path, budget, Share(0, 2, lone=True)) == 3
    first, second, third = shards(tmp_path)
    written = [path.stat().st_mtime_ns for path in (first, third)]
    damage(second)
    assert work(small, tmp_path, budget, Share(0, 2, lone=True)) == 3
    assert [path.stat().st_mtime_ns for path in (first, third)] == written
    assert len(shards(tmp_path)) == 3
    assert work(small, tmp_path, budget) == 0
    assert_same(arrays(tmp_path), expected)


def test_units_of_another_cut_or_of_other_queries_do_not_count(
    small: Subject, budget: int, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    assert work(small, tmp_path, 2 * budget, Share(0, 2, lone=True)) == 2
    with begin(small, tmp_path, asked(budget), Share()) as c:
        there = first_account(c)
        assert there.missing() == there.units
        first = Accounting(c, "ledger", "again", there.ids, there.inputs.flip(0), there.pairs)
        assert not set(map(first._name, first.units)) & set(map(there._name, there.units))
    assert work(small, tmp_path, budget) == 0
    assert_same(arrays(tmp_path), expected)
    assert shards(tmp_path) == []


def test_a_rank_takes_what_nobody_has_begun_and_leaves_what_another_is_at(
    small: Subject, budget: int, tmp_path: Path
) -> None:
    with begin(small, tmp_path, asked(budget), Share(0, 2)) as c:
        other = first_account(c)
        with c.stages.run.claim(other._name(other.units[0])):
            assert work(small, tmp_path, budget, Share(1, 2)) == 1
        assert other.missing() == other.units[:1]


def test_the_first_rank_takes_up_what_a_killed_one_has_left(
    small: Subject, budget: int, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    """A process claims a unit and is killed while the first rank waits for it."""
    with begin(small, tmp_path, asked(budget), Share(1, 2)) as c:
        name = first_account(c)._name(first_account(c).units[3])
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / ".claims" / name.replace("/", "-"))], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    killer = threading.Timer(3 * PAUSE, child.kill)
    killer.start()
    began = time.monotonic()
    assert work(small, tmp_path, budget, Share(0, 2)) == 0
    assert time.monotonic() - began > 2 * PAUSE
    assert child.wait() == -signal.SIGKILL
    assert_same(arrays(tmp_path), expected)


HOLDS = """
import sys, time
from pathlib import Path
from brittle.locks import claim
held = claim(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_processes_of_one_map_share_a_folder_and_others_are_refused(
    small: Subject, budget: int, tmp_path: Path
) -> None:
    with begin(small, tmp_path, asked(budget), Share(0, 2)) as c:
        assert isinstance(c.stages.run, RunFolder)
        with begin(small, tmp_path, asked(budget), Share(1, 2)):
            pass
        with (
            pytest.raises(RunFolderError, match="queries is 11 there and 12 here"),
            begin(small, tmp_path, asked(budget, queries=12), Share(1, 2)),
        ):
            pass
        with (
            pytest.raises(RunFolderError, match=r"one run at a time may write to .* at work in it; wait for its end"),
            begin(small, tmp_path, asked(budget)),
        ):
            pass
    with (
        begin(small, tmp_path, asked(budget)),
        pytest.raises(RunFolderError, match=rf"found {os.getpid()} at work in it"),
        begin(small, tmp_path, asked(budget), Share(1, 2)),
    ):
        pass
    assert not (tmp_path / ".claims").exists()


def test_the_number_of_threads_is_not_part_of_a_deterministic_result(
    small: Subject, budget: int, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert work(small, tmp_path, budget) == 0
        assert torch.get_num_threads() == 2
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(before)
    assert_same(arrays(tmp_path), expected)


def test_the_cost_counts_the_units_of_all_processes(small: Subject, budget: int, tmp_path: Path) -> None:
    seconds, evaluations = 0.0, 0
    for i in (0, 1):
        assert work(small, tmp_path, budget, Share(i, 3, lone=True)) == 4 - 2 * i
    with begin(small, tmp_path, asked(budget), Share(2, 3)) as c:
        making = first_account(c)
        assert making.finish()
        for unit in making.units:
            part, cost = c.stages.read(making._name(unit))
            assert isinstance(part, Part)
            assert cost.gradient_evaluations == part.evaluations > 0
            seconds, evaluations = seconds + cost.seconds, evaluations + cost.gradient_evaluations
        account = making.made()
        [stage] = c.stages.cost("cpu").stages
    assert account.evaluations == stage.gradient_evaluations == evaluations
    assert stage.seconds >= seconds > 0
    assert stage.peak_memory_mb > 100


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_maps_in_shards_and_an_audit_finds_its_stages_done(
    spec: str, small: Subject, budget: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--queries", str(QUERIES), "--no-progress", "--deterministic", "--memory-budget", f"{budget}"]
    one, two = (["map", spec, "--out", str(tmp_path / name), *options] for name in ("one", "two"))
    assert main(one) == 0
    told = capsys.readouterr().out
    assert re.fullmatch(
        rf"\S+one: {QUERIES} queries over 45 training examples are mapped, their account misses \d.\d% of what was "
        r"learned, shift cosine .*, \d+ holes; `brittle audit` goes on from here\n",
        told,
    )
    assert main([*two, "--shard", "1/2"]) == 0
    assert re.search(r"two: 3 of 6 units are finished; run the other shards, then", capsys.readouterr().out)
    assert not (tmp_path / "two" / "memory").exists()
    assert main([*two, "--shard", "0/2"]) == 0
    assert_same(arrays(tmp_path / "two"), arrays(tmp_path / "one"))
    assert main(two) == 0
    assert capsys.readouterr().out.splitlines()[-1].replace("two", "one") == told.strip()
    for name in ("memory", "shift", "probes"):
        ours, theirs = (read_run(tmp_path / run).load(name) for run in ("one", "two"))
        assert all(torch.equal(array, theirs[key]) for key, array in ours.items())
    assert main(["verify", str(tmp_path / "two")]) == 0
    capsys.readouterr()

    with begin(small, tmp_path / "two", asked(budget, spec=spec)) as c:
        made = [name for name in ("memory", "memory/fidelity", "shift", "probes", "ledger") if c.stages.run.has(name)]
    assert len(made) == 5
    assert main([*two, "--seed", "1"]) == 2
    assert "belongs to another audit: seed is 0 there and 1 here" in capsys.readouterr().err


def test_a_map_without_a_path_is_that_of_the_final_weights(small: Subject, tmp_path: Path) -> None:
    bare = replace_quietly(small, path=None)
    found = make_map(bare, tmp_path, queries=QUERIES, progress=False)
    assert (found.units, found.missing, found.ledger, found.fidelity) == (0, 0, None, None)
    assert arrays(tmp_path)["contributions"].shape == (QUERIES, len(bare.train))


@pytest.mark.slow
def test_a_killed_rank_is_replaced_and_the_result_is_the_same(
    spec: str, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks under torchrun; the second is killed when it has claimed its first unit."""
    options = [spec, "--queries", str(QUERIES), "--no-progress", "--deterministic", "--memory-budget", f"{budget}"]
    assert main(["map", *options, "--out", str(tmp_path / "one")]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
    command += ["--standalone", "-m", "brittle", "map", *options, "--out", str(tmp_path / "two")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        killed = kill_second_rank(launcher.pid, tmp_path / "two" / ".claims")
        out, err = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, err
    assert killed
    assert out.count("queries over 45 training examples are mapped") == 1
    assert "SIGKILL" in err or "exitcode: -9" in err or "-9" in err
    for name in ("memory", "shift", "ledger"):
        ours, theirs = (read_run(tmp_path / run).load(name) for run in ("one", "two"))
        assert all(torch.equal(array, theirs[key]) for key, array in ours.items()), name


def kill_second_rank(launcher: int, claims: Path) -> bool:
    """Kill it as soon as a process of its own has claimed a unit."""
    for _ in range(3000):
        at_work = {claim.read_text() for claim in claims.glob("ledger-units-*")}
        for child in at_work & set(Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()):
            if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
                os.kill(int(child), signal.SIGKILL)
                return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -0.1])
def test_a_tolerance_that_is_none_is_refused(small: Subject, tolerance: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tolerance must be between 0 and 1, found"):
        make_map(small, tmp_path / "run", tolerance=tolerance)


def test_another_tolerance_is_another_audit() -> None:
    assert asked(1).effort == PRESETS["quick"]
    assert asked(1, tolerance=0.07).effort.tolerance == 0.07

"""The path's files: what goes in comes out, and whatever happens to them is found when they are read."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import ByHand, normalized
from cases import float64 as float64
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from brittle.errors import BrittleError, DamagedFileError, PathMismatchError
from brittle.path import keeping, store
from brittle.path.observed import KEPT, Batch, Manner, Snapshot, Step
from brittle.path.packing import packed_states, packed_steps, unpacked_states, unpacked_steps
from brittle.path.store import PathReader
from brittle.shards import read_arrays, read_notes, write_arrays

# ---------------------------------------------------------------------------------------------------------- packing


def numbers(*shape: int) -> st.SearchStrategy[Tensor]:
    count = int(torch.Size(shape).numel())
    floats = st.lists(st.floats(-1e3, 1e3, width=32), min_size=count, max_size=count)
    return floats.map(lambda values: torch.tensor(values, dtype=torch.float64).reshape(shape))


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    rows, width = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    shape = (rows, width) if width else (rows,)
    ids = torch.tensor(draw(st.lists(st.integers(0, 99), min_size=rows * max(width, 1), max_size=rows * max(width, 1))))
    maybe = lambda *shape: draw(st.none() | numbers(*shape))  # noqa: E731
    return Batch(
        ids.reshape(shape),
        epoch=draw(st.integers(0, 1000)),
        norm=draw(st.floats(0, 1e6)),
        autocast=draw(st.integers(0, 2)),
        seen=tuple(draw(st.lists(st.floats(-1, 1), min_size=3, max_size=3))),
        shares=draw(numbers(rows, width)) if width else None,
        inputs=maybe(rows, 2),
        targets=maybe(rows),
        weights=maybe(rows),
        random=draw(st.none() | st.just(torch.arange(7, dtype=torch.uint8))),
    )


@st.composite
def steps(draw: st.DrawFn, tensors: int = 3) -> Step:
    groups = draw(st.integers(1, 2))
    real = lambda: draw(numbers(tensors))  # noqa: E731
    settings_ = {"momentum": draw(st.floats(0, 1)), "betas": [0.9, 0.99], "nesterov": draw(st.booleans()), "eps": None}
    return Step(
        batches=tuple(draw(st.lists(batches(), min_size=1, max_size=3))),
        lr=tuple(draw(st.lists(st.floats(0, 1), min_size=groups, max_size=groups))),
        manner=Manner(
            tuple(draw(st.lists(st.integers(-1, groups - 1), min_size=tensors, max_size=tensors))),
            (settings_,) * groups,
            tuple(draw(st.lists(st.sampled_from(["", "1", "1.inner"]), max_size=2, unique=True))),
        ),
        counts=torch.tensor(draw(st.lists(st.integers(-1, 9), min_size=tensors, max_size=tensors))),
        factors=real(),
        bounds=torch.where(real() > 0, torch.inf, real()),
        extra=real(),
        length=draw(st.floats(0, 10)),
        averaged=draw(st.floats(0, 1)),
        statistics=draw(st.none() | numbers(4)),
    )


def assert_same(a: Any, b: Any) -> None:
    """Equal to the last bit, tensors in records included."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, (Step, Batch, Snapshot, Manner)):
        for name in vars(a):
            assert_same(getattr(a, name), getattr(b, name))
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name])
    else:
        assert a == b


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.lists(steps(), min_size=1, max_size=4))
def test_steps_come_out_as_they_went_in(tmp_path_factory: pytest.TempPathFactory, given_: list[Step]) -> None:
    file = tmp_path_factory.mktemp("steps") / "block.safetensors"
    arrays, notes = packed_steps(given_)
    write_arrays(file, arrays, notes)
    found = unpacked_steps(read_arrays(file), read_notes(file))
    for a, b in zip(found, given_, strict=True):
        assert_same(a, b)


def test_states_come_out_as_they_went_in(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    counts = torch.tensor([4, -1])
    plain = [Snapshot(s, random(7), {}, counts, random(2)) for s in (0, 3)]
    held = [
        Snapshot(s, random(7), {"exp_avg": random(5), "exp_avg_sq": random(5)}, counts, random(2)) for s in (10, 11)
    ]
    write_arrays(tmp_path / "states.safetensors", packed_states([*plain, *held]))
    for a, b in zip(unpacked_states(read_arrays(tmp_path / "states.safetensors")), [*plain, *held], strict=True):
        assert_same(a, b)


def test_a_batch_holds_what_only_some_have_and_a_step_counts_its_bytes() -> None:
    assert set(KEPT) == {"shares", "inputs", "targets", "weights", "random"}
    ids = torch.arange(3)
    plain = Batch(ids)
    full = Batch(ids, inputs=torch.zeros(3, 5), random=torch.zeros(100, dtype=torch.uint8))
    nothing = torch.zeros(2)
    bare = lambda *batches: Step(batches, (), Manner((), ()), nothing, nothing, nothing, nothing)  # noqa: E731
    assert bare(plain, full).nbytes - bare(plain).nbytes == full.ids.nbytes + full.inputs.nbytes + 100
    assert bare(plain, full).examples == 6
    assert plain.rows is ids
    assert Batch(ids[:, None].repeat(1, 2)).rows.tolist() == [0, 1, 2]


# ----------------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small path of several blocks, with an average."""
    torch.set_default_dtype(torch.float64)
    root, before = tmp_path_factory.mktemp("whole"), keeping.BLOCK_BYTES
    keeping.BLOCK_BYTES = 4000
    model = normalized()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    loop = ByHand(root, lambda p: AdamW(p, lr=0.02), model, average=average)
    for _ in range(9):
        loop.step()
        average.update_parameters(model)
    loop.close()
    keeping.BLOCK_BYTES = before
    yield root
    torch.set_default_dtype(torch.float32)


def everything(root: Path) -> list[Any]:
    """All that can be read of a path."""
    path = PathReader(root)
    recipes = [vars(path.recipe(s)) for s in range(path.steps)]
    states = [path.snapshot(mark) for mark in path.marks]
    facts = [path.marks, path.slots, path.optimizer, path.optimizer_name, path.warnings, path.largest_id, path.visits]
    observed = [path.step(s) for s in range(path.steps)]
    return [facts, observed, recipes, states, path.final(), path.behind, path.averaging]


FILES = ["path.json", "end.json", "average.safetensors"]
FILES += ["steps/first", "steps/middle", "steps/last", "states/first", "states/middle", "states/last"]


def named(root: Path, name: str) -> Path:
    """A file of the path: by its name, or by its place in a folder."""
    folder, _, place = name.rpartition("/")
    if not folder:
        return root / name
    files = sorted((root / folder).glob("*.safetensors"))
    assert len(files) >= 3
    return files[{"first": 0, "middle": len(files) // 2, "last": -1}[place]]


def copied(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def one_copied(whole: Path, tmp_path: Path, name: str, checksum: bool) -> tuple[Path, Path, bytes]:
    """A copy of the path, one of its files or the checksum beside it, and what that holds."""
    root = copied(whole, tmp_path)
    file = named(root, name)
    file = file.with_name(file.name + ".sha256") if checksum else file
    return root, file, file.read_bytes()


def assert_found(root: Path, damage: str) -> None:
    with pytest.raises((DamagedFileError, PathMismatchError)) as caught:
        everything(root)
    line = str(caught.value)
    assert "\n" not in line, damage
    assert str(root) in line, damage


def test_every_kind_of_file_is_there(whole: Path) -> None:
    found = {file.relative_to(whole).parts[0] for file in whole.rglob("*") if file.is_file()}
    assert found == {f"{n}{s}" for n in ("path.json", "end.json", "average.safetensors") for s in ("", ".sha256")} | {
        "steps",
        "states",
    }
    assert len(everything(whole)[3]) == 10


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_short_is_found(name: str, checksum: bool, whole: Path, tmp_path: Path) -> None:
    root, file, content = one_copied(whole, tmp_path, name, checksum)
    digest = 64 if checksum else len(content)  # a checksum's note may lose the name behind it
    for length in sorted({0, 1, digest // 2, digest - 1}):
        file.write_bytes(content[:length])
        assert_found(root, f"{name} cut to {length}")


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(name: str, checksum: bool, whole: Path, tmp_path: Path) -> None:
    """Anywhere in the file, or in the digest beside it; the name behind the digest does not count."""
    root, file, content = one_copied(whole, tmp_path, name, checksum)
    generator = torch.Generator().manual_seed(0)
    end = 64 if checksum else len(content)
    for place in (0, end - 1, *torch.randint(end, (10,), generator=generator).tolist()):
        for bit in (1, 16, 128):
            damaged = bytearray(content)
            damaged[place] ^= bit
            file.write_bytes(damaged)
            if checksum and bytes(damaged[:64]).lower() == content[:64]:
                continue  # 32 between letters
            assert_found(root, f"bit {bit} of byte {place} in {name}")


@pytest.mark.parametrize("gone", ["file", "checksum", "both"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_is_found(name: str, gone: str, whole: Path, tmp_path: Path) -> None:
    root = copied(whole, tmp_path)
    file = named(root, name)
    if gone != "checksum":
        file.unlink()
    if gone != "file":
        file.with_name(file.name + ".sha256").unlink()
    assert_found(root, f"{gone} of {name}")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_became_another_one_is_found(name: str, whole: Path, tmp_path: Path) -> None:
    """Whole, but not this one: two blocks changed places, with their checksums."""
    root = copied(whole, tmp_path)
    file = named(root, name)
    others = [f for f in sorted(root.rglob("*.safetensors")) if f != file and f.parent == file.parent]
    other = others[0] if others else root / ("end.json" if name != "end.json" else "path.json")
    for suffix in ("", ".sha256"):
        a, b = file.with_name(file.name + suffix), other.with_name(other.name + suffix)
        first, second = a.read_bytes(), b.read_bytes()
        a.write_bytes(second)
        b.write_bytes(first)
    assert_found(root, f"{file.name} and {other.name} changed places")


def test_files_of_others_in_the_folder_do_not_disturb(whole: Path, tmp_path: Path) -> None:
    root = copied(whole, tmp_path)
    for name in ("notes.txt", "steps/.00000000.safetensors.77.tmp", "states/.DS_Store", "checkpoint.pt"):
        (root / name).write_text("somebody's")
    assert_same(everything(root), everything(whole))


@pytest.mark.parametrize("extra", ["steps", "states"])
def test_a_block_of_another_path_in_the_folder_is_found_or_left_out(extra: str, whole: Path, tmp_path: Path) -> None:
    root = copied(whole, tmp_path)
    other = ByHand(tmp_path / "other", lambda p: AdamW(p, lr=0.5), normalized())
    other.steps(20)
    other.close()
    last = sorted((tmp_path / "other" / extra).glob("*"))[-2:]
    for file in last:
        target = root / extra / file.name.replace("00000000", "00000012")
        shutil.copy(file, target)
    with contextlib.suppress(BrittleError):
        assert_same(everything(root), everything(whole))


# -------------------------------------------------------------------------------------------------------- refusals


def test_what_is_no_path_is_refused(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(PathMismatchError, match=r"must name a folder that a Recorder wrote, .* has no path\.json"):
            PathReader(root)


def test_an_unfinished_path_is_refused(whole: Path, tmp_path: Path) -> None:
    root = copied(whole, tmp_path)
    (root / "end.json").unlink()
    with pytest.raises(PathMismatchError, match=r"has no end\.json; let the training run to recorder\.close\(\)"):
        PathReader(root)


def test_a_path_of_another_format_is_refused(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "FORMAT", store.FORMAT + 1)
    with pytest.raises(PathMismatchError, match=r"has format \d, this version reads \d; record it again"):
        PathReader(whole)


# ----------------------------------------------------------------------------------------------------------- reading


def test_blocks_are_read_one_at_a_time(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = PathReader(whole), []
    plain: Callable[[Path], dict[str, Tensor]] = store.read_arrays
    monkeypatch.setattr(store, "read_arrays", lambda file: (read.append(file), plain(file))[1])
    for s in range(path.steps):
        path.step(s)
    blocks = sorted((whole / "steps").glob("*.safetensors"))
    assert len(read) <= len(blocks)
    for mark in reversed(path.marks):
        path.snapshot(mark)
    assert len(read) <= len(blocks) + len(list((whole / "states").glob("*.safetensors")))


def test_the_end_says_which_states_there_must_be(whole: Path) -> None:
    end = json.loads((whole / "end.json").read_text())
    path = PathReader(whole)
    assert end == {"steps": 9, "marks": list(range(10))}
    assert (path.steps, path.marks) == (9, end["marks"])


# ---------------------------------------------------------------------------------------------------------- thinning


def stored(root: Path) -> dict[str, list[int]]:
    """The steps before which there are states, file by file."""
    files = sorted((root / "states").glob("*.safetensors"))
    return {file.stem: read_arrays(file)["at"].tolist() for file in files}


def test_states_are_thinned_by_deleting_files_and_every_second_time_by_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = lambda s: Snapshot(s, torch.full((3,), float(s)), {}, torch.tensor([s]), torch.zeros(1))  # noqa: E731
    for block in (range(8), range(8, 13)):
        store.write_states(tmp_path, [at(s) for s in block], every=1)
    whole = [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12], [9, 11]]
    assert list(stored(tmp_path).values()) == whole
    with monkeypatch.context() as disk:
        for name in ("read_arrays", "write_arrays"):
            disk.setattr(store, name, lambda *_: pytest.fail("a file was opened"))
        store.thin_states(tmp_path, 2)
    assert list(stored(tmp_path).values()) == whole[::2]
    store.thin_states(tmp_path, 4)
    assert list(stored(tmp_path).values()) == [[0], [4], [8], [12]]
    store.thin_states(tmp_path, 8)
    assert list(stored(tmp_path).values()) == [[0], [8]]
    for file in (tmp_path / "states").glob("*.safetensors"):
        assert [s.state.tolist() for s in unpacked_states(read_arrays(file))] == [[float(int(file.stem[:8]))] * 3]


def test_a_state_between_the_regular_ones_goes_when_states_are_thinned(tmp_path: Path) -> None:
    """As one that `flush` stored."""
    at = lambda s: Snapshot(s, torch.zeros(2), {}, torch.tensor([0]), torch.zeros(1))  # noqa: E731
    store.write_states(tmp_path, [at(s) for s in (0, 4, 8, 11)], every=4)
    assert list(stored(tmp_path).values()) == [[0, 8], [4], [11]]
    store.thin_states(tmp_path, 8)
    assert list(stored(tmp_path).values()) == [[0, 8]]

"""Stages resume to the same result; records go to arrays and back; the split keeps the sealed part apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from brittle.errors import DamagedFileError, DataError, SealedError
from brittle.packing import pack, unpack
from brittle.records import AttackRows, Ledger, Pairs
from brittle.runs import RunFolder
from brittle.split import FEWEST, Seal, queries_at, split_test
from brittle.stages import Progress, Spend, Stages
from brittle.subject import Subject


@dataclass(frozen=True)
class Nested:
    """A record with records, a list, a dict, and what is no tensor."""

    pairs: Pairs
    parts: tuple[Tensor, ...]
    named: dict[str, Any]
    note: str | None = None


RECORDS = {record.__name__: record for record in (Nested, Pairs, Ledger, AttackRows)}


def nested(seed: int = 0) -> Nested:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(4, 3, generator=generator)
    return Nested(
        Pairs(torch.tensor([1, 2]), torch.tensor([0, 1])),
        (shared, shared[1:], shared.T),
        {
            "list": [1, 2.5, None, True, "text"],
            "inf": float("inf"),
            "tuple": (torch.zeros(0), ()),
            "a b": {"c": shared},
        },
        "é",
    )


def same(a: Any, b: Any) -> bool:
    """Equal in types, values and shapes, all the way down."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(same(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


# ------------------------------------------------------------------------------------------------------------- packing

TENSORS = st.sampled_from(
    [torch.zeros(0, 2), torch.arange(3), torch.tensor(1.5), torch.tensor([True]), torch.ones(2, 2).double()]
)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), TENSORS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.builds(Pairs, TENSORS, TENSORS),
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_what_is_packed_is_unpacked(value: Any) -> None:
    arrays, tree = pack(value)
    assert same(unpack(arrays, tree, RECORDS), value)


def test_records_survive_the_run_folder(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    arrays, tree = pack([nested(), nested(1)])
    run.save("stage", arrays, {"tree": tree})
    assert same(unpack(run.load("stage"), run.notes("stage")["tree"], RECORDS), [nested(), nested(1)])


def test_names_with_dots_do_not_collide() -> None:
    value = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, "value": torch.ones(2), "": torch.ones(3)}
    assert same(unpack(*pack(value), RECORDS), value)


def test_a_record_that_was_not_named_is_never_made() -> None:
    arrays, tree = pack(Pairs(torch.zeros(1), torch.zeros(1)))
    with pytest.raises(DamagedFileError, match=r"a stage's file may hold \['Ledger'\], found 'Pairs'"):
        unpack(arrays, tree, {"Ledger": Ledger})


def test_keys_that_json_would_change_are_refused() -> None:
    with pytest.raises(TypeError, match=r"text keys only, found \[1\] at counts"):
        pack({"counts": {1: 2}})


# -------------------------------------------------------------------------------------------------------------- stages


class Audit:
    """A little audit of three stages, the last of which draws from its own generator and needs the first."""

    def __init__(self, root: Path, seed: int = 0, fail_at: str = "") -> None:
        self.stages = Stages(RunFolder(root), RECORDS, seed, bars=False)
        self.computed: list[str] = []
        self.fail_at = fail_at

    def stage(self, name: str, compute: Callable[[], Any], evaluations: int = 1) -> Any:
        def counted(progress: Progress, spend: Spend) -> Any:
            if name == self.fail_at:
                raise KeyboardInterrupt
            self.computed.append(name)
            progress(1, 2)
            spend(evaluations)
            spend(evaluations)
            return compute()

        return self.stages(name, f"doing {name}", counted)

    def run(self) -> list[Any]:
        first = self.stage("first", nested, evaluations=5)
        draw = self.stages.generator("second")
        second = self.stage("second", lambda: torch.randn(3, generator=draw))
        third = self.stage("second/third", lambda: {"sum": first.parts[0].sum() + second.sum(), "draws": [second]})
        return [first, second, third]


def test_a_stage_is_computed_once_and_read_after(tmp_path: Path) -> None:
    audit = Audit(tmp_path)
    found = audit.run()
    assert audit.computed == ["first", "second", "second/third"]
    again = Audit(tmp_path)
    assert same(again.run(), found)
    assert again.computed == []


@pytest.mark.parametrize("interrupted", ["first", "second", "second/third"])
def test_a_resumed_audit_is_an_uninterrupted_one(interrupted: str, tmp_path: Path) -> None:
    expected = Audit(tmp_path / "whole").run()
    broken = Audit(tmp_path / "broken", fail_at=interrupted)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    resumed = Audit(tmp_path / "broken")
    assert same(resumed.run(), expected)
    assert broken.computed + resumed.computed == ["first", "second", "second/third"]


def test_a_damaged_stage_is_computed_again(tmp_path: Path) -> None:
    expected = Audit(tmp_path).run()
    (tmp_path / "second" / "second.safetensors").write_bytes(b"other")
    again = Audit(tmp_path)
    assert same(again.run(), expected)
    assert again.computed == ["second"]


def test_a_result_that_could_not_be_read_again_fails_at_once(tmp_path: Path) -> None:
    @dataclass
    class Stranger:
        x: Tensor

    with pytest.raises(DamagedFileError, match="found 'Stranger'"):
        Audit(tmp_path).stage("stage", lambda: Stranger(torch.zeros(1)))


def test_costs_of_earlier_runs_count(tmp_path: Path) -> None:
    first = Audit(tmp_path)
    first.run()
    cost = first.stages.cost("cpu")
    assert [(s.stage, s.gradient_evaluations) for s in cost.stages] == [
        ("doing first", 10),
        ("doing second", 2),
        ("doing second/third", 2),
    ]
    assert cost.seconds == pytest.approx(sum(s.seconds for s in cost.stages))
    again = Audit(tmp_path)
    again.run()
    assert again.stages.cost("cpu") == cost


def test_a_generator_depends_on_the_seed_and_the_stage_alone(tmp_path: Path) -> None:
    def drawn(seed: int, *names: str) -> dict[str, list[float]]:
        stages = Stages(RunFolder(tmp_path), RECORDS, seed, bars=False)
        return {name: torch.randn(2, generator=stages.generator(name)).tolist() for name in names}

    plain = drawn(0, "a", "b", "c")
    assert drawn(0, "c", "a", "b") == plain
    assert len({tuple(v) for v in plain.values()}) == 3
    assert drawn(1, "a")["a"] != plain["a"]
    assert drawn(1, "1a") != drawn(11, "a"), "seed and name do not run into each other"


# --------------------------------------------------------------------------------------------------------------- split


def subject(tests: int) -> Subject:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(tests, 4, generator=generator)
    model = nn.Linear(4, 3).eval()
    return Subject(model, (inputs[:2], torch.tensor([0, 2])), (inputs, torch.arange(tests) % 3))


@pytest.mark.parametrize(("tests", "queries", "count"), [(20, 200, 10), (50, 10, 10), (51, 26, 25), (3000, 200, 200)])
def test_sealed_inputs_make_no_prediction(tests: int, queries: int, count: int) -> None:
    split = split_test(subject(tests), queries, torch.Generator().manual_seed(1))
    predict, sealed, natural = (set(part.ids.tolist()) for part in (split.predict, split.sealed, split.natural))
    assert len(split.predict) == len(split.sealed) == len(predict) == len(sealed) == count
    assert not predict & natural
    assert torch.equal(split.natural.ids[:count], split.sealed.ids)
    assert len(natural) == min(tests - count, 2000)
    assert torch.equal(split.everything.ids, torch.arange(tests))
    assert torch.equal(split.both.ids, torch.cat([split.predict.ids, split.sealed.ids]))


def test_sealed_labels_are_given_out_once() -> None:
    whole = split_test(subject(60), 20, torch.Generator().manual_seed(1))
    seal = Seal(whole)
    for part in (seal.split.sealed, seal.split.natural[:5], seal.split.everything, seal.split.both):
        for ask in (lambda q: q.targets, lambda q: q.right):
            with pytest.raises(SealedError, match="may not be looked at before predictions are fixed"):
                ask(part)
    assert torch.equal(seal.split.predict.targets, whole.predict.targets)
    for name in ("sealed", "natural", "everything", "both"):
        hidden, plain = getattr(seal.split, name), getattr(whole, name)
        for field in ("ids", "inputs", "logits", "margin"):
            assert torch.equal(getattr(hidden, field), getattr(plain, field))
    opened = seal.open({"scores": "ab", "holes": "cd"})
    assert torch.equal(opened.sealed.targets, whole.sealed.targets)
    with pytest.raises(SealedError, match="given out once, they were opened with scores, holes fixed"):
        seal.open({"scores": "ab"})
    with pytest.raises(SealedError):
        _ = seal.split.sealed.targets


def test_the_split_depends_on_its_generator_alone() -> None:
    whole = subject(60)
    first, again, other = (split_test(whole, 20, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first.both.ids, again.both.ids)
    assert not torch.equal(first.both.ids, other.both.ids)


def test_queries_carry_the_models_own_outputs() -> None:
    whole = subject(30)
    ids = torch.tensor([7, 3])
    queries = queries_at(whole, ids)
    logits = whole.model(whole.test.inputs[ids])
    assert torch.allclose(queries.logits, logits)
    assert torch.equal(queries.pairs.predicted, logits.argmax(1))
    assert torch.equal(queries.targets, ids % 3)
    ordered = logits.sort(1, descending=True).values
    assert torch.allclose(queries.margin, ordered[:, 0] - ordered[:, 1])
    assert torch.equal(queries.right, queries.pairs.predicted == queries.targets)


def test_too_few_inputs_cannot_be_split() -> None:
    with pytest.raises(DataError, match=f"at least {FEWEST} inputs to predict on some and test on others, found 19"):
        split_test(subject(19), 5, torch.Generator())

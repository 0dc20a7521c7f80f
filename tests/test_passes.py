"""Which call of `batch()` belongs to which backward pass, whatever else goes forward and backward in the loop.

A loop is written as a line of letters, one a statement of the user's:

    d draw a batch     f forward pass     g backward pass     b recorder.batch()     s optimizer.step()
    z zero_grad()      Z zero_grad(set_to_none=False)         a an attack's forward and backward pass
    e evaluation       t training mode without gradients      x forward pass that nothing comes of
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_hand import COUNT, ByHand, assert_recorded, normalized, sgd
from cases import float64 as float64
from torch import Tensor

from brittle.errors import DataError
from brittle.path.passes import checked_call
from brittle.path.store import PathReader

ROUNDS = 3


def run(loop: ByHand, script: str) -> list[list[int]]:
    """The statements, one after the other; returns the ids of the passes whose gradients are taken, first to last."""
    ids, live, taken, loss = torch.tensor([0]), [], [], torch.tensor(0.0)
    passes = max(part.count("g") for part in script.replace("Z", "z").split("z"))
    for letter in script.replace(" ", ""):
        match letter:
            case "d":
                ids = loop.draw()
            case "z" | "Z":
                loop.optimizer.zero_grad(set_to_none=letter == "z")
                live = []
            case "f":
                loss = loop.loss(ids, 1 / passes)
            case "g":
                loss.backward()
                live.append(ids.tolist())
            case "b":
                loop.recorder.batch(ids)
            case "s":
                loop.spend()
                taken = live
            case "a":
                F.cross_entropy(loop.model(loop.inputs.flip(0)), loop.targets).backward()
            case "x":
                loop.model(loop.inputs)
            case "t":
                with torch.no_grad():
                    loop.model(loop.inputs)
            case "e":
                with torch.no_grad():
                    loop.model.eval()(loop.inputs)
                loop.model.train()
    return taken


FOLLOWED = {
    "before the forward pass": "zdbfgs",
    "between forward and backward": "zdfbgs",
    "after the backward pass": "zdfgbs",
    "accumulation, before": "zdbfgdbfgdbfgs",
    "accumulation, between": "zdfbgdfbgdfbgs",
    "accumulation, after": "zdfgbdfgbdfgbs",
    "attack, told before it": "zdbaazfgs",
    "attack, told before the forward pass": "daazbfgs",
    "attack, told between": "daazfbgs",
    "attack, told after": "daazfgbs",
    "attack without zeroing in between": "zdxfgbs",
    "attacks and accumulation": "daaz bfg dbfg s",
    "skipped, told before": "zdbfg zdbfg zdbfgs",
    "skipped, told between": "zdfbg zdfbg zdfbgs",
    "skipped, told after": "zdfgb zdfgb zdfgbs",
    "skipped and zeroed in place, told before": "Zdbfg Zdbfg Zdbfgs",
    "skipped and zeroed in place, told after": "Zdfgb Zdfgb Zdfgbs",
    "skipped in the middle of accumulation": "zdfgbdfgb z dfgb dfgb s",
    "skipped in the middle of accumulation, told before": "zdbfg z dbfg dbfg s",
    "skipped before its backward pass": "zdb zdbfgs",
    "skipped after its forward pass": "zdbf zdbfgs",
    "attacked and skipped, told before": "daazbfg daazbfgs",
    "attacked and skipped, told after": "daazfgb daazfgbs",
    "zeroed after the step": "dfgbsz",
    "a step without gradients": "zdbs zdbfgs",
    "evaluation in between": "zdefgebes",
    "training mode without gradients in between": "zdtfgtbts",
    "evaluation between forward and backward": "zdfebgs",
    "training mode between forward and backward": "zdftgbs",
    "a forward pass that nothing comes of": "zdxfgbs",
}


@pytest.mark.parametrize("loop", FOLLOWED)
def test_every_batch_finds_its_pass(loop: str, tmp_path: Path) -> None:
    by_hand = ByHand(tmp_path, model=normalized())
    drawn = [run(by_hand, FOLLOWED[loop]) for _ in range(ROUNDS)]
    path = assert_recorded(by_hand)
    assert [[batch.ids.tolist() for batch in path.step(s).batches] for s in range(path.steps)] == drawn


REFUSED = {
    "never told": "zdfgs",
    "accumulation, told once": "zdfgbdfgs",
    "accumulation, told in the end": "zdfgdfgbs",
    "accumulation, the batches before the passes": "zdbdbfgfgs",
    "told twice after the pass": "zdfgbbs",
    "told before and after": "zdbfgbs",
}


@pytest.mark.parametrize("loop", REFUSED)
def test_too_few_and_too_many_calls_are_refused(loop: str, tmp_path: Path) -> None:
    by_hand = ByHand(tmp_path)
    run(by_hand, "zdfgbs")
    rule = r"call recorder\.batch\(ids\) once for every backward pass before optimizer\.step\(\), found \d+"
    with pytest.raises(DataError, match=rule):
        run(by_hand, REFUSED[loop])


@pytest.mark.parametrize("script", ["zdbfgdfgbs", "zdfgbdbfgs", "zdfgb zdbfgs", "zdbfg zdfgbs", "daazbfgdfgbs"])
def test_calls_that_stand_now_before_and_now_after_are_matched_or_refused_but_never_mixed_up(
    script: str, tmp_path: Path
) -> None:
    by_hand = ByHand(tmp_path)
    try:
        drawn = run(by_hand, script)
    except DataError:
        return
    by_hand.recorder.close()
    assert [batch.ids.tolist() for batch in PathReader(tmp_path).step(0).batches] == drawn


def test_gradients_that_are_never_zeroed_are_refused(tmp_path: Path) -> None:
    by_hand = ByHand(tmp_path)
    run(by_hand, "dfgbs")
    with pytest.raises(DataError, match=r"found those of the step before; call optimizer\.zero_grad\(\) before the"):
        run(by_hand, "dfgbs")


def test_one_id_is_needed_for_each_row(tmp_path: Path) -> None:
    by_hand = ByHand(tmp_path)
    by_hand.loss([0, 1, 2]).backward()
    by_hand.recorder.batch([0, 1])
    with pytest.raises(DataError, match="one id a row, found 2 ids for a forward pass of 3 inputs; pass the ids of"):
        by_hand.spend()


# ------------------------------------------------------------------------------------------------- parts of a batch


@pytest.mark.parametrize("sizes", [(4, 4, 4), (4, 2), (5, 1, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", [1.0, 4096.0])
def test_uneven_micro_batches_have_their_own_shares(
    sizes: tuple[int, ...], reduction: str, scale: float, tmp_path: Path
) -> None:
    """Means weighted by the batches' sizes, sums over the size of all, and a scaler's power of two."""
    by_hand = ByHand(tmp_path)
    for _ in range(4):
        by_hand.optimizer.zero_grad()
        for size in sizes:
            ids = by_hand.draw(size)
            part = size / sum(sizes) if reduction == "mean" else 1 / sum(sizes)
            logits, targets = by_hand.model(by_hand.inputs[ids]), by_hand.targets[ids]
            (scale * part * F.cross_entropy(logits, targets, reduction=reduction)).backward()
            by_hand.recorder.batch(ids)
        for parameter in by_hand.model.parameters():
            parameter.grad /= scale
        by_hand.spend()
    assert_recorded(by_hand)


# -------------------------------------------------------------------------------------------- what batch() is given


@pytest.mark.parametrize("ids", [[3, 0, 7, 1], (3, 0, 7, 1), range(4), torch.tensor([3, 0, 7, 1], dtype=torch.int32)])
def test_ids_are_whole_numbers_in_any_form(ids: Any, tmp_path: Path) -> None:
    by_hand = ByHand(tmp_path)
    wanted = torch.as_tensor(list(ids)).long()
    by_hand.loss(wanted).backward()
    by_hand.recorder.batch(ids)
    by_hand.spend()
    by_hand.recorder.close()
    [batch] = PathReader(tmp_path).step(0).batches
    assert torch.equal(batch.ids, wanted)


def test_ids_are_copied_when_they_are_told(tmp_path: Path) -> None:
    """A loader may fill the same tensor again."""
    by_hand = ByHand(tmp_path)
    ids = torch.tensor([3, 0, 7])
    by_hand.loss(ids).backward()
    by_hand.recorder.batch(ids, weights=(weights := torch.ones(3)))
    ids.zero_(), weights.zero_()
    by_hand.spend()
    by_hand.recorder.close()
    [batch] = PathReader(tmp_path).step(0).batches
    assert batch.ids.tolist() == [3, 0, 7]
    assert batch.weights is not None
    assert batch.weights.tolist() == [1, 1, 1]


BAD_IDS: dict[str, tuple[Any, str]] = {
    "negative": ([0, -1], r"counted from 0, found \[0, -1\]"),
    "none": ([], "needs the positions of the batch's examples"),
    "fractions": (torch.tensor([0.0, 1.0]), r"as whole numbers \(B,\), found torch.float"),
    "a mask": (torch.tensor([True, False]), r"as whole numbers \(B,\), found torch.bool"),
    "one number": (torch.tensor(3), r"as whole numbers \(B,\), found torch.int64 of shape \(\)"),
    "three axes": (torch.zeros(2, 2, 2, dtype=torch.int64), r"of shape \(2, 2, 2\); let the data set return the index"),
    "repeated": ([4, 2, 4, 4], r"found 4 3 times in 4; pass positions .* or Recorder\(repeats=True\)"),
    "mixed without shares": ([[0, 1], [2, 3]], r"ids of shape \(2, 2\) need shares of the same shape, found none"),
}


@pytest.mark.parametrize("bad", BAD_IDS)
def test_ids_that_are_no_positions_are_refused(bad: str, tmp_path: Path) -> None:
    ids, found = BAD_IDS[bad]
    with pytest.raises(DataError, match=found) as caught:
        ByHand(tmp_path).recorder.batch(ids)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["inputs", "targets", "weights", "shares"])
def test_what_is_given_besides_has_one_row_an_example(name: str, tmp_path: Path) -> None:
    ids = [[0, 1], [2, 3]] if name == "shares" else [0, 1]
    with pytest.raises(DataError, match=rf"batch\({name}=\) must have one row an example, \(2.*, found shape \(3"):
        ByHand(tmp_path).recorder.batch(ids, **{name: torch.zeros(3, 2)})


def test_repeats_are_allowed_on_request(tmp_path: Path) -> None:
    by_hand = ByHand(tmp_path, repeats=True)
    for _ in range(4):
        by_hand.step(by_hand.draw() // 3)
    path = assert_recorded(by_hand)
    assert any(len(path.step(s).batches[0].ids.unique()) < 4 for s in range(4))


def test_mixed_rows_are_credited_by_shares(tmp_path: Path) -> None:
    """A row whose second example has no share is the first example's alone."""
    call = checked_call([[0, 1], [2, 3]], 0, {"shares": torch.tensor([[1.0, 0.0], [0.25, 0.75]])}, False, 0)
    by_hand = ByHand(tmp_path)
    inputs = torch.einsum("bk,bkd->bd", call.given["shares"], by_hand.inputs[call.ids])
    for _ in range(2):
        by_hand.optimizer.zero_grad()
        F.cross_entropy(by_hand.model(inputs), by_hand.targets[[0, 3]]).backward()
        by_hand.recorder.batch(call.ids, shares=call.given["shares"], inputs=inputs, targets=by_hand.targets[[0, 3]])
        by_hand.spend()
    path = assert_recorded(by_hand)
    [batch] = path.step(0).batches
    ids, parts = batch.credited(torch.tensor([[2.0, 8.0]]))
    assert ids.tolist() == [0, 1, 2, 3]
    assert parts.tolist() == [[2.0, 0.0, 2.0, 6.0]]


def test_inputs_and_targets_are_kept_where_they_are_given_and_only_there(tmp_path: Path) -> None:
    by_hand = ByHand(tmp_path)
    noise = torch.Generator().manual_seed(1)
    seen: list[Tensor | None] = []
    for k in range(4):
        ids = by_hand.draw()
        given = (by_hand.inputs[ids] + 0.1 * torch.rand(4, 4, generator=noise)) if k % 2 else None
        by_hand.optimizer.zero_grad()
        F.cross_entropy(by_hand.model(by_hand.inputs[ids] if given is None else given), by_hand.targets[ids]).backward()
        by_hand.recorder.batch(ids, inputs=given)
        by_hand.spend()
        seen.append(given)
    path = assert_recorded(by_hand)
    for k, given in enumerate(seen):
        [batch] = path.step(k).batches
        assert (batch.inputs is None) == (given is None)
        assert given is None or torch.equal(batch.inputs, given)
        assert batch.targets is None
    assert path.largest_id < COUNT
    assert path.visits == 16


def test_any_sampler_and_any_order_of_sizes(tmp_path: Path) -> None:
    by_hand = ByHand(tmp_path, sgd(momentum=0.5))
    for size in (1, 10, 3, 2, 7):
        by_hand.step(by_hand.draw(size))
    path = assert_recorded(by_hand)
    assert [path.step(s).examples for s in range(5)] == [1, 10, 3, 2, 7]

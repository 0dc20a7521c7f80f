"""A path of which only checkpoints are left: what adds up, what is explained, what is not, and what is refused."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, plain_pairs, queries, two_per_class
from cases import float64 as float64
from torch import Tensor, nn

import brittle
from brittle.accounts import open_path
from brittle.errors import BrittleError, DataError, NotFiniteError, PathMismatchError, RunFolderError, UsageError
from brittle.findings import Findings
from brittle.kernel.memory import build
from brittle.kernel.sweep import Quadrature, sweep
from brittle.path.checkpoints import CHUNK, Checkpoints
from brittle.path.flat import FlatModel, state_of
from brittle.path.recorder import Recorder
from brittle.path.walked import WalkedStep
from brittle.records import Ledger
from brittle.runs import read_run
from brittle.subject import Subject, replace_quietly

LR = 0.1
COUNT = 12
State = dict[str, Tensor]


@dataclass
class Trained:
    """A model, its data, and the state dicts that were kept on the way."""

    model: nn.Module
    data: tuple[Tensor, Tensor]
    kept: list[State]

    def subject(self, **more: Any) -> Subject:
        """With the kept checkpoints, unless a path is named."""
        given = {} if "path" in more else {"checkpoints": [(state, LR) for state in self.kept]}
        return Subject(self.model.eval(), self.data, self.data, **(given | more))


def trained(
    name: str,
    steps: int,
    every: int,
    lr: float = LR,
    batch: int = COUNT,
    root: Path | None = None,
    frozen: Sequence[str] = (),
    **optimizer: Any,
) -> Trained:
    """Train in evaluation mode; keep the state before every so many steps. root: where to record, if at all."""
    case = CASES[name]
    model, (inputs, targets) = case.model().eval(), case.data(COUNT, seed=0)
    for parameter in frozen:
        model.get_parameter(parameter).requires_grad_(False)
    torch.manual_seed(1)
    moves = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr, **optimizer)
    recorder = Recorder(model, moves, root) if root else None
    kept = []
    for step in range(steps):
        kept += [copied(model)] if step % every == 0 else []
        ids = torch.randperm(COUNT)[:batch]
        moves.zero_grad()
        F.cross_entropy(logits_of(model, inputs[ids]), targets[ids]).backward()
        if recorder:
            recorder.batch(ids)
        moves.step()
    if recorder:
        recorder.close()
    return Trained(model, (inputs, targets), kept)


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    output = model(inputs)
    return output["logits"] if isinstance(output, dict) else output[0] if isinstance(output, tuple) else output


def copied(model: nn.Module) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


def account(subject: Subject, nodes: int = 9) -> Ledger:
    """The ledger of three queries, with the same midpoints in every interval."""
    path = open_path(subject)
    assert path is not None
    inputs, pairs = queries(subject)
    return sweep(path, subject, inputs, pairs, Quadrature(1, nodes, nodes, 0.0)).ledger


def step_of(subject: Subject, start: int) -> tuple[WalkedStep, Tensor]:
    """The interval from a checkpoint to the next one, and its displacement."""
    interval = Checkpoints(subject).interval(subject, FlatModel(subject.model), start)
    [step] = interval.steps
    return step, interval.end - step.state


def full_gradient(subject: Subject, state: Tensor) -> Tensor:
    """Of the mean loss over all training examples in evaluation mode, by plain autograd; 0 for buffers."""
    flat = FlatModel(subject.model)
    flat.load(state)
    model = flat.eval()
    return flat.gradient(lambda: subject.loss_of(subject.run(model, subject.train.inputs), subject.train.targets))


# The ledger


@pytest.mark.parametrize("name", ["tanh", "cnn", "batch norm", "residual", "attention", "tokens"])
def test_the_rows_add_up_to_the_output_whatever_happened_in_between(name: str) -> None:
    subject = trained(name, steps=12, every=4, batch=4, momentum=0.9, weight_decay=0.01).subject()
    ledger = account(subject)
    inputs, pairs = queries(subject)
    logits = subject.predict(inputs)
    truth = torch.stack([logits[k, a] - logits[k, b] for k, (a, b) in enumerate(plain_pairs(pairs))])
    assert torch.allclose(ledger.total(), truth, atol=1e-12)
    learned = (ledger.output - ledger.start).abs().mean()
    assert learned > 0.01
    assert ledger.relative_residual < 0.01  # the line integral is exact ...
    assert ledger.relative_unexplained > 0.05  # ... but minibatches and momentum are not in the gradients there
    assert ledger.decay.abs().max() == 0  # whose weights decayed by how much is not known: it is unexplained


def test_running_statistics_have_a_row_of_their_own() -> None:
    kept = trained("batch norm", steps=4, every=4)
    state = kept.kept[0] | {"1.running_mean": kept.kept[0]["1.running_mean"] + 0.5}
    ledger = account(kept.subject(checkpoints=[(state, LR)]), nodes=81)
    assert ledger.buffers.abs().min() > 1e-3
    assert torch.allclose(ledger.total(), ledger.output, atol=1e-12)
    assert ledger.relative_residual < 1e-3


@pytest.mark.parametrize("name", ["tanh", "batch norm", "attention"])
def test_one_full_batch_step_is_explained_exactly(name: str, tmp_path: Path) -> None:
    kept = trained(name, steps=1, every=1, root=tmp_path)
    step, moved = step_of(kept.subject(), 0)
    assert_steps(step, moved, n=1.0)
    ledger, recorded = account(kept.subject()), account(kept.subject(path=tmp_path))
    assert ledger.contributions.abs().max() > 1e-3
    assert ledger.unexplained.abs().max() < 1e-12
    for row in ("start", "contributions", "decay", "buffers", "residual", "output"):
        assert torch.allclose(getattr(ledger, row), getattr(recorded, row), rtol=1e-9, atol=1e-12), row


def test_of_many_steps_the_recorded_path_says_more_and_the_two_agree_on_the_sum(tmp_path: Path) -> None:
    kept = trained("tanh", steps=12, every=6, batch=4, momentum=0.9, root=tmp_path)
    coarse, exact = account(kept.subject()), account(kept.subject(path=tmp_path))
    assert exact.unexplained.abs().max() < 1e-12 < 1e-2 < coarse.unexplained.abs().max()
    assert torch.equal(coarse.start, exact.start)
    assert torch.equal(coarse.output, exact.output)
    assert not torch.allclose(coarse.contributions, exact.contributions, rtol=0.1)


@pytest.mark.parametrize("m", [1, 3, 7])
def test_of_m_equal_steps_the_fit_counts_m(m: int) -> None:
    small = 1e-3
    kept = trained("linear", steps=m, every=m, lr=small)
    step, moved = step_of(kept.subject(checkpoints=[(kept.kept[0], small)]), 0)
    assert_steps(step, moved, n=m, lr=small, rtol=m * small)


def test_weights_that_went_uphill_are_credited_to_nobody() -> None:
    kept = trained("tanh", steps=1, every=1)
    up = {name: 2 * value - kept.model.state_dict()[name] for name, value in kept.kept[0].items()}
    kept.model.load_state_dict(up)
    ledger = account(kept.subject())
    assert ledger.contributions.abs().max() == 0
    assert torch.allclose(ledger.unexplained, ledger.output - ledger.start - ledger.residual, atol=1e-12)


def test_frozen_parameters_are_credited_with_nothing() -> None:
    case, names = CASES["tanh"], ("0.weight", "0.bias")
    kept = trained("tanh", steps=4, every=4, frozen=names)
    subject = kept.subject()
    step, moved = step_of(subject, 0)
    assert isinstance(step.rule.scale, Tensor)
    frozen = torch.cat([torch.full((p.numel(),), n in names) for n, p in case.model().named_parameters()])
    assert (step.rule.scale[frozen] == 0).all()
    assert (step.rule.scale[~frozen] > 0).all()
    plain = full_gradient(subject, step.state)
    assert plain[frozen].abs().max() > 1e-3  # they would have been credited, had they moved
    assert_steps(step, moved, n=None)


def assert_steps(step: WalkedStep, moved: Tensor, n: float | None, lr: float = LR, rtol: float = 1e-9) -> None:
    """One size of step for all coordinates that moved: n_k lr_k."""
    assert isinstance(step.rule.scale, Tensor)
    used = step.rule.scale[moved != 0]
    assert len(used)
    assert (used == used[0]).all()
    assert n is None or used[0].item() == pytest.approx(n * lr, rel=rtol)


# The memory


def test_groups_displace_what_follows_the_gradient_and_nothing_across_it() -> None:
    """For a recorded path the groups' displacements and decay add up to the step; here only to its projection."""
    subject = trained("batch norm", steps=8, every=4, batch=4, momentum=0.9, weight_decay=0.01).subject()
    path = open_path(subject)
    assert path is not None
    memory = build(path, subject, two_per_class(subject), 40)
    assert memory.segments == 2
    parameters = FlatModel(subject.model).parameters
    for t in range(memory.segments):
        moved = (memory.ends[t + 1] - memory.ends[t])[:parameters]
        credited = memory.displacements[t, :-1].sum(0)[:parameters]
        gradient = full_gradient(subject, memory.ends[t])[:parameters]
        off = moved - credited
        assert memory.displacements[t, -1, :parameters].abs().max() == 0  # no decay
        assert torch.cosine_similarity(credited, gradient, dim=0) == pytest.approx(-1, abs=1e-9)
        assert abs(off @ gradient) < 1e-12 * off.norm() * gradient.norm() + 1e-15
        assert off.norm() > 0.1 * moved.norm()  # what no example is credited with
        assert off.norm() <= moved.norm()


def test_chunks_of_the_data_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = trained("tanh", steps=6, every=3, batch=4).subject()
    whole = account(subject)
    monkeypatch.setattr("brittle.path.checkpoints.CHUNK", 5)
    parts = account(subject)
    assert CHUNK > COUNT
    assert torch.allclose(whole.contributions, parts.contributions, rtol=1e-9, atol=1e-12)


# What may be handed in


FORMS: dict[str, Callable[[State, nn.Module, Path], Any]] = {
    "state dict": lambda state, model, file: state,
    "module": lambda state, model, file: loaded(model, state),
    "file of a state dict": lambda state, model, file: saved(state, file),
    "file's name": lambda state, model, file: str(saved(state, file)),
    "file with an optimizer beside it": lambda state, model, file: saved({"model_state_dict": state, "epoch": 3}, file),
    "state dict in a dict": lambda state, model, file: {"state_dict": state},
    "other precision": lambda state, model, file: {name: value.float() for name, value in state.items()},
}


def loaded(model: nn.Module, state: State) -> nn.Module:
    model.load_state_dict(state)
    return model


def saved(value: Any, file: Path) -> Path:
    torch.save(value, file)
    return file


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_read_in_every_form(form: str, tmp_path: Path) -> None:
    kept = trained("batch norm", steps=2, every=1)
    given = FORMS[form](kept.kept[0], CASES["batch norm"].model(), tmp_path / "epoch.pt")
    path = Checkpoints(kept.subject(checkpoints=[(given, LR), (kept.kept[1], LR)]))
    expected = torch.cat([kept.kept[0][slot.name].reshape(-1) for slot in FlatModel(kept.model).slots])
    assert torch.allclose(path.snapshot(0).state, expected, rtol=1e-6)
    assert path.marks == [0, 1, 2]
    assert torch.equal(path.final(), state_of(kept.model))


def test_the_audited_weights_end_the_path_and_are_not_taken_twice() -> None:
    kept = trained("tanh", steps=4, every=2)
    without = Checkpoints(kept.subject())
    closing = Checkpoints(kept.subject(checkpoints=[*((s, LR) for s in kept.kept), (copied(kept.model), LR)]))
    assert [len(path.states) for path in (without, closing)] == [3, 3]
    assert all(map(torch.equal, without.states, closing.states))


Given = Callable[[Trained, Path], Any]
SHAPE = r"checkpoint 0 must hold the audited model's weights, 0.weight has shape \(5, 4\), found"
READS = r"checkpoint 0 must be a file that torch.load\(weights_only=True\) reads, .* raised .*; save the model's state"
PAIRS = r"checkpoints must be pairs \(weights, learning rate\), rates above 0, found"

REFUSED: dict[str, tuple[Given, type[BrittleError], str]] = {
    "an absent file": (lambda kept, folder: [(folder / "absent.pt", LR)], UsageError, READS),
    "a file of something else": (lambda kept, folder: [(notes(folder), LR)], UsageError, READS),
    "a pickled model": (lambda kept, folder: [(saved(kept.model, folder / "model.pt"), LR)], UsageError, READS),
    "a number": (
        lambda kept, folder: [(3.0, LR)],
        UsageError,
        "checkpoint 0 must be a file, a state dict or a module, found float; pass",
    ),
    "another architecture": (
        lambda kept, folder: [(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), LR)],
        PathMismatchError,
        rf"{SHAPE} \(6, 4\); pass the state dict of this model",
    ),
    "a wrapper's names": (
        lambda kept, folder: [({f"module.{name}": v for name, v in kept.kept[0].items()}, LR)],
        PathMismatchError,
        f"{SHAPE} nothing; pass",
    ),
    "only the audited weights": (
        lambda kept, folder: [(kept.model, LR)],
        UsageError,
        "checkpoints= needs one checkpoint besides the audited weights, found none; pass earlier ones",
    ),
    "weights that are not finite": (
        lambda kept, folder: [({name: v * torch.nan for name, v in kept.kept[0].items()}, LR)],
        NotFiniteError,
        "checkpoint 0 must hold finite weights, found NaN or infinity; leave it out",
    ),
    "rate 0": (lambda kept, folder: [(kept.kept[0], 0)], DataError, rf"{PAIRS} \[0.0\]; pass"),
    "a negative rate": (
        lambda kept, folder: [(kept.kept[0], LR), (kept.kept[0], -1)],
        DataError,
        rf"{PAIRS} \[0.1, -1.0\]; pass",
    ),
    "no rates": (lambda kept, folder: kept.kept, DataError, PAIRS),
    "an empty list": (lambda kept, folder: [], DataError, PAIRS),
}


def notes(folder: Path) -> Path:
    (folder / "notes.txt").write_text("no weights")
    return folder / "notes.txt"


@pytest.mark.parametrize("wrong", REFUSED)
def test_wrong_checkpoints_get_one_line(wrong: str, tmp_path: Path) -> None:
    kept = trained("tanh", steps=1, every=1)
    given, error, line = REFUSED[wrong]
    with pytest.raises(error, match=f"^{line}") as caught:
        open_path(kept.subject(checkpoints=given(kept, tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_path_and_checkpoints_are_not_taken_together(tmp_path: Path) -> None:
    kept = trained("tanh", steps=1, every=1, root=tmp_path)
    with pytest.raises(DataError, match=r"^a subject has path= or checkpoints=, found both; keep path="):
        kept.subject(path=tmp_path, checkpoints=[(kept.kept[0], LR)])


# A whole audit


def blobs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three overlapping clouds of points in the unit square."""
    generator, targets = torch.Generator().manual_seed(seed), torch.arange(count) % 3
    centres = torch.tensor([[0.3, 0.3], [0.7, 0.3], [0.5, 0.7]])
    return (centres[targets] + 0.15 * torch.randn(count, 2, generator=generator)).clamp(0, 1), targets


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, Path]:
    """A training of which three files are left, and the folder of its audit."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    folder = tmp_path_factory.mktemp("finished")
    torch.manual_seed(0)
    inputs, targets = blobs(90, 0)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer, files = torch.optim.Adam(model.parameters(), 0.02), []
    for epoch in range(15):
        if epoch % 5 == 0:
            files.append(saved(model.state_dict(), folder / f"epoch-{epoch}.pt"))
        for ids in torch.randperm(90).split(15):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[ids]), targets[ids]).backward()
            optimizer.step()
    given = [(file, 0.02) for file in files]
    subject = Subject(model.eval(), (inputs, targets), blobs(60, 1), checkpoints=given, name="clouds")
    brittle.audit(subject, out=folder / "run", queries=12, progress=False)
    torch.set_default_dtype(before)
    return subject, folder / "run"


@pytest.fixture(scope="module")
def findings(finished: tuple[Subject, Path]) -> Findings:
    return read_run(finished[1]).findings()


@pytest.mark.slow
def test_the_first_lines_say_what_cannot_be_claimed(findings: Findings, finished: tuple[Subject, Path]) -> None:
    told = findings.fidelity
    assert (told.path, told.verdict) == ("checkpoints", "inconclusive")
    assert told.statement.startswith("Only 4 checkpoints of the training are known.")
    assert "not by how much, and not for single examples" in told.statement
    assert (findings.subject.optimizer, findings.subject.steps) == (None, None)
    page = (finished[1] / "report.html").read_text()
    body = re.sub(r"<[^>]+>", " ", page.partition("<header>")[2])
    opening = " ".join(body.split())
    assert opening.startswith(f"Brittleness audit checkpoints only clouds {html.escape(told.statement)}")


@pytest.mark.slow
def test_the_unexplained_part_is_measured_and_shown(findings: Findings) -> None:
    told = findings.fidelity
    assert told.relative_unexplained is not None
    assert told.relative_residual is not None
    assert told.relative_unexplained > 0.2 > told.relative_residual
    assert f"{told.relative_unexplained:.0%} of what was learned is unexplained" in told.statement
    rows = {row.name: row for row in told.rows}
    assert tuple(rows) == Ledger.ROWS
    assert rows["unexplained"].mean_absolute > 0
    assert rows["decay"].mean_absolute == 0
    assert any("Only 4 checkpoints" in warning for warning in findings.warnings)
    assert {flip.account for flip in findings.prediction.flips} == {"path kernel"}


@pytest.mark.slow
def test_the_same_audit_resumes_and_other_checkpoints_are_refused(
    finished: tuple[Subject, Path], findings: Findings
) -> None:
    subject, run = finished
    written = {file: file.stat().st_mtime_ns for file in run.glob("[!f]*/*.safetensors")}
    assert len(written) >= 7
    assert brittle.audit(subject, out=run, queries=12, progress=False) == findings
    assert {file: file.stat().st_mtime_ns for file in written} == written
    assert subject.checkpoints is not None
    for others in (subject.checkpoints[1:], subject.checkpoints[::-1], None):
        other = replace_quietly(subject, checkpoints=others)
        with pytest.raises(RunFolderError, match=r"belongs to another audit: fingerprints.checkpoints is"):
            brittle.audit(other, out=run, queries=12, progress=False)

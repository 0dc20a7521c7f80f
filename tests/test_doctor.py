"""The doctor: what it finds, that one failure hides no other, what it counts, and what the terminal shows."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, nn

import brittle
from brittle.accounts import open_path
from brittle.cli import commands, main
from brittle.data import Examples
from brittle.doctor import LOOKS, Check, examine, listed, machine, summary
from brittle.doctor.check import Visit
from brittle.doctor.demand import Demand, demand_of
from brittle.doctor.speed import Speed
from brittle.doctor.training import opened
from brittle.findings import Findings
from brittle.kernel.memory import build
from brittle.kernel.tangent import tangent_memory
from brittle.mass import cluster_groups
from brittle.path.store import PathReader
from brittle.pipeline.reaching import REACH_PASSES
from brittle.scores import TAUGHT
from brittle.subject import Subject, replace_quietly

TRAIN, TEST = 90, 60
NAMES = [name for name, _ in LOOKS]


def clouds(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three overlapping clouds of points in the unit square."""
    generator, targets = torch.Generator().manual_seed(seed), torch.arange(count) % 3
    centres = torch.tensor([[0.3, 0.3], [0.7, 0.3], [0.5, 0.7]])
    return (centres[targets] + 0.12 * torch.randn(count, 2, generator=generator)).clamp(0, 1), targets


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A sound subject, its path recorded with states before every fourth step or so."""
    root, (inputs, targets) = tmp_path_factory.mktemp("doctor") / "path", clouds(TRAIN, 0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    with brittle.Recorder(model, optimizer, root, budget=20_000) as recorder:
        for _ in range(10):
            for ids in torch.randperm(TRAIN).split(15):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs[ids]), targets[ids]).backward()
                recorder.batch(ids)
                optimizer.step()
    return Subject(
        model.eval(), (inputs, targets), clouds(TEST, 1), path=root, pool=clouds(30, 2), retrain=retrain, name="clouds"
    )


def retrain(examples: Examples, seed: int) -> nn.Module:
    return network().eval()


def weights_only(subject: Subject, **changes: Any) -> Subject:
    return replace_quietly(subject, path=None, **changes)


def of(checks: list[Check], name: str) -> Check:
    [check] = [check for check in checks if check.name == name]
    return check


def visit(subject: Subject, queries: int = 30, preset: str = "quick") -> Visit:
    return Visit(subject, opened(subject), "cpu", preset, queries, Path.cwd())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No look at the clock, except where a test asks for it."""
    monkeypatch.setattr(machine, "measured", lambda v, groups: SPEED)


SPEED = Speed(**{f.name: 1e-9 for f in fields(Speed)})


# What is found


def test_of_a_sound_subject_everything_is_ok(recorded: Subject) -> None:
    checks = examine(recorded, queries=30)
    assert [check.name for check in checks] == NAMES
    assert {check.name: check.line for check in checks if check.verdict != "ok"} == {}
    path = PathReader(recorded.path or "")
    assert len(path.marks) < path.steps
    assert of(checks, "path").line.startswith(
        f"60 steps of Adam, {len(path.marks)} states, the steps between replayed;"
    )
    assert "replays 0" in of(checks, "replay").line
    each = path.snapshot(path.marks[-1]).nbytes
    assert each == 3 * 4 * 99  # Adam's state: weights and two moments
    assert of(checks, "recording").line.startswith(f"a stored state takes 1.2 KiB; {(2 << 30) // each:,} fit in 2 GiB")
    assert of(checks, "suggestions").line == "from a pool of 30, checked by 10 retrainings"


class Careless(nn.Module):
    """Drops units in evaluation as well."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(F.dropout(x, 0.3))


class Gossip(Careless):
    """Looks across the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x - x.mean(0))


class Edge(Careless):
    """Divides by zero where all inputs are 1."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) / (1 - x.prod(1, keepdim=True))


class Shared(nn.Module):
    """Uses a weight outside its module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x @ self.first.weight.T)


class Raises(Careless):
    """Raises in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if not self.training else self.model(x)[:, 1 / 0]


def spectral(subject: Subject) -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(copy.deepcopy(subject.model[0])), *subject.model[1:])


def relabelled(examples: Examples, change: Callable[[Tensor], Tensor]) -> Examples:
    return Examples(examples.inputs, change(examples.targets.clone()))


def first_twice(examples: Examples, label: int) -> Examples:
    """The first example once more at the end, with a label of its own."""
    again = Examples(examples.inputs[:1], torch.tensor([label]))
    return examples.join(again)


Change = Callable[[Subject], dict[str, Any]]
FOUND: dict[str, tuple[Change, str, str, str]] = {
    "few test inputs": (
        lambda s: {"test": s.test[:40]},
        "examples",
        "warn",
        "20 predict and as many test in place of 30; pass more, or ask for --queries 20$",
    ),
    "too few test inputs": (lambda s: {"test": s.test[:19]}, "examples", "fail", "at least 20 inputs, found 19; pass"),
    "an absent class": (
        lambda s: {"train": s.train[(s.train.targets != 2).nonzero()[:, 0]]},
        "classes",
        "warn",
        "3 classes of 0 to 30 training examples, none at all of 2; pass all",
    ),
    "an untested class": (
        lambda s: {"test": s.test[(s.test.targets > 0).nonzero()[:, 0]]},
        "classes",
        "warn",
        "but no test input is of 0; nothing can be said of it$",
    ),
    "a tiny class": (
        lambda s: {"train": s.train[torch.cat([(s.train.targets != 2).nonzero()[:, 0], torch.tensor([2, 5])])]},
        "classes",
        "warn",
        "what is said of 2 rests on fewer than 10 examples$",
    ),
    "tested on training inputs": (
        lambda s: {"test": s.test.join(s.train[3:5])},
        "duplicates",
        "warn",
        "must not be training inputs, 2 of 62 are, first 60; take them out",
    ),
    "a torn label": (
        lambda s: {"train": first_twice(s.train, 2)},
        "labels",
        "warn",
        r"must have equal labels, 1 have several, first 0 \(a 0\) and 90 \(a 2\); correct them$",
    ),
    "a copy": (
        lambda s: {"train": first_twice(s.train, 0)},
        "labels",
        "ok",
        "equal inputs have equal labels; 1 training inputs are copies of others$",
    ),
    "dropout that never rests": (
        lambda s: {"model": Careless(s.model).eval()},
        "evaluation",
        "fail",
        "must get the same logits twice, found them .* apart; draw no random numbers",
    ),
    "a look across the batch": (
        lambda s: {"model": Gossip(s.model).eval()},
        "evaluation",
        "fail",
        "must get the same logits alone as in a batch, found them .* apart; let no layer look",
    ),
    "infinite at a bound": (
        lambda s: {"model": Edge(s.model).eval()},
        "bounds",
        "fail",
        "logits must be finite, found NaN or infinity at 1 of 4 inputs",
    ),
    "labels in another order": (
        lambda s: {part: relabelled(getattr(s, part), lambda y: (y + 1) % 3) for part in ("train", "test")},
        "accuracy",
        "warn",
        "must know its training data, found .*; look at normalize=, the order of the classes",
    ),
    "never right": (
        lambda s: {"test": relabelled(s.test, lambda y: (s.predict(s.test.inputs).argmax(1) + 1) % 3)},
        "accuracy",
        "fail",
        "some test inputs must be right to be attacked, found .* and 0.0% on 60 test inputs",
    ),
    "another normalization": (
        lambda s: {"normalize": (0.9, 3.0), "model": scaled(s)},
        "accuracy",
        "warn",
        r"must be as in training, found .*, but \d+.\d% on training inputs with the mean and standard deviation",
    ),
    "a weight used elsewhere": (
        lambda s: {"model": Shared().eval()},
        "outputs",
        "fail",
        "gradients must split by examples, those of first.weight do not add up to plain autograd's; use the weight",
    ),
    "nothing recorded": (lambda s: {"path": None}, "path", "warn", "none: only local statements at the final weights"),
    "spectral normalization": (
        lambda s: {"path": None, "model": spectral(s).eval()},
        "recording",
        "warn",
        "would be refused: weights may not change in the forward pass, spectral normalization does it in 0",
    ),
    "raises in training mode": (
        lambda s: {"path": None, "model": Raises(s.model).eval()},
        "recording",
        "warn",
        "would be refused: the model must accept a float32 batch .* ZeroDivisionError",
    ),
    "no pool": (lambda s: {"pool": None}, "suggestions", "ok", "no pool=: .* suggests no examples$"),
    "no retrain": (lambda s: {"retrain": None}, "suggestions", "ok", "from a pool of 30; no retrain=: they are not"),
    "retrain without a seed": (
        lambda s: {"retrain": lambda examples: s.model},
        "suggestions",
        "fail",
        r"retrain must take \(examples, seed\), too many positional arguments; correct it$",
    ),
    "other data than recorded": (
        lambda s: {"train": s.train[torch.arange(TRAIN).flip(0)]},
        "replay",
        "fail",
        "the training data must be those of the recorded training, the inputs of step 0 had mean",
    ),
    "other weights than recorded": (
        lambda s: {"model": network().eval()},
        "replay",
        "fail",
        "the path must end at the audited weights, its weights differ from them by up to",
    ),
    "no path there": (lambda s: {"path": Path("nowhere")}, "path", "fail", "path= must name a folder that a Recorder"),
    "one checkpoint, the last": (
        lambda s: {"path": None, "checkpoints": ((s.model, 0.1),)},
        "path",
        "fail",
        "checkpoints= needs one checkpoint besides the audited weights, found none",
    ),
    "checkpoints": (
        lambda s: {"path": None, "checkpoints": ((network(), 0.1),)},
        "path",
        "warn",
        "2 checkpoints: which groups of examples matter may be claimed, not by how much, and nothing of single",
    ),
}


def scaled(subject: Subject) -> nn.Module:
    """The same model behind a normalization by the training data's mean and standard deviation."""
    std, mean = torch.std_mean(subject.train.inputs, dim=0)
    model = copy.deepcopy(subject.model)
    with torch.no_grad():
        model[0].bias += model[0].weight @ mean
        model[0].weight *= std
    return model


@pytest.mark.parametrize("case", FOUND)
def test_what_is_wrong_is_found_and_hides_nothing_else(case: str, recorded: Subject) -> None:
    change, name, verdict, line = FOUND[case]
    checks = examine(replace_quietly(recorded, **change(recorded)), queries=30)
    check = of(checks, name)
    assert check.verdict == verdict, check.line
    assert re.search(line, check.line), check.line
    assert "\n" not in check.line
    assert {*NAMES} - {"replay"} <= {check.name for check in checks}


def test_several_failures_stand_side_by_side(recorded: Subject, tmp_path: Path) -> None:
    assert recorded.path is not None
    shutil.copytree(recorded.path, tmp_path / "path")
    state = next((tmp_path / "path" / "states").glob("*.safetensors"))
    content = state.read_bytes()
    state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    broken = replace_quietly(recorded, path=tmp_path / "path", model=Careless(recorded.model).eval())
    checks = examine(broken, queries=30, device="warp")
    failing = {check.name: check.line for check in checks if check.verdict == "fail"}
    assert {"evaluation", "path", "device"} <= set(failing)
    assert "is damaged: its checksum is" in failing["path"]
    assert failing["device"].startswith("the device must be of this machine, found 'warp'")
    assert "time" not in failing  # looked at on the CPU


def test_an_examination_leaves_everything_as_it_was(recorded: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # with the clock
    recorded.model.zero_grad()
    weights, randomness = copy.deepcopy(recorded.model.state_dict()), torch.get_rng_state()
    examine(recorded, queries=30)
    assert torch.equal(torch.get_rng_state(), randomness)
    assert all(torch.equal(value, weights[name]) for name, value in recorded.model.state_dict().items())
    assert not recorded.model.training
    assert all(p.grad is None and p.requires_grad for p in recorded.model.parameters())


# What it counts


ONCE = Speed(**{f.name: 0.0 for f in fields(Speed)})


def counts(demand: Demand, what: str) -> dict[str, float]:
    """How often each stage does one thing."""
    return demand.seconds(replace(ONCE, **{what: 1.0}))


def test_the_memory_is_as_large_as_foretold(recorded: Subject) -> None:
    for subject in (recorded, weights_only(recorded)):
        v = visit(subject)
        demand, groups = demand_of(v), cluster_groups(subject, v.effort.clusters)
        path = open_path(subject)
        built = (
            build(path, subject, groups, v.effort.segments, v.effort.nodes) if path else tangent_memory(subject, groups)
        )
        assert demand.groups == len(groups) == 9
        assert demand.evaluations == built.evaluations
        assert demand.memory_bytes == built.ends.nbytes + built.displacements.nbytes


def test_more_queries_and_larger_presets_take_longer(recorded: Subject) -> None:
    def total(queries: int, preset: str = "quick") -> float:
        return sum(demand_of(visit(recorded, queries, preset)).seconds(SPEED).values())

    assert total(10) < total(20) < total(30) == total(300)  # there are not more
    assert total(30) < total(30, "standard") < total(30, "thorough")


def test_without_a_path_nothing_is_walked(recorded: Subject) -> None:
    recorded_demand, demand = (demand_of(visit(s)) for s in (recorded, weights_only(recorded)))
    assert counts(recorded_demand, "rows")["memory"] == recorded_demand.known.steps == 60
    assert counts(recorded_demand, "plain")["retraining"] == 10 * 60
    assert not {"memory", "its check", "ledger"} & {k for k, v in counts(demand, "rows").items() if v}
    assert demand.evaluations == 1
    for subject in (weights_only(recorded), weights_only(recorded, checkpoints=((network(), 0.1),))):
        assert "and 10 of your trainings" in machine.time(visit(subject)).line  # how long they took is not known
    assert "trainings" not in machine.time(visit(recorded)).line


def test_a_stage_costs_what_it_does_times_what_that_costs(recorded: Subject) -> None:
    demand = demand_of(visit(recorded))
    single = [counts(demand, f.name) for f in fields(Speed)]
    together = demand.seconds(Speed(**{f.name: 1.0 for f in fields(Speed)}))
    fixed = demand.seconds(ONCE)
    for stage, seconds in together.items():
        rest = fixed.get(stage, 0.0)
        assert seconds - rest == pytest.approx(sum(one.get(stage, 0.0) - rest for one in single if stage in one))


@pytest.mark.slow
def test_the_counts_are_those_of_a_real_audit(recorded: Subject, tmp_path: Path) -> None:
    findings: Findings = brittle.audit(recorded, out=tmp_path / "run", queries=12, progress=False)
    spent = {stage.stage: stage.gradient_evaluations for stage in findings.cost.stages}
    demand = demand_of(visit(recorded, 12))
    gradient = counts(demand, "gradient")
    assert findings.fidelity.memory is not None
    chosen = findings.fidelity.memory.nodes / demand.evaluations  # the doctor counts the largest memory that may be
    assert 0 < chosen < 1
    assert spent["mapping the shift"] == pytest.approx(chosen * gradient["shift"])
    held = demand.natural + 2 * demand.queries  # natural and predicting in L2, attacks in Linf, a descent of K steps
    most, nodes = (max(REACH_PASSES, n) for n in (demand.evaluations, findings.fidelity.memory.nodes))
    plain = counts(demand, "attack")["agreement"] - (most - nodes) * held
    machine_passes = 2 * (min(TAUGHT, demand.train) + demand.natural + demand.queries)
    masses = gradient["agreement"] - machine_passes
    assert spent["fixing what is predicted"] == pytest.approx(chosen * masses + machine_passes + plain)
    in_rows = sum(len(PathReader(recorded.path or "").step(k).batches[0]) for k in range(60))
    for stage, counted in (
        ("building the group memory", "memory"),
        ("checking the memory against a finer account", "its check"),
    ):
        assert gradient[counted] / 2 <= spent[stage] <= gradient[counted] + in_rows
    asked = counts(demand, "attack")["attacks"] + 2 * counts(demand, "guide")["attacks"]
    assert asked / 3 <= spent["attacking"] <= 1.1 * asked
    assert spent["balancing the ledger"] - in_rows <= 3 * gradient["ledger"]
    written = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*") if file.is_file())
    assert written <= demand.written_bytes


def test_what_does_not_fit_fails(recorded: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    v = visit(recorded, preset="thorough")
    needed = demand_of(v).written_bytes
    for free, verdict in ((needed - 1, "fail"), (needed + 1, "warn"), (3 * needed, "ok")):
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        assert machine.disk(v).verdict == verdict
    pages = {"SC_PHYS_PAGES": 1 << 10, "SC_PAGE_SIZE": 1 << 10}
    monkeypatch.setattr(machine.os, "sysconf", pages.__getitem__)
    check = machine.memory(v)
    assert check.verdict == "fail"
    assert "1 MiB in this machine; take --preset quick, or a larger machine" in check.line
    monkeypatch.setattr(machine, "measured", lambda v, groups: replace(ONCE, gradient=1.0))
    check = machine.time(v)
    assert check.verdict == "warn"
    assert check.line.endswith("fewer --queries shorten it")


def test_the_clock_is_read(recorded: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for subject in (recorded, weights_only(recorded)):
        v = visit(subject)
        speed = machine.measured(v, demand_of(v).groups)
        assert all(0 < getattr(speed, f.name) < 10 for f in fields(Speed))


# What the terminal shows


CHECKS = [
    Check("bounds", "ok", "fine"),
    Check("accuracy", "warn", "one two three four five"),
    Check("path", "fail", "no"),
]


def test_lines_are_aligned_and_wrapped_where_a_width_is_given() -> None:
    assert listed(CHECKS) == ["ok    bounds    fine", "warn  accuracy  one two three four five", "fail  path      no"]
    narrow = listed(CHECKS, 33)
    assert narrow[1] == "warn  accuracy  one two three\n                four five"
    assert all(len(line) <= 33 for text in narrow for line in text.splitlines())


def test_the_last_line_sums_up() -> None:
    assert summary(CHECKS[:1]) == "an audit can run"
    assert summary(CHECKS[:2]) == "an audit can run; 1 to heed"
    assert summary(CHECKS) == "an audit would fail: 1 of 3 checks do"
    assert summary([Check("subject", "fail", "x"), *CHECKS]).endswith("looked at as if that were mended")
    assert summary(CHECKS, whole=False).startswith("the subject cannot be made")


FACTORY = """
import torch, brittle

X = torch.rand(90, 4, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)

def make(mode: bool = True, first: int = 0, high: float = 1.0, nan: bool = False, names: int = 3, shape: int = 4,
         loss: bool = False, scale: float = 1.0, broken: bool = False):
    torch.manual_seed(0)
    model = torch.nn.Linear(shape, 3)
    with torch.no_grad():
        model.weight.copy_(9 * torch.eye(3, shape))
        model.bias.zero_()
    x, y = X.clone(), Y + first
    if nan:
        x[3, 1] = float("nan")
    if broken:
        raise KeyError("weights.pt")
    return brittle.Subject(
        model.train(not mode), (x[:50], y[:50]), (x[50:], y[50:]), bounds=(0, high), class_names=list("abcdef"[:names]),
        loss=(lambda z, y: z) if loss else None, normalize=(0, scale), name="mine")
"""


Run = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command on a factory; returns its status and its lines."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FACTORY)

    def run(*options: str, spec: str = "mine.py:make") -> tuple[int, list[str]]:
        given = [part for option in options for part in (["-p", option] if "=" in option else [option])]
        status = main(["doctor", spec, "--queries", "20", *given])
        return status, capsys.readouterr().out.splitlines()

    return run


def test_a_sound_subject_gets_status_0(doctor: Run) -> None:
    status, lines = doctor()
    assert status == 0
    assert lines[0] == "ok    subject      mine: 15 float32 parameters, inputs within [0, 1]"
    assert [line.split()[1] for line in lines[:-2]] == [name for name in NAMES if name != "replay"]
    assert lines[-2:] == ["", "an audit can run; 1 to heed"]


REFUSED = {
    "mode=no": "the model must be in evaluation mode, found it in training mode; call model.eval()",
    "first=1": "train labels must lie in 0..2, found 3; number the classes from 0",
    "high=0.5": r"train inputs must lie in the bounds \[0, 0.5\], found \[.*; pass raw inputs",
    "nan=yes": "train inputs must be finite, found NaN or infinity in 1 of 50, first at 3; drop or mend them",
    "names=4": "class_names must hold one name a class, found 4 names for the model's 3 classes",
    "loss=yes": r"the loss must return one number for a batch, found shape \(8, 3\)",
    "scale=-1": r"normalize needs finite means and standard deviations above 0, found \[0.0\] and \[-1.0\]",
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_the_door_refuses_is_said_and_the_rest_looked_at(mistake: str, doctor: Run) -> None:
    status, lines = doctor(mistake)
    assert status == 3
    assert re.match(rf"fail  subject      {REFUSED[mistake]}.* \(at .*mine.py:19\)$", lines[0]), lines[0]
    assert [line.split()[1] for line in lines[1:-2]] == [name for name in NAMES[1:] if name != "replay"]
    assert not [line for line in lines[1:-2] if line.startswith("fail")]
    assert any(line.startswith("ok    accuracy") for line in lines)  # mended so that the rest can be judged
    assert lines[-1].startswith("an audit would fail: 1 of ")
    assert lines[-1].endswith("looked at as if that were mended")


def test_all_mistakes_at_the_door_are_said_at_once(doctor: Run) -> None:
    status, lines = doctor(*REFUSED)
    assert status == 3
    refused = [line for line in lines if line.startswith("fail  subject")]
    for line in REFUSED.values():
        assert [text for text in refused if re.search(line, text)], line
    assert len(refused) == len(REFUSED)


def test_what_cannot_be_mended_ends_the_examination(doctor: Run) -> None:
    for mistake, line in (
        ("shape=5", "the model must accept a float32 batch of shape .*; correct the model"),
        ("broken=yes", "the factory mine.py:make must return a brittle.Subject, it raised KeyError: 'weights.pt' at"),
    ):
        status, lines = doctor(mistake)
        assert status == 3
        assert re.match(f"fail  subject  {line}", lines[0]), lines[0]
        assert lines[1:] == ["", summary([], whole=False)]


def test_a_wrong_command_is_one(doctor: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "mine.py:mak"]) == 2
    assert main(["doctor", "mine.py:make", "-p", "colour=red"]) == 2
    assert main(["doctor", "mine.py:make", "--out", "x"]) == 2
    assert main(["doctor", "mine.py:make", "--preset", "slow"]) == 2
    assert all(line.startswith("brittle: ") for line in capsys.readouterr().err.splitlines())


def test_a_device_that_is_not_there_fails(doctor: Run) -> None:
    status, lines = doctor("--device", "warp")
    assert status == 3
    assert [line for line in lines if line.startswith("fail")] == [
        "fail  device       the device must be of this machine, found 'warp'; take cpu"
    ]


def test_debug_prints_where_a_check_failed(doctor: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "mine.py:make", "-p", "mode=no"]) == 3
    assert "Traceback" not in capsys.readouterr().err
    assert main(["doctor", "mine.py:make", "-p", "mode=no", "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_colours_are_for_terminals(doctor: Run) -> None:
    runner = CliRunner()
    plain, coloured = (
        runner.invoke(commands, ["doctor", "mine.py:make"], obj={"debug": False}, color=color).output
        for color in (False, True)
    )
    assert "\x1b" not in plain
    assert coloured.startswith("\x1b[32mok\x1b[0m")


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from brittle.cli import main; assert main(['doctor', '--help']) == 0; "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0

"""The benchmark of attacks: its parts on two small networks and made-up images, and the line for a missing folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attack_cases import blob_subject

from benchmarks.attacks import measure, peers
from benchmarks.attacks.__main__ import KEYS, _missed, _summary
from brittle.records import Norm, Queries
from brittle.subject import Subject

NORMS: tuple[Norm, ...] = ("l2", "linf")


@pytest.fixture(scope="module")
def subject() -> Subject:
    return blob_subject()


@pytest.fixture(scope="module")
def queries(subject: Subject) -> Queries:
    return measure.right_queries(subject, 20)


def test_a_missing_folder_is_named_in_one_line() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "BRITTLE_DATA"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.attacks", "--quick"],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        "benchmarks.attacks needs BRITTLE_DATA, the folder in which torchvision's MNIST/ lies"
    )


@pytest.mark.parametrize("norm", NORMS)
def test_envelopes_and_what_they_cost(subject: Subject, queries: Queries, norm: Norm) -> None:
    found = measure.envelopes(subject, queries, norm, "quick")
    assert 0.5 < found["ratio"] < 1.05
    assert found["evaluations"] > 300
    assert found["peers_evaluations"] > 100


@pytest.mark.parametrize("norm", NORMS)
def test_the_hole_seeking_attack_alone_and_its_map(subject: Subject, queries: Queries, norm: Norm) -> None:
    guide = measure.guide_of(subject)
    found = measure.alone(subject, queries, norm, 100, guide)
    assert 0.8 < found["ratio"] < 1.1
    gain = measure.map_gain(subject, queries, norm, 100, guide)
    for part in (gain, gain["over_gradient"]):
        assert part["low"] <= part["gain"] <= part["high"]
    assert gain["map_evaluations"] == 4  # two rivals are there; one node, forward and back
    assert gain["evaluations"] <= 100


def test_every_pass_of_a_peer_is_counted(subject: Subject, queries: Queries) -> None:
    counted = peers.Counted(subject.model)
    x = queries.inputs.clone().requires_grad_()
    logits = counted(x)
    assert counted.evaluations == len(x)
    for c in range(3):
        torch.autograd.grad(logits[:, c].sum(), x, retain_graph=True)
    assert counted.evaluations == 3 * len(x)  # the first backward pass belongs to the forward pass
    found = peers.ddn(subject.model, queries.inputs, queries.targets, 50)
    assert found.evaluations == 49
    assert found.distance.isfinite().all()


def test_bars_are_missed_where_a_figure_is_worse() -> None:
    per = {
        "envelopes": {
            f"{name}_{norm}": {"ratio": 0.9, "within_budget": True} for name in ("plain", "robust") for norm in NORMS
        },
        "alone": {"plain_l2_100": {"ratio": 1.1}},
        "map": {f"{k}_100": {"low": 0.1 if k else -0.1} for k in range(4)} | {"0_1000": {"low": 0.1}},
    }
    found = dict.fromkeys(KEYS) | _summary(per)
    assert found["envelope_worst_ratio"] == 0.9
    assert found["map_wins"] == 3
    assert found["map_wins_by_budget"] == {100: 3, 1000: 1}
    assert _missed(found) == ["hole_seeking_worst_ratio"]
    assert _missed(dict.fromkeys(KEYS)) == []

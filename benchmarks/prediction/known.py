"""What is computed once of every network at every held-out image, before any label of theirs is looked at.

Kept in the cache, by digest of the network and the images: the rest of the benchmark is cheap beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.prediction.probed import leads_under
from brittle import accounts
from brittle.agreement import baselines
from brittle.kernel.directional import Directional
from brittle.kernel.machine import Machine, principal
from brittle.kernel.memory import Memory, build
from brittle.path.flat import FlatModel
from brittle.records import Groups, Queries
from brittle.scores import machine_states
from brittle.settings import digest
from brittle.shards import read_arrays, read_notes, whole, write_arrays
from brittle.split import queries_at
from brittle.subject import Subject

STATES, SEGMENTS = 25, 8
"""States along the path at which outputs are looked at; segments of the memory, with one node each."""

FLOORS = (1e-5, 1e-4)
HARD = 5
"""The training examples of a class whose label was least likely along the path, one in so many, are its hard ones."""


@dataclass(frozen=True)
class Known:
    """What is known of M images, by name; nothing of it depends on their labels."""

    path_logits: Tensor  # shape: (STATES, M, C)
    mass: Tensor  # shape: (M, SEGMENTS, 2 C), by class of the training examples, the hard ones last
    opinions: Tensor  # shape: (M, len(FLOORS), C), the kernel machine's
    novelty: Tensor  # shape: (M, len(FLOORS))
    hardness: Tensor  # shape: (M,), mean log likelihood of training labels along the path, as the kernel carries it on
    carried: Tensor  # shape: (M, F, K), leads of the training examples under probes, as the kernel carries them on
    baselines: dict[str, Tensor]  # (M,) each

    @property
    def logits(self) -> Tensor:
        return self.path_logits[-1]


def known(subject: Subject, folder: Path) -> Known:
    """Of a network and its test images; kept in `folder`."""
    file, notes = (
        folder / "known.safetensors",
        {"of": digest(subject.test.inputs, *subject.model.state_dict().values())},
    )
    if not (whole(file) and read_notes(file) == notes):
        write_arrays(file, _computed(subject), notes)
    arrays = read_arrays(file)
    own = {f.name: arrays.pop(f.name) for f in fields(Known) if f.name != "baselines"}
    return Known(**own, baselines=dict(sorted(arrays.items())))  # a file has no order


def _computed(subject: Subject) -> dict[str, Tensor]:
    path, queries = accounts.open_path(subject), queries_at(subject, torch.arange(len(subject.test)))
    assert path is not None
    states = [path.snapshot(mark).state for mark in evenly(path.marks, STATES)]
    along = outputs_along(subject, states, queries.inputs)
    likely = training_likelihood(subject, states)
    mass = mass_by_segment(build(path, subject, by_hardness(subject, likely), SEGMENTS, nodes=1), subject, queries)
    machine = Machine(subject, machine_states(path), torch.Generator().manual_seed(0))
    return {
        "path_logits": along,
        "mass": mass,
        **_opinions(subject, machine, likely, queries.inputs),
        **baselines(subject, queries, passes=SEGMENTS),
    }


@torch.no_grad()
def outputs_along(subject: Subject, states: list[Tensor], inputs: Tensor) -> Tensor:
    """Logits at states of the path: (S, R, C)."""
    flat, found = FlatModel(subject.model), []
    for state in states:
        flat.load(state)
        found.append(subject.predict(inputs, model=flat.eval()))
    return torch.stack(found)


def training_likelihood(subject: Subject, states: list[Tensor]) -> Tensor:
    """Mean log likelihood of the training labels over the states but the first: (N,)."""
    logits = outputs_along(subject, states[1:], subject.train.inputs).log_softmax(2)
    return logits.gather(2, subject.train.targets[None, :, None].expand(len(logits), -1, 1))[..., 0].mean(0)


def by_hardness(subject: Subject, likely: Tensor) -> Groups:
    """Two groups a class, the hard examples last."""
    targets, hard = subject.train.targets, torch.zeros(len(likely), dtype=torch.int64)
    for c in range(subject.classes):
        rows = (targets == c).nonzero()[:, 0]
        hard[rows[likely[rows].argsort()[: len(rows) // HARD]]] = 1
    names = tuple(f"{name}, {how}" for how in ("easy", "hard") for name in subject.class_names)
    return Groups(targets + subject.classes * hard, torch.arange(subject.classes).repeat(2), names)


def mass_by_segment(memory: Memory, subject: Subject, queries: Queries) -> Tensor:
    """The mass of every group in every piece of the path apart: (M, T, G)."""
    along, groups = Directional(subject), memory.displacements.shape[1] - 1
    found = torch.zeros(len(queries), memory.evaluations, groups)
    for rows in along.blocks(len(queries)):
        carried = along.at(queries.inputs[rows], queries.pairs[rows])
        for t, (low, high, moved) in enumerate(memory.pieces()):
            found[rows, t] = carried(low, high, moved[:groups]) / memory.nodes
    return found


def evenly(marks: list[int], count: int) -> list[int]:
    """So many of them, evenly, the first and the last included."""
    return [marks[k] for k in torch.linspace(0, len(marks) - 1, count).round().long().tolist()]


def _opinions(subject: Subject, machine: Machine, likely: Tensor, inputs: Tensor) -> dict[str, Tensor]:
    """What the kernel machine says of inputs: classes, novelty, how hard their like was among the training examples."""
    labels = torch.nn.functional.one_hot(subject.train.targets, subject.classes).double()
    own = machine.kernel(subject.train.inputs)
    axes = principal(own, machine.landmarks)
    taught, asked = axes.places(own), axes.places(machine.kernel(inputs))
    opinions = [asked @ axes.regression(taught, labels, floor) + labels.mean(0) for floor in FLOORS]
    leads = leads_under(subject, subject.train.inputs)  # shape: (N, F, K)
    of_training = torch.cat([likely[:, None], leads.flatten(1)], 1)
    carried = asked @ axes.regression(taught, of_training, FLOORS[-1]) + of_training.mean(0)
    novelty = [axes.novelty(asked, floor) for floor in FLOORS]
    return {
        "opinions": torch.stack(opinions, 1).float(),
        "novelty": torch.stack(novelty, 1).float(),
        "hardness": carried[:, 0].float(),
        "carried": carried[:, 1:].unflatten(1, leads.shape[1:]).float(),
    }

"""What the path says of brittleness: one number an input, higher means brittler.

kernel machine the predicted class's lead over the best other one in a ridge regression of the training labels in the
               network's own path kernel (`kernel.machine`): little where the data, seen by that kernel, say otherwise
late path      the predicted class's lead over the best other one in log probability, with probabilities averaged
               over the later half of training: predictions that were settled late, or kept changing, are weak;
               under a probe family, that lead carried on in a straight line to the reference severity
support        how little of the gross mass is left over as net: a prediction held up by near-cancellation
severity       the predicted severity at which the margin is gone (`shift.gone_at`)

None of them looks at a label, and none attacks the input. On four digits networks the line to the reference ranked
failures with a mean AUROC of .961, the severity with .912: where the reference is fixed, what is left of the lead
there says more than when it will be gone. Averaging over the path added .0003, so it is a tie with the final
network's own line, which stands beside it as a baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from brittle.kernel.machine import Machine, principal
from brittle.kernel.quadrature import blocks
from brittle.mass import support
from brittle.path.flat import FlatModel
from brittle.path.replay import Path
from brittle.records import Groups, Pairs, ShiftMap
from brittle.shift import gone_at
from brittle.subject import Subject

LATE_STATES = 16
EARLY = 0.3
"""Of the path: where the kernel machine looks, beside its end."""

TAUGHT = 10_000
FORWARD_BLOCK = 1024


@torch.no_grad()
def late_probabilities(path: Path, subject: Subject, inputs: Tensor, device: str = "cpu") -> Tensor:
    """Class probabilities averaged over `LATE_STATES` stored states of the later half of training: (M, C).

    Cost: `LATE_STATES` forward passes an input.
    """
    flat = FlatModel(subject.model, device)
    marks = torch.tensor(path.marks)
    late = marks[marks >= path.steps / 2]
    chosen = late[torch.linspace(0, len(late) - 1, min(LATE_STATES, len(late))).round().long()].unique()
    mean = torch.zeros(len(inputs), subject.classes, dtype=torch.float64)
    for step in chosen.tolist():
        flat.load(path.snapshot(step).state)
        model = flat.eval()
        for rows in blocks(len(inputs), FORWARD_BLOCK):
            logits = subject.class_logits(model, inputs[rows].to(flat.state))
            mean[rows] += logits.softmax(1).double().cpu() / len(chosen)
    return mean


def machine_opinions(
    subject: Subject, states: Sequence[Tensor], generator: torch.Generator, device: str = "cpu"
) -> Callable[[Tensor], Tensor]:
    """What the kernel machine says of classes, as a function from inputs (M, *input) to (M, C), float64.

    It is taught with at most `TAUGHT` training examples, drawn. states: of the path, the last among them.
    Cost: a gradient pass an input and state, and `LANDMARKS` products of row gradients.
    """
    machine = Machine(subject, states, generator, device=device)
    others = torch.randperm(len(subject.train), generator=generator)
    others = others[~torch.isin(others, machine.landmarks)][: max(0, TAUGHT - len(machine.landmarks))]
    part = subject.train[torch.cat([machine.landmarks, others])]
    labels = F.one_hot(part.targets, subject.classes).double()
    own = machine.kernel(part.inputs)
    axes = principal(own, torch.arange(len(machine.landmarks)))
    learned = axes.regression(axes.places(own), labels)
    return lambda inputs: axes.places(machine.kernel(inputs)) @ learned + labels.mean(0)


def machine_states(path: Path) -> list[Tensor]:
    """Where the kernel machine looks at a path: early, where it is still wide, and at the audited weights."""
    return [path.snapshot(path.marks[round(EARLY * (len(path.marks) - 1))]).state, path.final()]


def machine_lead(opinions: Tensor, pairs: Pairs) -> Tensor:
    """Minus the predicted class's lead in the machine's opinion. (M, C) -> (M,)."""
    return -pairs.lead(opinions)


def late_path(probabilities: Tensor, pairs: Pairs) -> Tensor:
    """Minus the predicted class's lead over the best other one, in log probability. (M, C) -> (M,)."""
    own, predicted = probabilities.clamp_min(torch.finfo(torch.float64).tiny).log(), pairs.predicted[:, None]
    return own.scatter(1, predicted, -torch.inf).amax(1) - own.gather(1, predicted)[:, 0]


def late_path_at_reference(clean: Tensor, probed: Tensor, share: float) -> Tensor:
    """The late path's score carried on in a straight line to the reference severity.

    Args:
        clean: score at the query, (M,). probed: score at the probe, (M,).
        share: the probe's severity as a share of the reference.
    """
    return clean + (probed - clean) / share


def lack_of_support(mass: Tensor, groups: Groups, classes: int) -> Tensor:
    """Minus net over gross mass by class. mass: (M, G) -> (M,)."""
    return -support(groups.by_class(mass, classes))


def severity_scores(shift: ShiftMap) -> dict[str, Tensor]:
    """Minus the log of the predicted severity as a share of the reference, by family: each (M,)."""
    share = gone_at(shift) / shift.reference
    return {name: -share[:, f].log() for f, name in enumerate(shift.families)}

"""What the path says of brittleness: one number an input, higher means brittler.

late path      the predicted class's lead in probability, averaged over the later half of training: predictions
               that were settled late, or kept changing, are weak
mass           how little of the gross mass is left over as net: a prediction held up by near-cancellation
gone at        the predicted severity at which the margin is gone (`shift.gone_at`), per family or the nearest

None of them looks at a label, and none attacks the input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from brittle.kernel.quadrature import blocks
from brittle.mass import support
from brittle.path.flat import FlatModel
from brittle.path.store import PathReader
from brittle.records import Groups, Pairs, ShiftMap
from brittle.shift import gone_at
from brittle.subject import Subject

LATE_STATES = 16
FORWARD_BLOCK = 1024


@torch.no_grad()
def late_path(path: PathReader, subject: Subject, inputs: Tensor, pairs: Pairs, device: str = "cpu") -> Tensor:
    """Minus the lead of the predicted class over the best other one in late-path averaged probability, (M,).

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
    own = mean.gather(1, pairs.predicted[:, None])[:, 0]
    others = mean.scatter(1, pairs.predicted[:, None], -1.0).amax(1)
    return others - own


def lack_of_support(mass: Tensor, groups: Groups, classes: int) -> Tensor:
    """Minus net over gross mass by class. mass: (M, G) -> (M,)."""
    return -support(groups.by_class(mass, classes))


def severity_scores(shift: ShiftMap) -> dict[str, Tensor]:
    """Minus the log of the predicted severity as a share of the reference, by family: each (M,)."""
    share = gone_at(shift) / shift.reference
    return {name: -share[:, f].log() for f, name in enumerate(shift.families)}


def nearest_failure(shift: ShiftMap, families: tuple[str, ...]) -> Tensor:
    """The brittlest family's score, (M,)."""
    scores = severity_scores(shift)
    return torch.stack([scores[name] for name in families]).amax(0)

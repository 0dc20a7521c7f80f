"""The doctor: one batch through everything, before an audit that may take hours.

door       is the subject accepted, and if not, all that is wrong with it
data       sizes, classes, copies, labels
model      evaluation, bounds, accuracy
gradients  do they split by rows
training   path, replay, recording, suggestions
machine    device, memory, disk, time

Every look is taken whatever the others found. `examine` looks at a subject, `admitted` makes it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path as Folder

from brittle.doctor import data, gradients, machine, model, training
from brittle.doctor.check import Check, Look, Visit, failed, listed, looked_at, summary
from brittle.doctor.door import admitted
from brittle.subject import Subject

__all__ = ["Check", "admitted", "examine", "listed", "summary"]

LOOKS: tuple[tuple[str, Look], ...] = (
    ("subject", model.facts),
    ("examples", data.sizes),
    ("classes", data.classes),
    ("duplicates", data.duplicates),
    ("labels", data.labels),
    ("evaluation", model.evaluation),
    ("bounds", model.corners),
    ("accuracy", model.accuracy),
    ("outputs", gradients.of_outputs),
    ("step", gradients.of_step),
    ("path", training.known),
    ("replay", training.fitting),
    ("recording", training.recordable),
    ("suggestions", training.repeatable),
    ("device", machine.device),
    ("memory", machine.memory),
    ("disk", machine.disk),
    ("time", machine.time),
)


def examine(
    subject: Subject,
    *,
    device: str = "cpu",
    preset: str = "quick",
    queries: int = 200,
    folder: Folder | str = ".",
) -> list[Check]:
    """Look at everything that an audit of the subject would rest on.

    Args:
        device, preset, queries: as of the audit.
        folder: where its run folder would lie.

    Returns:
        One check a matter, in order. What a check raises is its failure.
    """
    early: dict[str, Check | None] = {}
    path = None
    try:
        path = training.opened(subject)
    except Exception as error:
        early["path"] = failed("path", error)
    v = Visit(subject, path, device, preset, queries, Folder(folder).resolve())
    early["device"] = here = looked_at("device", machine.device, v)
    if here and here.verdict == "fail":
        v = replace(v, device="cpu")
    found = [early[name] if name in early else looked_at(name, look, v) for name, look in LOOKS]
    return [check for check in found if check is not None]

"""Networks at images under small changes, and what happens to them under larger ones.

Seven families, two severities predicted of each: half its reference and the whole. A score of either looks at the
clean image and at one change of a quarter of the severity that is predicted; the baselines take the same passes,
through the final weights and through checkpoints. The draw of a family (a sign, a place, a pattern) is one for each
image, whatever the severity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from brittle import accounts
from brittle.path.flat import FlatModel
from brittle.probes import Family, image_families
from brittle.records import Pairs
from brittle.settings import digest
from brittle.shards import read_arrays, read_notes, whole, write_arrays
from brittle.shift import probe_inputs
from brittle.subject import Subject

SHARES = (0.5, 1.0)
"""Severities that are predicted, as shares of the reference."""

SEEN = 0.25
"""Severity that is looked at, as a share of the one that is predicted."""

LATE = 4
"""Checkpoints of the later half of the path that are looked at as well."""


@dataclass(frozen=True)
class Probed:
    """F families and K severities at M images."""

    views: Tensor  # shape: (M, F, K, C), logits of the final weights at what is looked at
    late_views: Tensor  # shape: (LATE, M, F, K, C), of checkpoints there
    late_logits: Tensor  # shape: (LATE, M, C), of the same checkpoints at the clean images
    leads: Tensor  # shape: (M, F, K), of the clean prediction at the severities that are predicted


def families(subject: Subject) -> tuple[Family, ...]:
    """The seven of images."""
    return image_families(tuple(subject.train.inputs.shape[1:]), subject.bounds)


def probed(subject: Subject, rows: Tensor, folder: Path) -> Probed:
    """Of a network at some of its test images; kept in `folder`."""
    inputs = subject.test.inputs[rows]
    file, notes = folder / "probed.safetensors", {"of": digest(inputs, *subject.model.state_dict().values())}
    if not (whole(file) and read_notes(file) == notes):
        write_arrays(file, _computed(subject, inputs), notes)
    arrays = read_arrays(file)
    return Probed(**{f.name: arrays[f.name] for f in fields(Probed)})


def leads_under(subject: Subject, inputs: Tensor) -> Tensor:
    """The lead of the clean prediction at the severities that are predicted: (R, F, K)."""
    pairs = Pairs.of(subject.predict(inputs))
    found = [pairs.lead(subject.predict(changed)) for changed in _changed(subject, inputs, SHARES)]
    return torch.stack(found, 1).unflatten(1, (-1, len(SHARES)))


def _computed(subject: Subject, inputs: Tensor) -> dict[str, Tensor]:
    path, flat = accounts.open_path(subject), FlatModel(subject.model)
    assert path is not None
    places = torch.linspace(len(path.marks) // 2, len(path.marks) - 2, LATE).round().long().tolist()
    states = [*(path.snapshot(path.marks[k]).state for k in places), flat.state.clone()]

    def along(changed: Tensor) -> Tensor:
        found = []
        for state in states:
            flat.load(state)
            found.append(subject.predict(changed, model=flat.eval()))
        return torch.stack(found)  # shape: (LATE + 1, M, C)

    seen = [along(changed) for changed in _changed(subject, inputs, [SEEN * share for share in SHARES])]
    views = torch.stack(seen, 2).unflatten(2, (-1, len(SHARES)))
    leads = leads_under(subject, inputs)
    return {"views": views[-1], "late_views": views[:-1], "late_logits": along(inputs)[:-1], "leads": leads}


def _changed(subject: Subject, inputs: Tensor, shares: Sequence[float]) -> Iterator[Tensor]:
    """The images under every family and at every share of its reference, families first."""
    for f, family in enumerate(families(subject)):
        draws = family.draw(inputs, torch.Generator().manual_seed(f))
        for share in shares:
            yield probe_inputs(inputs, family, draws, (share,))[:, 0]

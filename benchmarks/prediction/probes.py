"""Errors under small changes of images that are right when clean, family by family and severity by severity.

Beside all scores of natural errors the baselines get what the final weights and the checkpoints' average say at the
view, a quarter of the severity that is predicted, and both carried on in a straight line to that severity. Ours get
what single checkpoints say there, and what the kernel machine says of the lead, taught with the training examples' own
leads under the same family at the full severity: for that no image that is predicted is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.prediction.figures import Ranked, Sealed, mean, resampled
from benchmarks.prediction.kept import kept
from benchmarks.prediction.known import Known
from benchmarks.prediction.natural import above_zero, interval
from benchmarks.prediction.probed import SEEN, SHARES, Probed
from benchmarks.prediction.scores import TINY, Scores, doubt, lead
from brittle.agreement.metrics import auroc
from brittle.agreement.models import KINDS, SETTINGS, Table, rates
from brittle.settings import digest

SIDES = ("baselines", "all")


@dataclass(frozen=True)
class Predicted:
    """Of the sealed images that are probed, by one network, for F families and K severities."""

    said: Tensor  # shape: (M,) predicted classes
    failed: Tensor  # shape: (M, F, K) bool, whether the prediction is another one there
    models: dict[str, Tensor]  # (M, F, K) each, by "SIDE KIND"
    single: dict[str, Tensor]  # (M, F, K) each


def scores_at(clean: Scores, known: Known, seen: Probed, rows: Tensor, f: int, k: int) -> Scores:
    """All scores of one family and severity. rows: of what is known, the images that are probed."""
    said = known.logits[rows].argmax(1)
    view, late = seen.views[:, f, k], seen.late_views[:, :, f, k]  # shape: (M, C), (LATE, M, C)
    line = lambda at_clean, at_view: -(at_clean + (at_view - at_clean) / SEEN)  # noqa: E731
    average = late.softmax(2).mean(0).clamp_min(TINY).log()
    clean_average = seen.late_logits.softmax(2).mean(0).clamp_min(TINY).log()
    single = line(lead(seen.late_logits.double(), said), lead(late.double(), said))  # shape: (LATE, M)
    of = lambda scores: {name: score[rows] for name, score in scores.items()}  # noqa: E731
    return Scores(
        baselines=of(clean.baselines)
        | {
            "extrapolated margin": line(lead(known.logits[rows], said), lead(view, said)).double(),
            "softmax confidence at the view": doubt(view.softmax(1), said),
        },
        controls=of(clean.controls)
        | {
            "logits at the view": view,
            "averaged outputs at the view": average,
            "averaged outputs, extrapolated": line(lead(clean_average, said), lead(average, said)).double(),
        },
        ours=of(clean.ours)
        | {
            "kernel machine under the probe": -known.carried[rows][:, f, k].double(),
            "kernel machine under any probe": -known.carried[rows].mean((1, 2)).double(),
            "checkpoints, least extrapolated lead": single.amax(0),
            "checkpoints, unrest of the extrapolated lead": single.std(0),
            "checkpoints with another prediction at the view": (late.argmax(2) != said).double().mean(0),
        },
    )


def predicted(clean: Scores, known: Known, seen: Probed, rows: Tensor, labels: Tensor, folder: Path) -> Predicted:
    """By one network, kept in `folder`; no sealed label is looked at.

    rows: positions of the probed images, those of the calibration part first.  labels: of these, (L,).
    """
    looked = digest(rows, labels, known.carried, *clean.all.values(), *(getattr(seen, f.name) for f in fields(Probed)))
    made_of = f"{looked} {sorted(clean.all)} {SETTINGS}"
    return kept(folder / "probes.safetensors", made_of, Predicted, lambda: _predicted(clean, known, seen, rows, labels))


def _predicted(clean: Scores, known: Known, seen: Probed, rows: Tensor, labels: Tensor) -> Predicted:
    said, learned = known.logits[rows].argmax(1), len(labels)
    right = (said[:learned] == labels).nonzero()[:, 0]
    models: dict[str, list[Tensor]] = {f"{side} {kind}": [] for side in SIDES for kind in (*KINDS, "both")}
    single: dict[str, list[Tensor]] = {}
    failed = seen.leads < 0
    for f in range(failed.shape[1]):
        for k in range(failed.shape[2]):
            found = scores_at(clean, known, seen, rows, f, k)
            for side, of in zip(SIDES, (found.simple, found.all), strict=True):
                table = Table(of, failed[:, f, k])
                each = [rates(kind, table[right], table[slice(learned, None)]) for kind in KINDS]
                for kind, rate in zip((*KINDS, "both"), (*each, torch.stack(each).mean(0)), strict=True):
                    models[f"{side} {kind}"].append(rate)
            for name, score in (found.baselines | found.ours).items():
                if score.dim() == 1:
                    single.setdefault(name, []).append(score[learned:])
    shaped = lambda of: {n: torch.stack(v, 1).unflatten(1, failed.shape[1:]) for n, v in of.items()}  # noqa: E731
    return Predicted(said[learned:], failed[learned:], shaped(models), shaped(single))


def judged(parts: Sequence[Predicted], labels: Tensor, families: Sequence[str], resamples: int) -> dict[str, Any]:
    """All figures of one data set. parts: of its networks.  labels: of the sealed images that are probed."""
    right = torch.stack([p.said == labels for p in parts])
    weights = resampled(right, resamples)
    gains: dict[str, list[Any]] = {kind: [] for kind in (*KINDS, "both")}
    rows = []
    for f, family in enumerate(families):
        for k, share in enumerate(SHARES):
            sealed = Sealed(torch.stack([p.failed[:, f, k] for p in parts]), right, weights)
            ranked: dict[str, Ranked] = {}
            for name in parts[0].models:
                ranked[name] = sealed.ranked([p.models[name][:, f, k] for p in parts])
            for kind in gains:
                gains[kind].append(ranked[f"all {kind}"].auroc - ranked[f"baselines {kind}"].auroc)
            rows.append(
                {
                    "family": family,
                    "share": share,
                    "failures": (sealed.failed & right).sum(1).tolist(),
                    **{n: ranked[n].auroc.estimate.model_dump() for n in ("baselines both", "all both")},
                    "gain": gains["both"][-1].estimate.model_dump(),
                }
            )
    told = [k for k, found in enumerate(gains["both"]) if math.isfinite(found.value)]  # something failed everywhere
    over_families = {kind: mean([found[k] for k in told]).estimate.model_dump() for kind, found in gains.items()}
    return {
        "images": right.sum(1).tolist(),
        "families": rows,
        "gain": over_families,
        "scores": {name: _mean_auroc(parts, name, right) for name in parts[0].single},
        "probe_win": above_zero(over_families["both"]),
    }


def shown(name: str, found: Mapping[str, Any]) -> str:
    """A table for reading."""
    lines = [f"{name} under probes, {found['images']} sealed images that are right, by network"]
    for row in found["families"]:
        lines.append(
            f"  {row['family']:14s}{row['share']:4.1f}  failures {row['failures']!s:20s}baselines "
            f"{interval(row['baselines both'])}  all {interval(row['all both'])}  gain {interval(row['gain'], '+')}"
        )
    for kind, gain in found["gain"].items():
        lines.append(f" mean gain, {kind}: {interval(gain, '+')}")
    ranked = sorted(found["scores"].items(), key=lambda item: -item[1])
    return "\n".join(lines + [f"  {name:48s}{value:.4f}" for name, value in ranked])


def _mean_auroc(parts: Sequence[Predicted], name: str, right: Tensor) -> float:
    """Of one score, over families, severities and networks in which anything fails."""
    values = []
    for p, rows in zip(parts, right, strict=True):
        score, failed = p.single[name][rows].flatten(1), p.failed[rows].flatten(1)
        ones = torch.ones(len(score), 1, dtype=torch.float64)
        values += [auroc(s.double(), f, ones) for s, f in zip(score.T, failed.T, strict=True)]
    return torch.cat(values).nanmean().item()

"""Natural errors: which held-out images a network gets wrong, as they are.

`predicted` fits every model on the calibration part and fixes what it says of the sealed one; `judged` holds it against
the sealed labels. The predictor is the mean of the logistic and the boosted model on all scores; both are fitted to
log loss, so that the mean is a rate, and it is held against the rates that are observed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.prediction.figures import Sealed, resampled
from benchmarks.prediction.kept import kept
from benchmarks.prediction.networks import Networks
from benchmarks.prediction.scores import Scores
from brittle.agreement.calibration import reliability
from brittle.agreement.metrics import Resampled, holm
from brittle.agreement.models import KINDS, SETTINGS, Table, rates
from brittle.settings import digest

SETS = ("baselines", "ours", "all")
MARGIN, CONFIDENCE = "logit margin", "softmax confidence"


@dataclass(frozen=True)
class Predicted:
    """Of the sealed images, by one network: its predictions, single scores, and what models say."""

    predicted: Tensor  # shape: (M,)
    baselines: dict[str, Tensor]  # (M,) each
    ours: dict[str, Tensor]  # (M,) each; those of ours that are one number
    models: dict[str, Tensor]  # (M,) each, by "SET KIND", KIND "both" the mean
    fitted: tuple[int, int]  # calibration images, and errors among them


def predicted(nets: Networks, k: int, found: Scores, folder: Path) -> Predicted:
    """By network k, kept in `folder`; no sealed label is looked at."""
    test = nets.subjects[k].test
    made_of = f"{digest(test.targets, *found.all.values())} {sorted(found.all)} {SETTINGS}"
    return kept(folder / "natural.safetensors", made_of, Predicted, lambda: _predicted(nets, k, found))


def _predicted(nets: Networks, k: int, found: Scores) -> Predicted:
    said, test = nets.logits[k].argmax(1), nets.subjects[k].test
    table = Table(found.all, said != test.targets)
    known, asked = table[nets.calibration], table[nets.sealed]
    of = {"baselines": list(found.simple), "ours": list(found.ours), "all": list(found.all)}
    models = {}
    for name in SETS:
        for kind in KINDS:
            models[f"{name} {kind}"] = rates(kind, known.only(of[name]), asked.only(of[name]))
        models[f"{name} both"] = torch.stack([models[f"{name} {kind}"] for kind in KINDS]).mean(0)
    single = lambda scores: {n: s[nets.sealed] for n, s in scores.items() if s.dim() == 1}  # noqa: E731
    fitted = (len(known.failed), int(known.failed.sum()))
    return Predicted(said[nets.sealed], single(found.baselines), single(found.ours), models, fitted)


def judged(parts: Sequence[Predicted], labels: Tensor, resamples: int) -> dict[str, Any]:
    """All figures of one data set. parts: of its networks, on the same sealed images."""
    failed = torch.stack([p.predicted != labels for p in parts])
    sealed = Sealed(failed, torch.ones_like(failed), resampled(failed, resamples))
    base = {n: sealed.ranked([p.baselines[n] for p in parts]) for n in parts[0].baselines}
    best = max(base, key=lambda n: base[n].auroc.value)
    own = {n: sealed.ranked([p.ours[n] for p in parts]) for n in parts[0].ours}
    models = {n: sealed.ranked([p.models[n] for p in parts]) for n in parts[0].models}
    gains = {kind: _figures(models[f"all {kind}"], models[f"baselines {kind}"]) for kind in (*KINDS, "both")}
    over_best = models["all both"].auroc - base[best].auroc
    return {
        "images": len(labels),
        "errors": failed.sum(1).tolist(),
        "baselines": {n: _figures(r) for n, r in base.items()},
        "ours": _ours(parts, sealed, own),
        "models": {n: _figures(r) for n, r in models.items()},
        "gain": gains,
        "confident_half": _confident_half(parts, failed, resamples),
        "best_baseline": best,
        "predictor_over_best_baseline": over_best.estimate.model_dump(),
        "calibration": [_reliable(p, f) for p, f in zip(parts, failed, strict=True)],
        "natural_win": above_zero(over_best.estimate.model_dump()),
        "incremental_win": all(above_zero(gains[kind]["auroc"]) for kind in KINDS),
    }


def above_zero(estimate: Mapping[str, float | None]) -> bool:
    """Whether the interval is above 0."""
    return estimate["low"] is not None and estimate["low"] > 0


def _figures(score: Any, less: Any = None) -> dict[str, Any]:
    """AUROC and AUGRC with intervals, or their differences to another score's."""
    found = {"auroc": score.auroc, "augrc": score.augrc}
    if less is not None:
        found = {"auroc": found["auroc"] - less.auroc, "augrc": found["augrc"] - less.augrc}
    return {name: figure.estimate.model_dump() for name, figure in found.items()}


def _ours(parts: Sequence[Predicted], sealed: Sealed, own: Mapping[str, Any]) -> dict[str, Any]:
    """Each score of ours, and its Spearman with failure at a given margin; p corrected for their number (Holm)."""
    partial: dict[str, Resampled] = {}
    for name in own:
        partial[name] = sealed.partial([p.ours[name] for p in parts], [p.baselines[MARGIN] for p in parts])
    chances = dict(zip(partial, holm([r.chance for r in partial.values()]), strict=True))
    return {
        name: _figures(own[name])
        | {"spearman_given_margin": partial[name].estimate.model_dump(), "p_holm": chances[name]}
        for name in own
    }


def _confident_half(parts: Sequence[Predicted], failed: Tensor, resamples: int) -> dict[str, Any]:
    """AUROC among the half of the images of which each network is surest."""
    counts = torch.stack([p.baselines[CONFIDENCE] <= p.baselines[CONFIDENCE].median() for p in parts])
    sealed = Sealed(failed, counts, resampled(torch.cat([failed & counts, counts]), resamples))
    ranked = {n: sealed.ranked([p.models[n] for p in parts]) for n in ("baselines both", "all both")}
    return {
        "errors": (failed & counts).sum(1).tolist(),
        **{n: r.auroc.estimate.model_dump() for n, r in ranked.items()},
        "gain": (ranked["all both"].auroc - ranked["baselines both"].auroc).estimate.model_dump(),
    }


def _reliable(p: Predicted, failed: Tensor) -> dict[str, Any]:
    """The predictor's rates held against what happened."""
    generator = torch.Generator().manual_seed(0)
    found = reliability("natural errors", "predictor", p.models["all both"], failed, p.fitted, generator)
    keep = ("predicted", "observed", "error", "error_if_right", "verdict")
    return {name: value for name, value in found.model_dump().items() if name in keep}


def shown(name: str, found: Mapping[str, Any]) -> str:
    """A table for reading."""
    lines = [f"{name}: errors {found['errors']} of {found['images']} sealed images, by network"]
    line = lambda label, f: f"  {label:48s}{interval(f['auroc'])}   AUGRC {f['augrc']['value']:.4f}"  # noqa: E731
    for part in ("baselines", "ours", "models"):
        ranked = sorted(found[part].items(), key=lambda item: -item[1]["auroc"]["value"])
        lines += [f" {part}"] + [line(label, figures) for label, figures in ranked]
    lines += [f" gain over all baselines, {kind}: {interval(g['auroc'], '+')}" for kind, g in found["gain"].items()]
    half = found["confident_half"]["gain"]
    lines += [f" gain in the most confident half: {interval(half, '+')}"]
    best = found["predictor_over_best_baseline"]
    return "\n".join([*lines, f" predictor over {found['best_baseline']}: {interval(best, '+')}"])


def interval(estimate: Mapping[str, Any], sign: str = "") -> str:
    """A figure with its interval, in text."""
    if estimate["value"] is None:
        return "not defined"
    return " ".join(f"{estimate[key]:{sign}.4f}" for key in ("value", "low", "high"))

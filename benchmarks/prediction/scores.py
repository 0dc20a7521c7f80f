"""Scores of natural errors by name, from what is known of the images: baselines, what costs nothing, and ours.

Higher means brittler where a score is one number. What each of ours means is in `benchmarks/prediction.md`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.prediction.known import SEGMENTS, Known

TINY = 1e-12
ENSEMBLE = "five-network ensemble"


@dataclass(frozen=True)
class Scores:
    """Scores of M images by name: (M,), (M, k), or int64 for a class."""

    baselines: dict[str, Tensor]  # one number each
    controls: dict[str, Tensor]  # what costs the baselines nothing
    ours: dict[str, Tensor]

    @property
    def simple(self) -> dict[str, Tensor]:
        return self.baselines | self.controls

    @property
    def all(self) -> dict[str, Tensor]:
        return self.simple | self.ours


def scores(known: Known, ensemble: Tensor) -> Scores:
    """All scores of one network's images. ensemble: logits of every network, (K, M, C)."""
    classes = known.logits.topk(3, dim=1).indices  # shape: (M, 3): predicted, rival, third
    late = known.path_logits[len(known.path_logits) // 2 :].softmax(2).mean(0)
    return Scores(
        baselines=known.baselines | {ENSEMBLE: doubt(ensemble.softmax(2).mean(0), classes[:, 0])},
        controls={
            "predicted class": classes[:, 0],
            "rival class": classes[:, 1],
            "logits": known.logits,
            "logits, sorted": known.logits.sort(1, descending=True).values,
            "outputs averaged over checkpoints": late.clamp_min(TINY).log(),
            "doubt of these": doubt(late, classes[:, 0]),
        },
        ours=path_scores(known.path_logits, classes[:, 0])
        | mass_scores(known.mass.double(), classes)
        | machine_scores(known, classes),
    )


def doubt(probabilities: Tensor, predicted: Tensor) -> Tensor:
    """Log of the probability that another class than the predicted one has. (M, C) -> (M,)."""
    return probabilities.double().scatter(1, predicted[:, None], 0.0).sum(1).clamp_min(TINY).log()


def lead(values: Tensor, predicted: Tensor) -> Tensor:
    """The predicted class's value less the best other one's. (..., M, C) -> (..., M)."""
    own = predicted[:, None].expand(*values.shape[:-1], 1)
    return values.gather(-1, own)[..., 0] - values.scatter(-1, own, -torch.inf).amax(-1)


def path_scores(logits: Tensor, predicted: Tensor) -> dict[str, Tensor]:
    """From the outputs along the path, (S, M, C)."""
    steps, half = len(logits), len(logits) // 2
    leads, said = lead(logits.double().log_softmax(2), predicted), logits.argmax(2)  # shape: (S, M)
    other, late = said != predicted, logits[half:].double().softmax(2)
    entropy = lambda p: -(p * p.clamp_min(TINY).log()).sum(-1)  # noqa: E731
    return {
        "late path": -lead(late.mean(0).clamp_min(TINY).log(), predicted),
        "flips along the path": (said[1:] != said[:-1]).double().sum(0),
        "late flips": (said[half + 1 :] != said[half:-1]).double().sum(0),
        "settled at": (other * torch.arange(1, steps + 1)[:, None]).amax(0).double(),
        "share of the path with another prediction": other.double().mean(0),
        "least late lead": -leads[half:].amin(0),
        "unrest of the late lead": leads[half:].std(0),
        "late disagreement": entropy(late.mean(0)) - entropy(late).mean(0),
        "early lead": -leads[1 : steps // 3].mean(0),
        "leads along the path": leads[evenly_spaced(1, steps - 1, 8)].T,
    }


def mass_scores(mass: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """From the mass by segment and by class, easy and hard examples apart, (M, T, 2 C)."""
    easy, hard = mass.chunk(2, dim=2)
    whole = easy + hard
    gross = whole.abs().sum((1, 2)).clamp_min(TINY)  # shape: (M,)
    of = lambda part, c: part.gather(2, c[:, None, None].expand(-1, part.shape[1], 1))[..., 0]  # noqa: E731
    share = lambda part: part / gross.reshape(-1, *[1] * (part.dim() - 1))  # noqa: E731
    holds, when = of(whole, classes[:, 0]).clamp_min(0), torch.arange(float(SEGMENTS), dtype=torch.float64)
    own = whole.sum(1).gather(1, classes)  # shape: (M, 3)
    return {
        "lack of support": -share(whole.sum((1, 2))),
        "cancellation": (gross / whole.sum((1, 2)).abs().clamp_min(TINY)).log(),
        "gross mass": gross.log(),
        "mass by class": share(own),
        "mass by class and segment": share(torch.cat([of(whole, classes[:, k]) for k in range(3)], 1)),
        "net mass by segment": share(whole.sum(2)),
        "arrival of the support": (holds @ when) / holds.sum(1).clamp_min(TINY),
        "spread of mass over classes": _spread(whole.sum(1).abs()),
        "share of hard examples": hard.abs().sum((1, 2)) / (easy.abs() + hard.abs()).sum((1, 2)).clamp_min(TINY),
        "support by hard examples": share(of(hard, classes[:, 0]).sum(1)),
        "hard examples of the rival": -share(of(hard, classes[:, 1]).sum(1)),
    }


def machine_scores(known: Known, classes: Tensor) -> dict[str, Tensor]:
    """From the kernel machine."""
    predicted, found = classes[:, 0], {}
    for k, how in enumerate(("whitened", "half whitened")):
        said = known.opinions[:, k].double()
        found[f"kernel machine, {how}"] = -lead(said, predicted)
        found[f"kernel machine's own class, {how}"] = -said.gather(1, predicted[:, None])[:, 0]
        found[f"novelty in the kernel, {how}"] = known.novelty[:, k].double().clamp_min(TINY).log()
    together = (known.logits.double().softmax(1) + matched(known.opinions[:, 0].double(), known.logits.double())) / 2
    return found | {
        "doubt of network and kernel machine together": doubt(together, predicted),
        "kernel machine by class": known.opinions[:, -1].double(),
        "kernel machine at the three classes": known.opinions[:, -1].double().gather(1, classes),
        "hardness of its like": -known.hardness.double(),
    }


def matched(opinions: Tensor, logits: Tensor) -> Tensor:
    """The kernel machine's opinions as probabilities, on average as sure of themselves as the network: (M, C)."""
    sure, low, high = logits.softmax(1).amax(1).mean(), 0.0, 1e3
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle * opinions).softmax(1).amax(1).mean() < sure else (low, middle)
    return (middle * opinions).softmax(1)


def evenly_spaced(first: int, last: int, count: int) -> Tensor:
    return torch.linspace(first, last, count).round().long()


def _spread(values: Tensor) -> Tensor:
    """Entropy of shares, (M, C) -> (M,)."""
    shares = values / values.sum(1, keepdim=True).clamp_min(TINY)
    return -(shares * shares.clamp_min(TINY).log()).sum(1)

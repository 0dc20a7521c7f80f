"""What attacks climb, per input: functions of the logits z that rise towards misclassification.

    cross entropy   -log softmax(z)_y
    DLR             -(z_y - max_{j != y} z_j) / (z_1st - z_3rd), unmoved by shift and scale of the logits
    soft margin     T log sum_{j != y} exp(z_j / T) - z_y: the margin with its kinks smoothed at temperature T

Towards a target t they read log softmax(z)_t, -(z_y - z_t) / (z_1st - (z_3rd + z_4th) / 2), and
z_t - T log sum_{j != t} exp(z_j / T). DLR scales by as many ranks as there are: with three classes the targeted form
falls back on the third, with two on no scale at all, which is the margin.

Source: Croce, Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks" (arXiv 2003.01690), section 4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(logits (B, C), true classes (B,), target classes (B,) or None) -> (B,), larger nearer to misclassification."""


def margin(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """How far an input is from being misclassified, in logits, positive while it is safe: (B,).

    z_y - max_{j != y} z_j; towards a target t, max_{j != t} z_j - z_t.
    """
    if targets is None:
        return _of(logits, labels) - _others(logits, labels).amax(1)
    return _others(logits, targets).amax(1) - _of(logits, targets)


def cross_entropy(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """Cross entropy of the true class, or minus that of the target."""
    if targets is None:
        return F.cross_entropy(logits, labels, reduction="none")
    return -F.cross_entropy(logits, targets, reduction="none")


def dlr(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """Difference of logits ratio; the plain margin where there are two classes."""
    ranks = logits.sort(dim=1, descending=True).values
    gap = -margin(logits, labels) if targets is None else _of(logits, targets) - _of(logits, labels)
    if logits.shape[1] < 3:
        return gap
    third = ranks[:, 2] if targets is None or logits.shape[1] == 3 else (ranks[:, 2] + ranks[:, 3]) / 2
    return gap / (ranks[:, 0] - third).clamp_min(torch.finfo(logits.dtype).eps)


def soft_margin(logits: Tensor, labels: Tensor, targets: Tensor | None, temperature: Tensor) -> Tensor:
    """Minus the margin, its maximum smoothed at `temperature` (B,) logits; as T goes to 0, minus the margin.

    Its gradient is that of the cross entropy of logits / T without the factor that vanishes on sure predictions.
    """
    sharp = 1 / temperature[:, None]
    smooth = lambda column: temperature * torch.logsumexp(_others(logits * sharp, column), dim=1)  # noqa: E731
    if targets is None:
        return smooth(labels) - _of(logits, labels)
    return _of(logits, targets) - smooth(targets)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dlr": dlr}


def _of(logits: Tensor, column: Tensor) -> Tensor:
    return logits.gather(1, column[:, None])[:, 0]


def _others(logits: Tensor, column: Tensor) -> Tensor:
    """The logits with one column a row put out of the running."""
    return logits.scatter(1, column[:, None], -torch.inf)

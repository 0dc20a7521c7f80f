"""Scores from the logits at the input. Higher means brittler; each keeps its order where the softmax saturates at 1.

    softmax confidence     log(1 - p_max): orders as -p_max does
    entropy                -sum_k p_k log p_k, in nats
    energy                 -log sum_k exp z_k
    logit margin           -(z_a - z_b), a predicted, b the runner-up

Sources: A Baseline for Detecting Misclassified and Out-of-Distribution Examples, D. Hendrycks and K. Gimpel, 2017,
https://arxiv.org/abs/1610.02136. Energy-based Out-of-distribution Detection, W. Liu, X. Wang, J. Owens and Y. Li,
2020, https://arxiv.org/abs/2010.03759.
"""

from __future__ import annotations

from torch import Tensor


def output_scores(logits: Tensor) -> dict[str, Tensor]:
    """The four scores by name. logits: (M, C) -> (M,) each, float64."""
    top = logits.double().topk(2, dim=1).values
    return {
        "softmax confidence": softmax_confidence(logits),
        "entropy": entropy(logits),
        "energy": -logits.double().logsumexp(1),
        "logit margin": top[:, 1] - top[:, 0],
    }


def softmax_confidence(logits: Tensor) -> Tensor:
    """log(1 - p_max) = logsumexp of all logits but the largest - logsumexp of all. logits: (M, C) -> (M,)."""
    ordered = logits.double().sort(dim=1, descending=True).values
    return ordered[:, 1:].logsumexp(1) - ordered.logsumexp(1)


def entropy(logits: Tensor) -> Tensor:
    """With d_k = z_max - z_k: log sum_k exp(-d_k) + sum_k p_k d_k, all terms of which are positive. (M, C) -> (M,)."""
    behind = logits.double().amax(1, keepdim=True) - logits.double()  # d, shape: (M, C)
    others = behind.sort(dim=1).values[:, 1:]
    total = (-others).exp().sum(1).log1p()
    return total + ((-others - total[:, None]).exp() * others).sum(1)

"""Scores from gradients with respect to the input, through the final weights. Higher means brittler.

    input-gradient norm    log |grad loss|_*, the cross entropy's at the predicted class
    first-order distance   -min_k (z_a - z_k) / |grad (z_a - z_k)|_*, the distance to the nearest class boundary of
                           the linearised model
    margin after one step  -(lead of the predicted class after a step of size e down the lead's gradient)
    margin after K steps   -(least lead on a projected descent in K steps within distance e)

|.|_* is the dual norm: L2 for L2, L1 for Linf. The lead is the predicted class's logit less the best other one. The
distance e is one for all queries, their median first-order distance: it needs no label, and it is where the linear
model would have half of the predictions changed. Steps and queries stay within the bounds.

Sources: DeepFool, S. Moosavi-Dezfooli, A. Fawzi and P. Frossard, 2016, https://arxiv.org/abs/1511.04599. Explaining
and Harnessing Adversarial Examples, I. Goodfellow, J. Shlens and C. Szegedy, 2015, https://arxiv.org/abs/1412.6572,
for the single step; Towards Deep Learning Models Resistant to Adversarial Attacks, A. Madry and others, 2018,
https://arxiv.org/abs/1706.06083, for the descent and its step of 2.5 e / K.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from brittle.agreement.baselines.outputs import softmax_confidence
from brittle.bounds import Bounds, within
from brittle.kernel.quadrature import blocks
from brittle.probes import margin_gradient
from brittle.records import Norm, Pairs, Queries
from brittle.subject import Subject

RIVALS = 9
"""Rivals whose boundaries the first-order distance looks at, likeliest first: all of them up to ten classes."""

BATCH = 256


def gradient_passes(subject: Subject, passes: int) -> int:
    """Gradient passes a query that `gradient_scores` takes."""
    return min(RIVALS, subject.classes - 1) + 1 + 1 + passes


def gradient_scores(
    subject: Subject,
    queries: Queries,
    norm: Norm,
    passes: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """The four scores by name, each (M,) float64. passes: K; progress: called with the gradient passes done.

    Cost: `gradient_passes(subject, passes)` gradient passes a query.
    """
    report, last = progress or (lambda done: None), gradient_passes(subject, passes)
    distance = first_order_distance(subject, queries.inputs, queries.logits, norm, report)
    size = typical(distance)
    steepness = input_gradient_norm(subject, queries, norm)
    once = lead_after(subject, queries, size, norm, 1)
    report(last - passes)
    often = lead_after(subject, queries, size, norm, passes)
    report(last)
    return {
        "input-gradient norm": steepness,
        "first-order distance": -distance,
        "margin after one step": -once,
        "margin after K steps": -often,
    }


def input_gradient_norm(subject: Subject, queries: Queries, norm: Norm = "l2") -> Tensor:
    """Log of the dual norm of the loss's gradient with respect to the input, the predicted class being the target.

    With a the predicted class, grad loss = (1 - p_a) sum_k q_k grad (z_k - z_a), q the softmax over the other
    classes; its log does not saturate with the softmax. Minus infinity without a gradient. Shape (M,), float64.
    """
    own = queries.pairs.predicted[:, None]
    others = queries.logits.double().scatter(1, own, -torch.inf).softmax(1)  # q, shape: (M, C), 0 at the predicted

    def pull(logits: Tensor, rows: slice) -> Tensor:
        return (others[rows].to(logits) * (logits - logits.gather(1, own[rows].to(logits.device)))).sum(1)

    gradient = [_slope(subject, queries.inputs[rows], rows, pull)[1] for rows in blocks(len(queries), BATCH)]
    return softmax_confidence(queries.logits) + _dual_size(torch.cat(gradient), norm).log()


def first_order_distance(
    subject: Subject,
    inputs: Tensor,
    logits: Tensor,
    norm: Norm = "l2",
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Distance to the nearest class boundary of the linearised model, in raw units; infinite without a gradient.

    Exact where the logits are linear in the input and the bounds do not matter.

    Args:
        inputs: (M, *input).  logits: (M, C), at the inputs.

    Returns:
        Shape (M,), float64.
    """
    order = logits.argsort(dim=1, descending=True, stable=True)  # shape: (M, C)
    nearest = torch.full((len(inputs),), torch.inf, dtype=torch.float64)
    for k in range(1, min(RIVALS, logits.shape[1] - 1) + 1):
        margin, gradient = margin_gradient(subject, inputs, Pairs(order[:, 0], order[:, k]))
        slope = _dual_size(gradient, norm)
        distance = torch.where(slope > 0, margin.double() / slope, torch.inf)
        nearest = torch.minimum(nearest, distance)
        if progress:
            progress(k)
    return nearest


def typical(distance: Tensor) -> float:
    """The median of the finite distances, 0 where there is none: how far the finite steps go."""
    finite = distance[distance.isfinite()]
    return finite.median().item() if len(finite) else 0.0


def lead_after(subject: Subject, queries: Queries, size: float, norm: Norm, passes: int) -> Tensor:
    """The least lead that a projected descent of `passes` steps meets within distance `size`, in logits.

    One step has the length `size`, several have 2.5 size / passes each.

    Returns:
        Shape (M,), float64.

    Cost: `passes` gradient passes and one forward pass a query.
    """
    length = size if passes == 1 else 2.5 * size / passes
    least = torch.full((len(queries),), torch.inf, dtype=torch.float64)
    for rows in blocks(len(queries), BATCH):
        start, pairs = queries.inputs[rows], queries.pairs[rows]
        points = start
        lead = lambda logits, _, pairs=pairs: pairs.lead(logits)  # noqa: E731
        for k in range(passes):
            met, gradient = _slope(subject, points, rows, lead)
            if k:
                least[rows] = torch.minimum(least[rows], met.double())
            points = _within(points - length * _steepest(gradient, norm), start, size, norm, subject.bounds)
        least[rows] = torch.minimum(least[rows], pairs.lead(subject.predict(points)).double())
    return least


def _slope(
    subject: Subject, inputs: Tensor, rows: slice, output: Callable[[Tensor, slice], Tensor]
) -> tuple[Tensor, Tensor]:
    """One number an input and its gradient, on the CPU. output: (logits (B, C), rows of the queries) -> (B,)."""
    x = inputs.detach().to(next(subject.model.parameters()).device).requires_grad_()
    values = output(subject.class_logits(subject.model, x), rows)
    return values.detach().cpu(), torch.autograd.grad(values.sum(), x)[0].cpu()


def _dual_size(gradient: Tensor, norm: Norm) -> Tensor:
    """|.|_* of each row, (M,) float64."""
    return gradient.double().flatten(1).norm(p=2 if norm == "l2" else 1, dim=1)


def _steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """The direction of size 1 in which a function of this gradient climbs fastest; 0 where the gradient is 0."""
    if norm != "l2":
        return gradient.sign()
    flat = gradient.flatten(1)
    return F.normalize(flat, dim=1, eps=torch.finfo(flat.dtype).tiny).reshape(gradient.shape)


def _within(points: Tensor, start: Tensor, size: float, norm: Norm, bounds: Bounds) -> Tensor:
    """Back into the ball around `start`, then into the bounds, which keeps it in the ball."""
    offset = points - start
    offset = offset.flatten(1).renorm(2, 0, size).reshape(start.shape) if norm == "l2" else offset.clamp(-size, size)
    return within(start + offset, bounds)

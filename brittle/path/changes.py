"""What happened to a step's gradients between backward and step, told from two norms of each.

g is what came out of backward (added up over the batches of a step), g' what the optimizer gets. Clipping by norm, or a
scaler, multiplies: |g'|_2 / |g|_2 = |g'|_inf / |g|_inf = c. Clipping by value cuts: |g'|_inf = v for every tensor that
it reached, and c for the others. Then g' = clamp(c g, -v, v). Anything else (noise, gradients written by hand) is no
such rule, and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.errors import UnsupportedError

TOLERANCE = 1e-4
"""Relative spread of the factors up to which they count as one."""

NEGLIGIBLE = 1e-7
"""Share of the largest norm below which a gradient's own factor is rounding."""

OTHERWISE = (
    "gradients may be multiplied or clipped between backward and step, found one that was changed otherwise (noise, "
    "projection, hand-written gradients); take it out, or audit the trained model without a path"
)


@dataclass(frozen=True)
class Changes:
    """What happened to gradients by name: g' = clamp(c g, -v, v), factors c and bounds v of those that were cut.

    length: the norm of all g' together, where their common c is not seen: every tensor was cut, or they are means over
    processes; else 0.
    """

    factors: Mapping[str, float]
    bounds: Mapping[str, float]
    length: float = 0.0


def explained(gradients: Mapping[str, Tensor], raw: Tensor, given: Tensor) -> Changes:
    """One factor a tensor, and the bound of those that were clipped by value.

    gradients: as the optimizer gets them; raw, given: (n, 2), two norms of each before and now.
    """
    counts = raw[:, 0] > NEGLIGIBLE * raw[:, 0].max()
    if bool((~counts & (given[:, 0] > given[:, 0].max() * NEGLIGIBLE * 100)).any()):
        raise UnsupportedError(OTHERWISE)
    size, peak = (given / raw.clamp_min(1e-300)).unbind(1)
    cut = ((size - peak).abs() > TOLERANCE * peak) & counts
    bound = given[cut, 1].max().item() if bool(cut.any()) else math.inf
    if bool((given[cut, 1] < bound * (1 - TOLERANCE)).any()) or bool((peak > size)[cut].any()):
        raise UnsupportedError(OTHERWISE)
    alone = torch.tensor([g.numel() == 1 for g in gradients.values()])  # one entry: its two norms cannot differ
    cut |= alone & counts & ((given[:, 1] - bound).abs() <= TOLERANCE * bound)
    votes = counts & ~cut & (given[:, 0] > 0)
    common = size[votes].median().item() if bool(votes.any()) else 1.0
    factors = torch.where(counts & ~cut & ((size - common).abs() > TOLERANCE * common), size, common)
    factors[(factors - 1).abs() < 1e-6] = 1.0
    factors[given[:, 0] == 0] = 0.0
    bounds = {name: bound for name, is_cut in zip(gradients, cut.tolist(), strict=True) if is_cut}
    length = 0.0
    if bounds and bool(votes.any()):
        _check_cut([gradients[name] for name in bounds], raw[cut], given[cut], common)
    elif bounds:
        length = given[:, 0].square().sum().sqrt().item()
    return Changes(dict(zip(gradients, factors.tolist(), strict=True)), bounds, length)


def _check_cut(gradients: Sequence[Tensor], raw: Tensor, given: Tensor, factor: float) -> None:
    """Where one entry alone lies at the bound v, clipping leaves |g'|^2 = c^2 (|g|^2 - max^2) + v^2; else refuse."""
    for g, (size, peak), (length, bound) in zip(gradients, raw.tolist(), given.tolist(), strict=True):
        alone = int((g.abs() >= bound * (1 - 1e-6)).sum()) == 1
        expected = max(factor**2 * (size**2 - peak**2), 0.0) + bound**2
        if alone and abs(length**2 - expected) > TOLERANCE * expected:
            raise UnsupportedError(OTHERWISE)

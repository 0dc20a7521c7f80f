"""Square: random search that changes one window of the input at a time, and asks for no gradient.

Linf   start: vertical stripes of +-epsilon. A step sets one random window to +-epsilon, one sign a channel.
L2     start: a grid of bumps, scaled to epsilon. A step moves the offset of one window into another: with e a bump of
       norm 1 and random sign, the new offset of the first window is along e + d_1 / |d_1| in each channel, at the norm
       that both windows had, and what of epsilon was left; the second window becomes 0.

A step is kept where it lowers the margin. The window covers a share p of the input that falls from 0.8 (Linf) or 0.1
(L2), halved after 0.1, 0.5, 2, 5, 10, 20, 40, 60 and 80 % of the steps. An input of shape (D,) is a row of pixels.

Source: Andriushchenko, Croce, Flammarion, Hein 2020, "Square attack: a query-efficient black-box adversarial attack
via random search" (arXiv 1912.00049), sections 3.2 to 3.4 and its table of schedules.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.attacks.geometry import into_ball, size, spread
from brittle.attacks.problem import Problem
from brittle.attacks.search import Search
from brittle.bounds import within
from brittle.records import AttackRows

FIRST_SHARE = {"linf": 0.8, "l2": 0.1}
HALVED_AFTER = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
"""Shares of the steps."""

GRID = 5
"""Bumps along a side of the first L2 offset."""


def square(problem: Problem, epsilon: float, *, generator: torch.Generator, steps: int = 1000) -> AttackRows:
    """A black-box attack within `epsilon`, in L2 or Linf. Cost: at most `steps` + 1 forward passes an input.

    An input is left at its first success.
    """
    search = Search(problem, epsilon=epsilon)
    draw = _Draw(generator, problem.inputs)
    inputs = _pictures(problem.inputs)  # shape: (B, C, H, W)
    first = _stripes(draw, epsilon) if problem.norm == "linf" else _bumps(draw, epsilon)
    radius = inputs.new_full((len(inputs),), epsilon)
    fit = lambda offset: _fitted(problem, offset, radius)  # noqa: E731
    with search:
        points = fit(first)
        best = problem.margin(search.look(points))
        for k in range(steps):
            rows = ((best > 0) & search.best.isinf()).nonzero()[:, 0]
            if not len(rows):
                break
            offset = (points - problem.inputs).reshape(inputs.shape)
            window = draw.window(_share(problem.norm, k / steps))
            moved = _repaint(offset, window, draw, epsilon)
            if problem.norm == "l2":
                moved = _transfer(offset, window, draw, epsilon)
            tried = fit(moved)
            margin = torch.full_like(best, torch.inf)
            margin[rows] = problem[rows].margin(search.look(tried[rows], rows))
            better = margin < best
            best = torch.where(better, margin, best)
            points = torch.where(spread(better, points), tried, points)
    return search.rows("Square", "fixed", epsilon)


def _share(norm: str, done: float) -> float:
    """p after a share of the steps."""
    return FIRST_SHARE[norm] / 2 ** sum(done >= mark for mark in HALVED_AFTER)


def _fitted(problem: Problem, offset: Tensor, radius: Tensor) -> Tensor:
    points = problem.inputs + offset.reshape(problem.inputs.shape)
    if problem.norm == "linf":
        return within(points, problem.bounds)
    return into_ball(points, problem.inputs, radius, problem.bounds, "l2")


def _pictures(inputs: Tensor) -> Tensor:
    """(B, D), (B, H, W) or (B, C, H, W) as (B, C, H, W); more axes are channels."""
    if inputs.dim() < 3:
        return inputs.reshape(len(inputs), 1, 1, -1)
    return inputs.reshape(len(inputs), -1, *inputs.shape[-2:])


@dataclass(frozen=True)
class Window:
    """A rectangle an input."""

    inside: Tensor  # shape: (B, 1, H, W) bool
    bump: Tensor  # shape: (B, 1, H, W), 0 outside


class _Draw:
    """Random windows and signs for a batch, the same on every device."""

    def __init__(self, generator: torch.Generator, inputs: Tensor) -> None:
        self._generator, self._like = generator, _pictures(inputs)

    def signs(self, *shape: int) -> Tensor:
        return (torch.randint(2, shape, generator=self._generator) * 2 - 1).to(self._like)

    @property
    def shape(self) -> torch.Size:
        return self._like.shape

    def window(self, share: float) -> Window:
        """Of about `share` of the area, a square where it fits, at a random place of each input."""
        batch, _, height, wide = self._like.shape
        h = min(height, max(1, round((share * height * wide) ** 0.5)))
        w = min(wide, max(1, round(share * height * wide / h)))
        ends = torch.tensor([height - h + 1, wide - w + 1])
        corner = (torch.rand(batch, 2, generator=self._generator) * ends).long()
        rows, columns = (torch.arange(n)[None] - corner[:, axis, None] for axis, n in enumerate((height, wide)))
        inside = (_among(rows, h)[:, :, None] & _among(columns, w)[:, None, :])[:, None]
        half = (h if h >= w else w) // 2
        away = torch.maximum((rows - (h - 1) / 2).abs()[:, :, None], (columns - (w - 1) / 2).abs()[:, None, :])
        bump = torch.where(inside, _hill(away[:, None], half), 0)
        return Window(inside.to(self._like.device), bump.to(self._like))


def _among(offset: Tensor, length: int) -> Tensor:
    return (offset >= 0) & (offset < length)


def _hill(away: Tensor, half: int) -> Tensor:
    """sum of 1 / k^2 from the distance to the centre to the edge: high and narrow. away: any shape, pixels."""
    ks = torch.arange(1, half + 2, dtype=torch.float32)
    ring = away.floor().long().clamp(0, half)
    tail = (1 / ks.square()).flip(0).cumsum(0).flip(0)  # from k = ring + 1 on
    return tail[ring]


def _stripes(draw: _Draw, epsilon: float) -> Tensor:
    batch, channels, height, wide = draw.shape
    return epsilon * draw.signs(batch, channels, 1, wide).expand(-1, -1, height, -1)


def _bumps(draw: _Draw, epsilon: float) -> Tensor:
    """Bumps of random sign on a grid, at distance epsilon."""
    batch, channels, height, wide = draw.shape
    rows, columns = (_tiles(n) for n in (height, wide))
    away = torch.maximum(rows[1][:, None], columns[1][None, :])
    hill = _hill(away, int(away.max()))
    signs = draw.signs(batch, channels, GRID, GRID)[:, :, rows[0]][:, :, :, columns[0]]
    offset = signs * hill.to(signs)
    return epsilon * offset / spread(size(offset, "l2"), offset)


def _tiles(n: int) -> tuple[Tensor, Tensor]:
    """The tile of each of n pixels, and its distance to the tile's middle."""
    side = max(1, -(-n // GRID))
    place = torch.arange(n)
    return (place // side).clamp_max(GRID - 1), (place % side - (side - 1) / 2).abs()


def _repaint(offset: Tensor, window: Window, draw: _Draw, epsilon: float) -> Tensor:
    colour = epsilon * draw.signs(*offset.shape[:2], 1, 1)
    return torch.where(window.inside, colour, offset)


def _transfer(offset: Tensor, window: Window, draw: _Draw, epsilon: float) -> Tensor:
    """The offset of a second window, and what of epsilon is left, go into the first one."""
    tiny = torch.finfo(offset.dtype).tiny
    other = draw.window(float(window.inside[0].float().mean()))
    first = torch.where(window.inside, offset, 0)
    both = torch.where(window.inside | other.inside, offset, 0)
    left = (epsilon**2 - size(offset, "l2").square()).clamp_min(0)
    norms = lambda values: values.square().sum((2, 3), keepdim=True).sqrt()  # noqa: E731, shape: (B, C, 1, 1)
    bump = window.bump / norms(window.bump).clamp_min(tiny)
    mixed = draw.signs(*offset.shape[:2], 1, 1) * bump + first / norms(first).clamp_min(tiny)
    share = left[:, None, None, None] / offset.shape[1]
    length = (both.square().sum((2, 3), keepdim=True) + share).sqrt()
    fresh = mixed / norms(mixed).clamp_min(tiny) * length
    kept = torch.where(other.inside, 0, offset)
    return torch.where(window.inside, fresh, kept)

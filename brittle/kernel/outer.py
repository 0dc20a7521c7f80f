"""Weight gradients that are sums of outer products: those of linear layers and of convolutions.

Row i's gradient of the weight is, in each of k groups,

    G_i = sum_t g_it a_it^T,                    shape (p, d)

with t over the T positions at which the weight is applied, g_it (p,) the gradient at the output there, and a_it (d,)
what the weight was multiplied with: the input of a linear layer, a window of a convolution's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

VECTOR = 8
"""Channels that a CPU multiplies at once."""

MANY = 32
"""Positions from which on convolving by groups is faster."""


@dataclass(frozen=True)
class Window:
    """How a convolution reads its input, each (vertical, horizontal)."""

    kernel: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    stride: tuple[int, ...]

    def places(self, images: Tensor) -> list[int]:
        """How often it lies in images, vertically and horizontally."""
        both = zip(images.shape[2:], self.kernel, self.dilation, self.padding, self.stride, strict=True)
        return [(n + 2 * pad - d * (k - 1) - 1) // s + 1 for n, k, d, pad, s in both]

    def views(self, images: Tensor) -> Tensor:
        """The windows, which share memory: (B, channels, h, w) -> (B, channels, *kernel, *places)."""
        places = self.places(images)
        if any(self.padding):
            images = F.pad(images, (self.padding[1], self.padding[1], self.padding[0], self.padding[0]))
        steps = images.stride()
        inside = [n * d for n, d in zip(steps[2:], self.dilation, strict=True)]
        across = [n * s for n, s in zip(steps[2:], self.stride, strict=True)]
        return images.as_strided(
            (*images.shape[:2], *self.kernel, *places), (*steps[:2], *inside, *across), images.storage_offset()
        )


@dataclass(frozen=True)
class Outer:
    """B rows of such gradients, in factors. Without a window `inputs` are the a, (B, k, d, T)."""

    g: Tensor  # shape: (B, k, p, T)
    inputs: Tensor  # shape: (B, channels, height, width) with a window
    window: Window | None = None

    def __len__(self) -> int:
        return len(self.g)

    def __getitem__(self, rows: slice) -> Outer:
        return Outer(self.g[rows], self.inputs[rows], self.window)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """k, p, d, T."""
        _, k, p, t = self.g.shape
        if self.window is None:
            return k, p, self.inputs.shape[2], t
        vertical, horizontal = self.window.kernel
        return k, p, self.inputs.shape[1] // k * vertical * horizontal, t

    @property
    def suits_groups(self) -> bool:
        """Whether torch's own gradient of the weight is faster than products with windows, which have to be copied.

        So it was measured where windows overlap, channels fill a CPU's vectors, and the weight is not far larger than
        what it is applied to.
        """
        if self.window is None or self.inputs.device.type != "cpu" or self.inputs.dtype != torch.float32:
            return False
        k, _, d, t = self.sizes
        channels = self.inputs.shape[1] // k
        return channels % VECTOR == 0 and d > channels and t >= MANY

    def a(self) -> Tensor:
        """What the weight was multiplied with, (B, k, d, T); a convolution's windows are copies."""
        if self.window is None:
            return self.inputs
        k, _, d, t = self.sizes
        return self.window.views(self.inputs).reshape(-1, k, d, t)  # torch's unfold takes some times as long

    def rows(self) -> Tensor:
        """The gradients themselves, (B, k p d), in the order of the weight."""
        k, p, d, t = self.sizes
        if self.suits_groups:
            return self._rows_by_groups()
        g, a = self.g.reshape(-1, p, t), self.a().reshape(-1, d, t)  # shape: (B k, ...)
        made = g * a.transpose(1, 2) if t == 1 else torch.bmm(g, a.transpose(1, 2))
        return made.view(-1, k * p * d)

    def sum(self, axis: Literal[0] = 0) -> Tensor:
        """The sum of all rows, (k p d,): the batch's gradient."""
        k, p, _, _ = self.sizes
        if self.window is None:
            return torch.einsum("bkpt,bkdt->kpd", self.g, self.inputs).flatten()
        window, size = self.window, (k * p, self.inputs.shape[1] // k, *self.window.kernel)
        g = self.g.reshape(len(self), k * p, *window.places(self.inputs))
        found = conv2d_weight(self.inputs, size, g, window.stride, window.padding, window.dilation, groups=k)
        return found.flatten()

    def bound(self) -> Tensor:
        """sum_i |g_i| |a_i|, which no sum of |G_i| exceeds (Cauchy and Schwarz, over the positions), (k p d,)."""
        k, _, d, _ = self.sizes
        if self.window is None:
            a = self.inputs.norm(dim=3)
        else:
            a = self.window.views(self.inputs.square()).sum((4, 5)).sqrt().view(-1, k, d)
        return torch.einsum("bkp,bkd->kpd", self.g.norm(dim=3), a).flatten()

    def entries(self, at: Tensor) -> Tensor:
        """Some columns of the rows, (n,) -> (B, n)."""
        k, p, d, _ = self.sizes
        group, out, j = at // (p * d), at // d % p, at % d
        if self.window is None:
            a = self.inputs[:, group, j]
        else:
            vertical, horizontal = self.window.kernel
            channel = group * (self.inputs.shape[1] // k) + j // (vertical * horizontal)
            views = self.window.views(self.inputs)
            a = views[:, channel, j // horizontal % vertical, j % horizontal].flatten(2)
        return (self.g[:, group, out] * a).sum(2)

    def carried(self, vectors: Tensor) -> Tensor:
        """sum_t g_it . (A_m a_it): what the layer returns with A_m for weights, along g. (M, k p d) -> (M, B)."""
        k, p, d, t = self.sizes
        if self.window is None:
            moved = torch.einsum("mkpd,bkdt->bkmpt", vectors.view(-1, k, p, d), self.inputs)
        else:
            window, m = self.window, len(vectors)
            weights = vectors.view(m, k, -1).transpose(0, 1)
            weights = weights.reshape(k * m * p, self.inputs.shape[1] // k, *window.kernel)
            moved = F.conv2d(self.inputs, weights, None, window.stride, window.padding, window.dilation, k)
        return torch.einsum("bkmx,bkx->mb", moved.reshape(len(self), k, -1, p * t), self.g.flatten(2))

    def bias_rows(self) -> Tensor:
        """Gradients of the bias, (B, k p): sum_t g_it."""
        return (self.g[..., 0] if self.g.shape[3] == 1 else self.g.sum(3)).flatten(1)

    def _rows_by_groups(self) -> Tensor:
        """The weight gradient of one convolution that has a group of its own for each row and each group.

        Source: Rochette, Manoel, Tramel 2019, "Efficient per-example gradient computations in convolutional neural
        networks" (arXiv 1912.06015).
        """
        (b, k, p, _), images, window = self.g.shape, self.inputs, self.window
        assert window is not None
        size = (b * k * p, images.shape[1] // k, *window.kernel)
        found = conv2d_weight(
            images.reshape(1, -1, *images.shape[2:]),
            size,
            self.g.reshape(1, b * k * p, *window.places(images)),
            window.stride,
            window.padding,
            window.dilation,
            groups=b * k,
        )
        return found.view(b, -1)


Part = Outer | Tensor
"""The rows of one tensor of the state: in factors, or formed, (B, p)."""


def formed(part: Part) -> Tensor:
    """The rows themselves, (B, p), in their own precision whatever runs around."""
    if isinstance(part, Tensor):
        return part
    with torch.autocast(part.g.device.type, enabled=False):
        return part.rows()

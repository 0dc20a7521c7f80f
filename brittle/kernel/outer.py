"""Weight gradients that are sums of outer products: those of linear layers and of convolutions.

Row i's gradient of the weight is, in each of k groups,

    G_i = sum_t g_it a_it^T,                    shape (p, d)

with t over the T positions at which the weight is applied, g_it (p,) the gradient at the output there, and a_it (d,)
what the weight was multiplied with: the input of a linear layer, a window of a convolution's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """How a convolution reads its input, each (vertical, horizontal)."""

    kernel: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def single(self) -> bool:
        """Whether windows are the input's places, each read once."""
        return (self.kernel, self.padding, self.stride) == ((1, 1), (0, 0), (1, 1))


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

    def a(self) -> Tensor:
        """What the weight was multiplied with, (B, k, d, T); a convolution's windows are copies."""
        if self.window is None:
            return self.inputs
        (k, _, d, t), w = self.sizes, self.window
        found = self.inputs if w.single else F.unfold(self.inputs, w.kernel, w.dilation, w.padding, w.stride)
        return found.reshape(-1, k, d, t)

    def rows(self) -> Tensor:
        """The gradients themselves, (B, k p d), in the order of the weight."""
        k, p, d, t = self.sizes
        g, a = self.g.reshape(-1, p, t), self.a().reshape(-1, d, t)  # shape: (B k, ...)
        formed = g * a.transpose(1, 2) if t == 1 else torch.bmm(g, a.transpose(1, 2))
        return formed.view(-1, k * p * d)

    def bias_rows(self) -> Tensor:
        """Gradients of the bias, (B, k p): sum_t g_it."""
        return (self.g[..., 0] if self.g.shape[3] == 1 else self.g.sum(3)).flatten(1)

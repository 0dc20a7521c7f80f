"""The models of the cases, small, each with the activation as its argument: smooth ones in float64, ReLU in float32.

Each takes images (B, 1, 8, 8) in [0, 1] and gives ten logits, inside a dict or a tuple where its name says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Activation = Callable[[], nn.Module]

Build = Callable[[Activation], nn.Module]

Norm = Callable[[int], nn.Module]
"""channels -> a normalization of them."""


def mlp(act: Activation, outputs: int = 10) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), act(), nn.Linear(32, outputs))


def binary(act: Activation) -> nn.Module:
    """One logit."""
    return mlp(act, outputs=1)


def cnn(act: Activation, norm: Norm | None = None, drop: float = 0.0) -> nn.Module:
    between = lambda d: [*([norm(d)] if norm else []), act()]  # noqa: E731
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        *between(8),
        *([nn.Dropout2d(drop)] if drop else []),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        *between(16),
        nn.Flatten(),
        *([nn.Dropout(drop)] if drop else []),
        nn.Linear(64, 10),
    )


def batch_norm(act: Activation) -> nn.Module:
    return cnn(act, nn.BatchNorm2d)


def group_norm(act: Activation) -> nn.Module:
    return cnn(act, lambda d: nn.GroupNorm(2, d))


def dropout(act: Activation) -> nn.Module:
    return cnn(act, drop=0.2)


def batch_norm_dropout(act: Activation) -> nn.Module:
    return cnn(act, nn.BatchNorm2d, drop=0.2)


def layer_norm(act: Activation) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.LayerNorm(32), act(), nn.Linear(32, 24), nn.LayerNorm(24), act(),
        nn.Linear(24, 10),
    )  # fmt: skip


class Block(nn.Module):
    """x + convolution of it, normalized."""

    def __init__(self, width: int, act: Activation) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), act(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.body(x))


def residual(act: Activation) -> nn.Module:
    """A small residual net with batch normalization."""
    stem = [nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), act()]
    return nn.Sequential(*stem, Block(8, act), Block(8, act), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))


class Shared(nn.Module):
    """One layer called three times, and a last layer that owns the first one's weight as well."""

    def __init__(self, act: Activation) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(64, 32), nn.Linear(32, 32)
        self.back, self.last, self.act = nn.Linear(32, 64), nn.Linear(64, 10), act()
        self.code = nn.Linear(64, 32)
        self.code.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.first(x.flatten(1)))
        for _ in range(3):
            h = h + self.act(self.again(h))
        h = self.act(self.back(h))
        return self.last(torch.cat([h[:, :32], self.act(self.code(h))], dim=1))


class Tokens(nn.Module):
    """Brightness read as tokens: two embeddings, their sums over rows of the image, two layers."""

    def __init__(self, act: Activation) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(17, 6), nn.Embedding(64, 6)
        self.inner, self.last, self.act = nn.Linear(48, 24), nn.Linear(24, 10), act()

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.flatten(1) * 16).round().long()  # shape: (B, 64)
        h = self.table(tokens) * self.place(torch.arange(64).expand(len(x), 64))
        return self.last(self.act(self.inner(h.unflatten(1, (8, 8)).sum(2).flatten(1))))


class Attention(nn.Module):
    """The image's rows and their places as tokens behind a class token: one transformer layer."""

    def __init__(self, act: Activation, drop: float = 0.0) -> None:
        super().__init__()
        self.start, self.place = (nn.Parameter(torch.randn(1, n, 16) / 4) for n in (1, 8))
        self.embed, self.before, self.after = nn.Linear(8, 16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.mix = nn.MultiheadAttention(16, 2, dropout=drop, batch_first=True)
        self.inner = nn.Sequential(nn.Linear(16, 32), act(), nn.Dropout(drop), nn.Linear(32, 16))
        self.last = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.cat([self.start.expand(len(x), 1, 16), self.embed(x[:, 0]) + self.place], dim=1)
        h = self.before(rows)
        rows = rows + self.mix(h, h, h, need_weights=False)[0]
        rows = rows + self.inner(self.after(rows))
        return self.last(rows[:, 0])


def attention_dropout(act: Activation) -> nn.Module:
    return Attention(act, drop=0.1)


class Recurrent(nn.Module):
    """The image's rows one after the other."""

    def __init__(self, act: Activation) -> None:
        super().__init__()
        self.rows, self.inner, self.last = nn.GRU(8, 16, batch_first=True), nn.Linear(16, 16), nn.Linear(16, 10)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.inner(self.rows(x[:, 0])[0][:, -1])))


class Idle(nn.Module):
    """A head that nobody calls, and a branch that only some batches take: their gradients are missing."""

    def __init__(self, act: Activation) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), act())
        self.branch, self.act = nn.Linear(32, 32), act()
        self.unused, self.last = nn.Linear(32, 3), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.trunk(x)
        if not self.training or x.mean() > 0.305:
            h = h + self.act(self.branch(h))
        return self.last(h)


class Packed(nn.Module):
    """The logits in a dict or a tuple, beside other things."""

    def __init__(self, act: Activation, form: Literal["dict", "tuple"]) -> None:
        super().__init__()
        self.trunk, self.last = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), act()), nn.Linear(32, 10)
        self.form = form

    def forward(self, x: Tensor) -> dict[str, Tensor] | tuple[Tensor, ...]:
        h = self.trunk(x)
        logits = self.last(h)
        return {"features": h, "logits": logits} if self.form == "dict" else (logits, h)


def in_dict(act: Activation) -> nn.Module:
    return Packed(act, "dict")


def in_tuple(act: Activation) -> nn.Module:
    return Packed(act, "tuple")


def logits_of(output: Tensor | dict[str, Tensor] | tuple[Tensor, ...]) -> Tensor:
    """What a training loop takes out of the models above."""
    if isinstance(output, dict):
        return output["logits"]
    return output[0] if isinstance(output, tuple) else output

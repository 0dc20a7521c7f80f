"""What was observed of one step, and how numbers by tensor are laid out over the coordinates of the state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from brittle.path.rules import Coefficient

OBSERVED = "observed"
"""In place of an optimizer's name: its rule is not known, its steps are projected on the gradients."""


@dataclass(frozen=True)
class Recipe:
    """What was observed of one step, tensor by tensor (n of them): where its coefficients come from.

    owner: the parameter group that moves each tensor, -1 for none; counts: its updates before this step, -1 where
    it rests in this step; factors: what happened to its gradient between backward and step; extra: NAdam's
    `mu_product` after the step, 1 where SGD's buffer had begun, or the projected scale of an observed optimizer.
    """

    optimizer: str
    sizes: Tensor  # shape: (n,) int64, adding up to P
    owner: Tensor  # shape: (n,) int64
    counts: Tensor  # shape: (n,) int64
    factors: Tensor  # shape: (n,) float64
    extra: Tensor  # shape: (n,) float64
    lr: tuple[float, ...]
    settings: tuple[Mapping[str, Any], ...]
    dtype: torch.dtype = torch.float32
    device: str | torch.device = "cpu"
    moved: Tensor | None = None  # shape: (n,) bool, by any step of the path; by default those that have an owner

    def to(self, device: torch.device) -> Recipe:
        """The same recipe with its coefficients on a device."""
        return replace(self, device=device)

    @property
    def active(self) -> Tensor:
        """The tensors that this step moves, (n,) bool."""
        return self.counts >= 0

    @property
    def rate(self) -> Tensor:
        """The learning rate of each tensor, (n,)."""
        return self._by_tensor(self.lr)

    @property
    def t(self) -> Tensor:
        """The number of this update of each tensor, counted from 1; 1 where it rests. (n,)."""
        return (self.counts + 1).clamp_min(1).double()

    @property
    def sign(self) -> Tensor:
        """-1 for tensors whose group maximizes; an observed optimizer's scale has the sign already. (n,)."""
        turned = self.flag("maximize") & (self.optimizer != OBSERVED)
        return torch.where(turned, -1.0, 1.0)

    def of(self, key: str) -> Tensor:
        """A setting of each tensor, 0 where its group has none, (n,)."""
        return self._by_tensor([float(s.get(key) or 0.0) for s in self.settings])

    def beta(self, which: int) -> Tensor:
        """One of the two betas of each tensor, (n,)."""
        return self._by_tensor([float(s["betas"][which]) for s in self.settings])

    def flag(self, key: str) -> Tensor:
        """A yes-or-no setting of each tensor, (n,) bool."""
        return self._by_tensor([float(bool(s.get(key))) for s in self.settings]) > 0

    def over(self, values: Tensor, rest: float) -> Coefficient:
        """Values (n,) laid out over the coordinates, `rest` for tensors that rest. Shape (P,), or one number."""
        return self._laid_out(torch.where(self.active, values.double(), rest))

    def where_held(self, values: Tensor, rest: float) -> Coefficient:
        """As `over`, for coefficients that do not matter for tensors that no step of the path ever moves."""
        values = torch.where(self.active, values.double(), rest)
        moved = self.owner >= 0 if self.moved is None else self.moved
        mattering = values[moved & (self.sizes > 0)]
        return self._laid_out(torch.where(moved, values, mattering[0]) if len(mattering) else values)

    def momentum(self) -> Tensor:
        """The momentum of each tensor under an optimizer whose rule is not known, by its settings' names. (n,)."""
        return self._by_tensor([named_momentum(s) for s in self.settings])

    def _by_tensor(self, by_group: Sequence[float]) -> Tensor:
        return torch.tensor([*by_group, 0.0], dtype=torch.float64)[self.owner]

    def _laid_out(self, values: Tensor) -> Coefficient:
        counting = values[self.sizes > 0]
        if bool((counting == counting[:1]).all()):
            return float(counting[0])
        return values.to(self.dtype).repeat_interleave(self.sizes).to(self.device)


def named_momentum(settings: Mapping[str, Any]) -> float:
    """The momentum that a parameter group's settings name, whatever the optimizer; 0 where none is named."""
    return float(settings.get("momentum", (settings.get("betas") or [0.0])[0]) or 0.0)

"""The records that flow between the stages: frozen, plain tensors on the CPU. Read this first.

Axis letters, the same everywhere:

    N training examples   M queries    R probes      G groups    C classes or outputs
    P parameters          B batch      S steps       T segments  K severities

A *query* is an input whose prediction is explained; its *output* is the margin of the predicted class over
its rival, in logits, and the pair is fixed at the clean query and kept for its probes. A single-logit model
has the logits (0, z), so that its margin is the logit signed towards the predicted class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["l0", "l1", "l2", "linf"]
"""L0 counts the numbers of an input that changed."""

OUTCOMES = ("held", "fooled", "wrong", "broken")
"""What an attack may come to at an input: it held; it was fooled; it was wrong before and was not attacked; the attack
raised there."""

Progress = Callable[[int, int], None]
"""(done, total): told how far a stage has come; the caller draws it."""


@dataclass(frozen=True)
class Pairs:
    """The two classes whose margin is a query's output."""

    predicted: Tensor  # shape: (M,) int64
    rival: Tensor  # shape: (M,) int64

    def __len__(self) -> int:
        return len(self.predicted)

    def __getitem__(self, rows: Tensor | slice) -> Pairs:
        return Pairs(self.predicted[rows], self.rival[rows])

    def repeat_interleave(self, k: int) -> Pairs:
        """Each pair `k` times: the pairs of `k` probes a query."""
        return Pairs(self.predicted.repeat_interleave(k), self.rival.repeat_interleave(k))

    def margin(self, logits: Tensor) -> Tensor:
        """Predicted class's logit minus the rival's. logits: (M, C) -> (M,), differentiable."""
        pick = lambda column: logits.gather(1, column.to(logits.device)[:, None])[:, 0]  # noqa: E731
        return pick(self.predicted) - pick(self.rival)

    def lead(self, logits: Tensor) -> Tensor:
        """Predicted class's logit minus the best other one: below 0 where the prediction has flipped. -> (M,)."""
        own = self.predicted.to(logits.device)[:, None]
        return logits.gather(1, own)[:, 0] - logits.scatter(1, own, -torch.inf).amax(1)

    @classmethod
    def join(cls, *parts: Pairs) -> Pairs:
        """The pairs of several sets of queries, one after the other."""
        return cls(torch.cat([p.predicted for p in parts]), torch.cat([p.rival for p in parts]))

    @classmethod
    def of(cls, logits: Tensor) -> Pairs:
        """The two largest logits of each row. logits: (M, C)."""
        top = logits.topk(2, dim=1).indices
        return cls(top[:, 0], top[:, 1])


@dataclass(frozen=True)
class Queries:
    """Inputs whose predictions are explained."""

    ids: Tensor  # shape: (M,) positions in the test data
    inputs: Tensor  # shape: (M, *input), raw
    targets: Tensor  # shape: (M,) true classes
    logits: Tensor  # shape: (M, C)
    pairs: Pairs

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Tensor | slice) -> Queries:
        return Queries(self.ids[rows], self.inputs[rows], self.targets[rows], self.logits[rows], self.pairs[rows])

    @property
    def margin(self) -> Tensor:
        """Shape (M,): logits, at least 0."""
        return self.pairs.margin(self.logits)

    @property
    def right(self) -> Tensor:
        """Shape (M,), bool: the clean prediction is right."""
        return self.pairs.predicted == self.targets


@dataclass(frozen=True)
class Groups:
    """A partition of the training examples, finer than or equal to their classes."""

    labels: Tensor  # shape: (N,) int64, the group of each training example
    classes: Tensor  # shape: (G,) int64, the class of each group
    names: tuple[str, ...]  # G names

    def __len__(self) -> int:
        return len(self.names)

    def by_class(self, mass: Tensor, classes: int) -> Tensor:
        """Sum mass over the groups of each class. mass: (..., G) -> (..., classes)."""
        out = mass.new_zeros(*mass.shape[:-1], classes)
        return out.index_add(-1, self.classes, mass)


@dataclass(frozen=True)
class Ledger:
    """The account of M outputs: start + contributions + decay + buffers + unexplained + residual = output.

    Every row is in logits and has shape (M,), except `contributions` of shape (M, N).
    """

    start: Tensor
    contributions: Tensor
    decay: Tensor
    buffers: Tensor
    unexplained: Tensor
    residual: Tensor
    output: Tensor

    ROWS = ("start", "examples", "decay", "buffers", "unexplained", "residual")

    @classmethod
    def join(cls, *parts: Ledger) -> Ledger:
        """The accounts of several sets of outputs, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)})

    def row(self, name: str) -> Tensor:
        """One row of the ledger by name, shape (M,); `examples` is the sum of the contributions."""
        return self.contributions.double().sum(1) if name == "examples" else getattr(self, name)

    def total(self) -> Tensor:
        """Sum of all rows, shape (M,); equals `output`."""
        return torch.stack([self.row(name).double() for name in self.ROWS]).sum(0)

    @property
    def relative_residual(self) -> float:
        """Mean absolute residual over the queries / mean absolute learned change."""
        return self._relative(self.residual)

    @property
    def relative_unexplained(self) -> float:
        """The same of what the recorded gradients do not account for."""
        return self._relative(self.unexplained)

    def _relative(self, row: Tensor) -> float:
        return (row.abs().mean() / (self.output - self.start).abs().mean()).item()

    @property
    def cancellation(self) -> Tensor:
        """Gross / |net| over the examples' contributions, shape (M,)."""
        gross, net = self.contributions.double().abs().sum(1), self.contributions.double().sum(1)
        return gross / net.abs().clamp_min(torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class ShiftMap:
    """Mass by group at M queries and at their probes: what leaves and what arrives.

    `families` names F probe families; severity k of family f is `severities[f, k]` in the family's unit,
    and `reference[f]` is the severity at which failure is predicted. The margin is that of the fixed pair, which
    the mass accounts for; the lead is over the best other class at the probe, and flips with the prediction.
    """

    families: tuple[str, ...]
    units: tuple[str, ...]
    severities: Tensor  # shape: (F, K), small: at most a quarter of the reference
    reference: Tensor  # shape: (F,)
    mass: Tensor  # shape: (M, G), at the clean query
    probed: Tensor  # shape: (M, F, K, G), at its probes
    rival: Tensor  # shape: (M,) int64, the other class of the fixed pair
    margin: Tensor  # shape: (M,), output at the clean query, where it is the lead as well
    probed_margin: Tensor  # shape: (M, F, K)
    probed_lead: Tensor  # shape: (M, F, K)

    def __getitem__(self, rows: Tensor | slice) -> ShiftMap:
        """The map of some of the queries."""
        fields = ("mass", "probed", "rival", "margin", "probed_margin", "probed_lead")
        return replace(self, **{name: getattr(self, name)[rows] for name in fields})

    @property
    def shift(self) -> Tensor:
        """Change of mass from a query to its probe, shape (M, F, K, G), logits."""
        return self.probed - self.mass[:, None, None, :]

    @property
    def rate(self) -> Tensor:
        """Shift per unit of severity at the smallest severity, shape (M, F, G), logits per unit."""
        return self.shift[:, :, 0] / self.severities[None, :, 0, None]


@dataclass(frozen=True)
class AttackRows:
    """What one attack found for M inputs; `adversarials` repeat the input where nothing was found."""

    attack: str
    norm: Norm
    kind: Literal["minimal", "fixed"]
    adversarials: Tensor  # shape: (M, *input)
    distance: Tensor  # shape: (M,), infinite where the attack failed
    success: Tensor  # shape: (M,) bool
    new_class: Tensor  # shape: (M,) int64, the class predicted at the adversarial
    evaluations: Tensor  # shape: (M,) int64 forward-and-backward passes
    epsilon: float | None = None
    backwards: Tensor | None = None  # shape: (M,) int64, those evaluations that had a backward pass
    outcome: Tensor | None = None  # shape: (M,) int64, position in `OUTCOMES`

"""The subject: the classifier under audit, its data, its bounds and its path.

Data and bounds live in the space of *raw inputs*; the normalization is applied inside `Subject.forward`,
once, and nowhere else. Everything a user hands over is checked here, at the door, and trusted inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brittle.augmentation import Augment
from brittle.blame import described
from brittle.bounds import Bounds, ends
from brittle.checks import (
    check_bounds,
    check_labels,
    check_logits,
    check_loss,
    check_model,
    check_shape,
    checked_bounds,
    checked_checkpoints,
    checked_groups,
    checked_scale,
    unwrapped,
)
from brittle.data import Examples
from brittle.errors import DataError, ModelError, SubjectError

Loss = Callable[..., Tensor]
"""(logits, targets) -> scalar, as in the training loop: the mean over the batch, or any weighting of it. Where the
recorder was given weights, (logits, targets, weights) -> scalar; the third must then have a default."""

Forward = Callable[[nn.Module, Tensor], Any]
"""(model, normalized inputs) -> whatever the model returns."""

Retrain = Callable[[Examples, int], nn.Module]
"""(training examples, seed) -> a model trained on them the way the audited one was."""

OUTPUT_KEYS = ("logits", "out", "output", "scores")


@dataclass(frozen=True)
class Subject:
    """A classifier under audit. Make one in a factory and name it as `file.py:make`.

    Args:
        model: returns (B, C) logits, one logit (B,) or (B, 1) for two classes, or a dict or tuple that
            holds them. Must be in evaluation mode.
        train: the examples it was trained on, in the order their ids count: `Examples`, (inputs, targets)
            as tensors or numpy arrays, or a map-style data set whose items are tuples or dicts.
        test: labelled examples that it was not trained on, in any of the same forms.
        bounds: smallest and largest value of a raw input, numbers or one value a channel (a feature).
        loss: the training loss, (logits, targets) -> scalar; by default cross entropy, and binary cross
            entropy for a single logit (which gets float targets in the logits' shape).
        class_names: one name a class; numbers where left out.
        normalize: (mean, std), numbers or one value a channel; applied inside, to raw inputs.
        path: the folder that a `Recorder` wrote, or None: then the audit makes local statements only.
        checkpoints: [(weights, learning rate), ...] in the order of training, where no path was recorded: files that
            hold a state dict, state dicts or modules. The account is then coarse, and says by how much.
        pool: further labelled examples from which suggestions are drawn.
        ids: names of the training examples, shown in the report.
        groups: one label a training example (text or number: a source, a writer, a batch of collecting), whose mass the
            audit follows within each class; by default it makes clusters.
        retrain: (examples, seed) -> a freshly trained model; lets suggestions be checked.
        forward: (model, normalized inputs) -> output, where calling the model is not `model(x)`.
        augment: (raw input of one example, id, epoch) -> the raw input that training saw, where training augmented
            its inputs and the recorder did not store them; see `brittle.Augmentation`.
        name: how the report calls it.

    Raises:
        DataError, ModelError, NotFiniteError: with the rule, the value found and the remedy.
    """

    model: nn.Module
    train: Examples
    test: Examples
    bounds: Bounds = (0.0, 1.0)
    loss: Loss | None = None
    class_names: tuple[str, ...] = ()
    normalize: tuple[Any, Any] | None = None
    path: Path | None = None
    checkpoints: Sequence[tuple[Any, float]] | None = None
    pool: Examples | None = None
    ids: Sequence[str] | None = None
    groups: Sequence[Any] | None = None
    retrain: Retrain | None = None
    forward: Forward | None = None
    augment: Augment | None = None
    name: str = ""
    binary: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        put = lambda key, value: object.__setattr__(self, key, value)  # noqa: E731
        put("train", Examples.of(self.train, "train", self.ids))
        put("test", Examples.of(self.test, "test"))
        put("pool", None if self.pool is None else Examples.of(self.pool, "pool"))
        put("path", None if self.path is None else Path(self.path))
        put("checkpoints", checked_checkpoints(self.checkpoints, recorded=self.path is not None))
        put("groups", None if self.groups is None else checked_groups(self.groups, len(self.train)))
        put("bounds", checked_bounds(self.bounds, self.train.inputs.shape[1:]))
        put("model", unwrapped(self.model))
        put("name", self.name or type(self.model).__name__)
        check_model(self.model)
        for what, part in self._parts():
            check_shape(part.inputs, self.train.inputs.shape[1:], what)
            check_bounds(part.inputs, self.bounds, what, normalized=self.normalize is not None)
        logits = self._probe_model()
        put("binary", logits.dim() == 1 or logits.shape[1] == 1)
        classes = 2 if self.binary else logits.shape[1]
        put("class_names", tuple(map(str, self.class_names)) or tuple(map(str, range(classes))))
        if len(self.class_names) != classes:
            raise DataError(
                f"class_names must hold one name a class, found {len(self.class_names)} names for the model's "
                f"{classes} classes; name each of them, in the model's order"
            )
        for what, part in self._parts():
            check_labels(part.targets, classes, what)
        put("loss", self.loss or (_binary_cross_entropy if self.binary else F.cross_entropy))
        check_loss(self._probe_loss(logits))
        self._check_normalized_once()

    @property
    def classes(self) -> int:
        """Number of classes (two for a single logit)."""
        return len(self.class_names)

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest value that any channel may take."""
        return ends(self.bounds)

    @cached_property
    def scale(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation, shaped to broadcast over one input; None without normalization."""
        if self.normalize is None:
            return None
        return checked_scale(self.normalize, self.train.inputs.shape[1:])

    def run(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Logits of `model` at raw `inputs` (B, *shape): normalized here, once. Shape (B, C), (B, 1) or (B,).

        Raises `ModelError`, naming the cause, for whatever the user's model raises.
        """
        if self.scale is not None:
            mean, std = (v.to(inputs) for v in self.scale)
            inputs = (inputs - mean) / std
        try:
            output = self.forward(model, inputs) if self.forward else model(inputs)
        except SubjectError:
            raise
        except Exception as error:
            kind = str(inputs.dtype).removeprefix("torch.")
            raise ModelError(
                f"the model must accept a {kind} batch of shape {tuple(inputs.shape)}, it raised {described(error)}; "
                "correct the model, or the inputs' shape or type"
            ) from error
        return _logits(output)

    def class_logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Logits in the form (B, C), a single logit z as (0, z)."""
        logits = self.run(model, inputs)
        if not self.binary:
            return logits
        logits = logits.reshape(-1)
        return torch.stack([torch.zeros_like(logits), logits], dim=1)

    def loss_of(self, logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """The training loss of a batch (scalar); targets become floats for a single logit."""
        if self.binary:
            targets = targets.reshape(logits.shape).to(logits.dtype)
        assert self.loss is not None
        return self.loss(logits, targets) if weights is None else self.loss(logits, targets, weights)

    @torch.no_grad()
    def predict(self, inputs: Tensor, batch: int = 1024, model: nn.Module | None = None) -> Tensor:
        """Logits (B, C) of the audited model at raw inputs, in batches, without gradients."""
        if len(inputs) == 0:
            return torch.zeros(0, self.classes)
        model = self.model if model is None else model
        device = next(model.parameters()).device
        parts = [self.class_logits(model, part.to(device)).cpu() for part in inputs.split(batch)]
        logits = torch.cat(parts)
        check_logits(logits, len(inputs))
        return logits

    def _parts(self) -> list[tuple[str, Examples]]:
        parts = [("train", self.train), ("test", self.test), ("pool", self.pool)]
        return [(what, part) for what, part in parts if part is not None]

    @torch.no_grad()
    def _probe_model(self) -> Tensor:
        """Checked logits of the first training examples."""
        inputs = self.train.inputs[:8]
        logits = self.run(self.model, inputs.to(next(self.model.parameters()).device)).cpu()
        check_logits(logits, len(inputs))
        return logits

    def _probe_loss(self, logits: Tensor) -> Any:
        """The loss of the first training examples, whatever it raises named as the loss's."""
        try:
            return self.loss_of(logits, self.train.targets[: len(logits)])
        except Exception as error:
            raise DataError(
                f"the loss must accept (logits, targets) of shapes {tuple(logits.shape)} and ({len(logits)},), "
                f"it raised {described(error)}; pass the loss that the model was trained with"
            ) from error

    def _check_normalized_once(self) -> None:
        """A model that does far better without the normalization applies it already, or its data had it."""
        if self.normalize is None:
            return
        part = self.train[torch.linspace(0, len(self.train) - 1, min(len(self.train), 500)).long()]
        once, bare = (s._accuracy(part) for s in (self, replace_quietly(self, normalize=None)))
        if bare > once + 0.2:
            raise DataError(
                f"inputs must be normalized once, found a training accuracy of {once:.0%} with normalize= and "
                f"{bare:.0%} without; leave normalize= out, or take it out of the model or the data"
            )

    @torch.no_grad()
    def _accuracy(self, part: Examples) -> float:
        logits = self.class_logits(self.model, part.inputs.to(next(self.model.parameters()).device)).cpu()
        return (logits.argmax(1) == part.targets).double().mean().item()


def replace_quietly(subject: Subject, **changes: Any) -> Subject:
    """A copy of a checked subject with some fields changed and the checks at the door not repeated."""
    copy = object.__new__(Subject)
    copy.__dict__.update({k: v for k, v in subject.__dict__.items() if k != "scale"} | changes)
    return copy


def _binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets)


def _logits(output: Any) -> Tensor:
    """The logits inside what a model returned: a tensor, a tuple's first tensor, or a dict's `logits`."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for key in OUTPUT_KEYS:
            if isinstance(output.get(key), Tensor):
                return output[key]
        raise ModelError(
            f"a model that returns a dict must name its logits one of {OUTPUT_KEYS}, found {list(output)}; "
            "pass forward= to pick them"
        )
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise ModelError(
        f"the model must return a tensor, a dict or a tuple of logits, found {type(output).__name__}; "
        "pass forward= to pick them"
    )

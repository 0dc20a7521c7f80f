"""The checks at the door: what a user hands over is looked at once, here, and trusted inside.

Each check raises an error of `brittle.errors` in one line: the rule, the value found, the remedy.
`what` is the word for the part of the data that the message opens with: train, test or pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from brittle.blame import described
from brittle.bounds import Bounds
from brittle.errors import DataError, ModelError, NotFiniteError

CHECKED = 4096
"""Inputs that are looked at together: a check for finite numbers takes copies of them."""


def as_numbers(values: Any, what: str) -> Tensor:
    """A tensor of the values. Raises `DataError` where they are not numbers."""
    try:
        return values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{what} must be numbers, found {described(error)}; pass a tensor or a numeric array"
        ) from error


def checked_inputs(inputs: Tensor, what: str) -> Tensor:
    """Inputs (N, *shape) on the CPU in the default dtype: floating point, finite and not empty."""
    if inputs.dim() < 2:
        raise DataError(
            f"{what} inputs must have shape (N, *shape), found {tuple(inputs.shape)}; put the examples in rows"
        )
    if inputs.numel() == 0:
        raise DataError(
            f"{what} must not be empty, found inputs of shape {tuple(inputs.shape)}; pass at least one labelled example"
        )
    if not inputs.is_floating_point():
        raise DataError(
            f"{what} inputs must be floating point, found {inputs.dtype}; convert them to the range the model expects, "
            "for bytes inputs.float() / 255"
        )
    if not all(bool(part.isfinite().all()) for part in inputs.split(CHECKED)):
        bad = (~inputs.isfinite()).flatten(1).any(1)
        raise NotFiniteError(
            f"{what} inputs must be finite, found NaN or infinity in {int(bad.sum())} of {len(inputs)}, "
            f"first at {int(bad.nonzero()[0])}; drop or mend them"
        )
    return inputs.detach().cpu().to(torch.get_default_dtype())


def checked_targets(targets: Tensor, count: int, what: str) -> Tensor:
    """Labels (N,) int64 on the CPU: one whole number an input."""
    targets = targets.reshape(-1) if targets.dim() == 2 and targets.shape[1] == 1 else targets
    if targets.shape != (count,):
        raise DataError(
            f"{what} needs one label an input, found {count} inputs and labels of shape {tuple(targets.shape)}; "
            "pass class numbers of shape (N,), not one-hot rows"
        )
    if targets.is_floating_point() and not (targets == targets.round()).all():
        raise DataError(
            f"{what} labels must be whole numbers from 0, found {targets[targets != targets.round()][0].item():g}; "
            "pass class numbers"
        )
    return targets.detach().cpu().to(torch.int64)


def checked_names(names: Sequence[str] | None, count: int, what: str) -> tuple[str, ...]:
    """One name an example, or none at all."""
    if names is not None and len(names) != count:
        raise DataError(
            f"ids must hold one name an example, found {len(names)} names for {count} {what} examples; "
            "pass them in the order of the examples"
        )
    return tuple(map(str, names)) if names is not None else ()


def checked_groups(labels: Any, count: int) -> tuple[str, ...]:
    """One label a training example, as text."""
    if isinstance(labels, (str, bytes)) or not hasattr(labels, "__len__") or len(labels) != count:
        found = f"{len(labels)} labels" if hasattr(labels, "__len__") else type(labels).__name__
        raise DataError(
            f"groups must hold one label a training example, found {found} for {count} examples; pass them in the "
            "order of the examples"
        )
    return tuple(map(str, labels.tolist() if hasattr(labels, "tolist") else labels))


def checked_bounds(bounds: Any, shape: torch.Size) -> Bounds:
    """The smallest and the largest value of a raw input of `shape`: two numbers, or tensors that broadcast over one.

    One value a channel is the first axis.
    """
    found = _by_channel(bounds, shape)
    if found is None or not (all(b.isfinite().all() for b in found) and (found[0] < found[1]).all()):
        raise DataError(
            f"bounds must be two finite numbers (low, high) with low < high, or one value a channel for each, found "
            f"{bounds!r}; pass the smallest and the largest value a raw input may take"
        )
    low, high = found
    if low.dim() == high.dim() == 0:
        return low.item(), high.item()
    return low.to(torch.get_default_dtype()), high.to(torch.get_default_dtype())


def checked_checkpoints(checkpoints: Any, recorded: bool) -> tuple[tuple[Any, float], ...] | None:
    """Pairs of weights and a learning rate above 0, or None. recorded: whether a path is given as well."""
    if checkpoints is None:
        return None
    if recorded:
        raise DataError("a subject has path= or checkpoints=, found both; keep path=, it knows every step")
    try:
        pairs = tuple((weights, float(lr)) for weights, lr in checkpoints)
    except (TypeError, ValueError):
        pairs = ()
    if not pairs or not all(0 < lr < np.inf for _, lr in pairs):
        raise DataError(
            f"checkpoints must be pairs (weights, learning rate), rates above 0, found {[lr for _, lr in pairs]}; pass "
            "[(state_dict or file, 0.1), ...] in the order of training"
        )
    return pairs


def checked_scale(normalize: Any, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation that broadcast over one input of `shape`; one value a channel is the first axis."""
    found = _by_channel(normalize, shape)
    if found is None:
        raise DataError(
            f"normalize must be (mean, std) that fit inputs of shape {tuple(shape)}, found {normalize}; "
            "pass two numbers or one value a channel"
        )
    mean, std = (v.to(torch.get_default_dtype()) for v in found)
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise DataError(
            f"normalize needs finite means and standard deviations above 0, found {mean.flatten().tolist()} and "
            f"{std.flatten().tolist()}; pass those of the training data"
        )
    return mean, std


def _by_channel(values: Any, shape: torch.Size) -> tuple[Tensor, Tensor] | None:
    """Two numbers, or one value a channel for each, that broadcast over one input, in float64; None if they do not."""
    try:
        first, second = (torch.as_tensor(v, dtype=torch.float64) for v in values)
        first, second = (v.reshape(-1, *[1] * (len(shape) - 1)) if v.dim() == 1 else v for v in (first, second))
        fits = all(torch.broadcast_shapes(v.shape, shape) == shape for v in (first, second))
    except (TypeError, ValueError, RuntimeError):
        return None
    return (first, second) if fits else None


def check_shape(inputs: Tensor, shape: torch.Size, what: str) -> None:
    """All parts of the data hold inputs of the training data's shape."""
    if inputs.shape[1:] != shape:
        raise DataError(
            f"{what} inputs must have the training inputs' shape {tuple(shape)}, found {tuple(inputs.shape[1:])}; "
            "prepare both in the same way"
        )


def check_bounds(inputs: Tensor, bounds: Bounds, what: str, normalized: bool) -> None:
    """Raw inputs lie in the bounds. normalized: whether the subject normalizes them inside."""
    low, high = (torch.as_tensor(b, dtype=inputs.dtype).expand(inputs.shape[1:]) for b in bounds)
    least, most = inputs.amin(0), inputs.amax(0)
    slack = 1e-6 * (high - low)
    outside = (least < low - slack) | (most > high + slack)
    if outside.any():
        low, high, least, most = (v[outside] for v in (low, high, least, most))
        hint = "pass raw inputs, they are normalized inside" if normalized else "correct bounds="
        raise DataError(
            f"{what} inputs must lie in the bounds [{low.min():g}, {high.max():g}], "
            f"found [{least.min():.4g}, {most.max():.4g}]; {hint}"
        )


def check_labels(targets: Tensor, classes: int, what: str) -> None:
    """Labels lie in 0..classes-1."""
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"{what} labels must lie in 0..{classes - 1}, found {low if low < 0 else high}; number the classes from 0 "
            f"in the order of the model's {classes} classes"
        )


WRAPPERS = {
    "AveragedModel": "module",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
"""Torch's modules around a model, and where they keep it."""


def unwrapped(model: Any) -> Any:
    """The model inside what torch wraps around it."""
    while type(model).__name__ in WRAPPERS:
        model = getattr(model, WRAPPERS[type(model).__name__])
    return model


def check_model(model: nn.Module) -> None:
    """A module in evaluation mode, with parameters, all of them finite, buffers as well."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, found {type(model).__name__}; pass the module itself")
    if not any(True for _ in model.parameters()):
        raise ModelError("the model must have parameters, found none; the path kernel lives on trained weights")
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if not value.isfinite().all():
            raise NotFiniteError(f"weights must be finite, found NaN or infinity in {name}; the training diverged")
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        where = f" ({training[0]})" if training[0] else ""
        raise ModelError(f"the model must be in evaluation mode, found it in training mode{where}; call model.eval()")


def check_logits(logits: Tensor, count: int) -> None:
    """Finite logits of shape (B, C), (B, 1) or (B,) for a batch of `count` inputs."""
    if logits.dim() not in (1, 2) or len(logits) != count or logits.numel() == 0:
        raise ModelError(
            f"the model must return logits of shape ({count}, classes) for {count} inputs, "
            f"found {tuple(logits.shape)}; pass forward= to pick them"
        )
    if not logits.is_floating_point():
        raise ModelError(
            f"the model must return floating-point logits, found {logits.dtype}; return them before argmax or rounding"
        )
    if not logits.isfinite().all():
        bad = int((~logits.isfinite()).reshape(count, -1).any(1).sum())
        raise NotFiniteError(
            f"logits must be finite, found NaN or infinity at {bad} of {count} inputs; "
            "look for overflow in the model, or for a division by zero in the normalization"
        )


def check_loss(loss: Any) -> None:
    """One finite number for a batch."""
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise DataError(
            f"the loss must return one number for a batch, found {found}; take the mean, as the training loop does"
        )
    if not loss.isfinite():
        raise NotFiniteError(
            f"the loss must be finite, found {loss.item()} on the first training examples; "
            "pass the loss that the model was trained with"
        )

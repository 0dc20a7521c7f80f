"""What a training may hold, by name: all that a replay of its steps could not repeat is refused before it starts."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrizations import _SpectralNorm

from brittle.errors import UnsupportedError

REMEDY = "or audit the trained model without a path"


def check_training(model: nn.Module) -> None:
    """Refuse modules whose steps cannot be replayed: they draw random numbers, or keep a count that is not recorded.

    Raises `UnsupportedError` that names the module.
    """
    for name, module in model.named_modules():
        rate = _dropout(module)
        if rate > 0:
            raise UnsupportedError(
                f"dropout in training cannot be accounted for yet, {name} has p={rate:g}; set it to 0, {REMEDY}"
            )
        if isinstance(module, nn.RReLU) or type(module).__name__ == "StochasticDepth":
            raise UnsupportedError(
                f"modules that draw random numbers cannot be replayed, {name} is {type(module).__name__}; take it out, "
                f"{REMEDY}"
            )
        if isinstance(module, _NormBase) and module.track_running_stats and module.momentum is None:
            raise UnsupportedError(
                f"running statistics must move by a fixed momentum, {name} has momentum=None; set it to 0.1, {REMEDY}"
            )
        if isinstance(module, _SpectralNorm):
            raise UnsupportedError(
                f"weights may not change in the forward pass, spectral normalization does it in {name}; take it out, "
                f"{REMEDY}"
            )


def check_modes(model: nn.Module) -> None:
    """Refuse a step during which a layer's running statistics stood still: replay runs all layers in training mode."""
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and module.track_running_stats and not module.training:
            raise UnsupportedError(
                f"normalization must be in training mode in every step, {name} is in evaluation mode; call "
                f"model.train() before the step, {REMEDY}"
            )


def _dropout(module: nn.Module) -> float:
    """The probability with which a module drops out values in training."""
    if isinstance(module, _DropoutNd):
        return module.p
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return float(module.dropout)
    return 0.0

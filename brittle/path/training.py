"""What a training may hold, by name: all that a replay of its steps could not repeat is refused before it starts."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm

from brittle.checks import unwrapped
from brittle.errors import UnsupportedError

REMEDY = "or audit the trained model without a path"


def bare(model: nn.Module) -> nn.Module:
    """The model inside what torch wraps around it. Raises `UnsupportedError` for one whose weights are spread out."""
    kinds = {type(module).__name__ for module in model.modules()}
    if any("FSDP" in kind or "FullySharded" in kind for kind in kinds) or _sharded(model):
        raise UnsupportedError(
            "a model under FSDP cannot be recorded, each process holds a part of the weights only; train it with "
            f"DistributedDataParallel or in one process, {REMEDY}"
        )
    return unwrapped(model)


def check_training(model: nn.Module) -> None:
    """Refuse modules whose steps cannot be replayed. Raises `UnsupportedError` that names the module."""
    for name, module in model.named_modules():
        if isinstance(module, _SpectralNorm):
            raise UnsupportedError(
                f"weights may not change in the forward pass, spectral normalization does it in {name}; take it out, "
                f"{REMEDY}"
            )


def counts_batches(model: nn.Module) -> bool:
    """Whether running statistics move by a count that is no part of the state (momentum=None)."""
    return any(isinstance(m, _NormBase) and m.track_running_stats and m.momentum is None for m in model.modules())


def _sharded(model: nn.Module) -> bool:
    return any(type(p).__name__ == "DTensor" for p in model.parameters())

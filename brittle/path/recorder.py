"""Record a training run: three lines in a plain PyTorch loop.

    recorder = Recorder(model, optimizer, "runs/path")
    ...
        loss.backward()
        recorder.batch(ids)          # positions of this batch's examples in the training data
        optimizer.step()
    ...
    recorder.close()

The recorder hooks the optimizer: before each step it stores the weights and the optimizer's buffers, and it
notes the examples, learning rates, settings and the factor by which gradients were clipped. States are kept
every step while the disk budget allows, then every second, fourth, ... step; what lies between is replayed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from brittle.errors import DataError, NotFiniteError, UnsupportedError
from brittle.path.flat import layout, state_of
from brittle.path.rules import BUFFERS, SETTINGS, check_optimizer
from brittle.path.store import Snapshot, Step, finished, thin_blocks, write_block, write_end, write_header

BLOCK_BYTES = 64 << 20
BLOCK_SECONDS = 30.0
CLIP_TOLERANCE = 1e-4
"""Relative spread of the parameters' clipping factors up to which they count as one factor."""


class Recorder:
    """Writes the path of a training run into a folder, crash-safe.

    Args:
        model: the model in training, before its first step.
        optimizer: torch's SGD, Adam or AdamW over its parameters.
        out: an empty or absent folder.
        budget: bytes of disk that the states may take.

    Raises:
        UnsupportedError: for what the path kernel cannot account for, by name: another optimizer, dropout,
            gradient accumulation, clipping by value, parameters without a gradient.
        NotFiniteError: where weights stop being finite.
        DiskError: where the disk is full.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, out: str | Path, budget: int = 2 << 30
    ) -> None:
        self.root, self.budget, self.every, self.steps = Path(out), budget, 1, 0
        if finished(self.root):
            raise DataError(f"{self.root} already holds a finished path; name another folder or delete it")
        self._model, self._optimizer, self._kind = model, optimizer, check_optimizer(optimizer)
        check_training(model)
        for stale in (self.root / "blocks").glob("*"):  # what an interrupted training left behind
            stale.unlink()
        self._slots = layout(model)
        self._parameters = dict(model.named_parameters())
        self._owner = self._find_owners()
        write_header(self.root, self._slots, self._kind, self._owner)
        self._raw: dict[str, float] = {}
        self._ids: Tensor | None = None
        self._steps: list[Step] = []
        self._snapshots: list[Snapshot] = []
        self._written, self._since = 0, time.monotonic()
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            *(
                p.register_post_accumulate_grad_hook(self._note_raw(name))
                for name, p in self._parameters.items()
                if p.requires_grad
            ),
        ]

    def batch(self, ids: Tensor | Sequence[int]) -> None:
        """Say which training examples the coming step was computed from: positions in the training data."""
        if self._ids is not None:
            raise UnsupportedError(
                "gradient accumulation cannot be accounted for yet: batch() was called twice before optimizer.step()"
            )
        self._ids = torch.as_tensor(ids, dtype=torch.int64).detach().cpu().reshape(-1).clone()
        if len(self._ids) == 0 or int(self._ids.min()) < 0:
            raise DataError("batch() needs the positions of the batch's examples, counted from 0")

    def close(self) -> None:
        """Store the final weights and finish the path. Call it once, after the last step."""
        for hook in self._hooks:
            hook.remove()
        if not finished(self.root):
            self._snapshots.append(self._snapshot())
            self._flush()
            write_end(self.root, self.steps)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def _note_raw(self, name: str) -> Any:
        def note(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._raw[name] = parameter.grad.norm().item()

        return note

    def _before_step(self, *_: Any) -> None:
        if self._ids is None:
            raise DataError("call recorder.batch(ids) before every optimizer.step(); no ids were given for this step")
        if self.steps % self.every == 0 or not self._snapshots:
            self._snapshots.append(self._snapshot())
        groups = self._optimizer.param_groups
        settings = tuple({key: _plain(g[key]) for key in SETTINGS[self._kind] if key in g} for g in groups)
        self._steps.append(Step(self._ids, tuple(float(g["lr"]) for g in groups), settings, self._clip_factor()))
        self._ids = None
        self._raw.clear()

    def _after_step(self, *_: Any) -> None:
        self.steps += 1
        size = sum(s.nbytes for s in self._snapshots)
        if size >= min(BLOCK_BYTES, self.budget / 8) or time.monotonic() - self._since > BLOCK_SECONDS:
            self._flush()

    def _snapshot(self) -> Snapshot:
        state = state_of(self._model).cpu()
        if not state.isfinite().all():
            raise NotFiniteError(f"weights must be finite, found NaN or infinity before step {self.steps}: it diverged")
        return Snapshot(self.steps, state, {name: self._buffer(name) for name in BUFFERS[self._kind]})

    def _buffer(self, name: str) -> Tensor:
        """One of the optimizer's buffers over all parameters, zero where it has not begun. Shape (parameters,)."""
        held = [(self._optimizer.state.get(p, {}).get(name), p) for p in self._parameters.values()]
        return torch.cat([(torch.zeros_like(p) if b is None else b).detach().reshape(-1).cpu() for b, p in held])

    def _clip_factor(self) -> float:
        """By how much gradients shrank between backward and step: one factor for all, or it is refused."""
        factors = []
        for name, p in self._parameters.items():
            if not p.requires_grad:
                continue
            if p.grad is None or name not in self._raw:
                raise UnsupportedError(f"every trained parameter needs a gradient in every step, {name} has none")
            if p.grad.is_sparse:
                raise UnsupportedError(f"sparse gradients cannot be accounted for, found one in {name}")
            if self._raw[name] > 0:
                factors.append(p.grad.norm().item() / self._raw[name])
        if not factors:
            return 1.0
        middle = sorted(factors)[len(factors) // 2]
        if max(factors) - min(factors) > CLIP_TOLERANCE * max(abs(middle), 1e-12):
            raise UnsupportedError(
                "gradients may only be scaled by one factor between backward and step (clipping by norm); found "
                f"factors from {min(factors):.4g} to {max(factors):.4g}"
            )
        return 1.0 if abs(middle - 1) < 1e-6 else middle

    def _find_owners(self) -> list[int]:
        """The parameter group of each slot, -1 where the optimizer has none or the parameter is frozen."""
        group_of = {id(p): k for k, g in enumerate(self._optimizer.param_groups) for p in g["params"]}
        known = {id(p) for p in self._parameters.values()}
        if set(group_of) - known:
            raise UnsupportedError("the optimizer must move the model's own parameters only, it holds others besides")
        owners = []
        for slot in self._slots:
            p = None if slot.buffer else self._parameters[slot.name]
            owners.append(group_of.get(id(p), -1) if p is not None and p.requires_grad else -1)
        return owners

    def _flush(self) -> None:
        """Write the block; halve the density of stored states once the budget is spent."""
        first = self.steps - len(self._steps)
        if not self._steps and self.steps:
            first = self.steps
        write_block(self.root, first, self._steps, self._snapshots)
        self._written += sum(s.nbytes for s in self._snapshots)
        self._steps, self._snapshots, self._since = [], [], time.monotonic()
        while self._written > self.budget / 2 and self.every < 1 << 20:
            self.every *= 2
            thin_blocks(self.root, self.every)
            self._written //= 2


def check_training(model: nn.Module) -> None:
    """Refuse by name what cannot be replayed: dropout draws random numbers that are not recorded."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise UnsupportedError(
                f"dropout in training cannot be accounted for yet: {name} has p={module.p:g}; set it to 0 or audit "
                "the trained model without a path"
            )


def _plain(value: Any) -> Any:
    return [float(v) for v in value] if isinstance(value, (tuple, list)) else value if value is None else float(value)

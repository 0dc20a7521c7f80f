"""Record a training run: three lines in a plain PyTorch loop.

    recorder = Recorder(model, optimizer, "runs/path")
    ...
        loss.backward()
        recorder.batch(ids)          # positions of this batch's examples in the training data
        optimizer.step()
    ...
    recorder.close()

The recorder hooks the optimizer: before each step it stores the weights and the optimizer's buffers, and it
notes the examples, learning rates, settings and the factor by which gradients were clipped. The running
statistics that belong to a step's weights are those that the step before it left behind: the step's own forward
pass has moved them on by the time the optimizer is called. States are kept every step while the disk budget
allows, then every second, fourth, ... step; what lies between is replayed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from brittle.errors import DataError, NotFiniteError, UnsupportedError
from brittle.path.flat import layout, parameters_of, statistics_of
from brittle.path.rules import BUFFERS, SETTINGS, check_optimizer, check_settings
from brittle.path.store import Snapshot, Step, finished, thin_blocks, write_block, write_end, write_header
from brittle.path.training import check_modes, check_training
from brittle.path.watch import GradientWatch

BLOCK_BYTES = 64 << 20
BLOCK_SECONDS = 30.0
BLOCKS_IN_BUDGET = 8
"""A block takes at most this part of the budget, so that the budget holds while the last one is written."""


class Recorder:
    """Writes the path of a training run into a folder, crash-safe.

    Args:
        model: the model in training, before its first step.
        optimizer: torch's SGD, Adam or AdamW over its parameters, before its first step.
        out: an empty or absent folder.
        budget: bytes of disk that the states may take.

    Raises:
        UnsupportedError: for what the path kernel cannot account for, by name: another optimizer, dropout,
            gradient accumulation, clipping by value, parameters without a gradient, layers frozen in mid-training.
        NotFiniteError: where weights or gradients stop being finite.
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
        self._owner, self._settings = self._owners(), self._settings_now()
        write_header(self.root, self._slots, self._kind, self._owner)
        self._ids: Tensor | None = None
        self._statistics = statistics_of(model).cpu()
        self._steps: list[Step] = []
        self._snapshots: list[Snapshot] = []
        self._pending, self._written, self._since = 0, 0, time.monotonic()  # bytes in memory, bytes on disk
        moved = {slot.name for slot, owner in zip(self._slots, self._owner, strict=True) if owner >= 0}
        self._watch = GradientWatch({name: p for name, p in self._parameters.items() if name in moved})
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def batch(self, ids: Tensor | Sequence[int]) -> None:
        """Say which training examples the coming step was computed from: positions in the training data."""
        if self._ids is not None:
            raise UnsupportedError(
                "gradient accumulation cannot be accounted for yet: batch() was called twice before optimizer.step(); "
                "take one step a batch"
            )
        self._ids = torch.as_tensor(ids, dtype=torch.int64).detach().cpu().reshape(-1).clone()
        if len(self._ids) == 0 or int(self._ids.min()) < 0:
            raise DataError(
                f"batch() needs the positions of the batch's examples, counted from 0, found {self._ids.tolist()[:5]}"
            )

    def close(self) -> None:
        """Store the final weights and finish the path. Call it once, after the last step."""
        self._let_go()
        if finished(self.root):
            return
        if self.steps == 0:
            raise DataError("a path needs at least one optimizer.step() between Recorder(...) and close(), found none")
        if self._steps:
            self._flush()
        write_block(self.root, self.steps, [], [self._snapshot()])
        write_end(self.root, self.steps)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._let_go()

    def _let_go(self) -> None:
        self._watch.close()
        for hook in self._hooks:
            hook.remove()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(callable(a) for a in (*args, *kwargs.values()) if a is not optimizer):
            raise UnsupportedError(
                "optimizer.step(closure) cannot be recorded; call backward() before optimizer.step()"
            )
        if self._ids is None:
            raise DataError("call recorder.batch(ids) before every optimizer.step(); no ids were given for this step")
        settings = self._settings_now()
        self._check_unchanged(settings)
        check_modes(self._model)
        if self.steps % self.every == 0:
            self._snapshots.append(self._snapshot())
            self._pending += self._snapshots[-1].nbytes
        lr = tuple(float(g["lr"]) for g in self._optimizer.param_groups)
        self._steps.append(Step(self._ids, lr, settings, self._watch.factor()))
        self._ids = None

    def _after_step(self, *_: Any) -> None:
        self.steps += 1
        self._statistics = statistics_of(self._model).cpu()
        full = self._pending >= min(BLOCK_BYTES, self.budget / BLOCKS_IN_BUDGET)
        if full or time.monotonic() - self._since > BLOCK_SECONDS:
            self._flush()

    def _snapshot(self) -> Snapshot:
        state = torch.cat([parameters_of(self._model).cpu(), self._statistics])
        if not state.isfinite().all():
            raise NotFiniteError(
                f"weights must be finite, found NaN or infinity before step {self.steps}; the training diverged"
            )
        return Snapshot(self.steps, state, {name: self._buffer(name) for name in BUFFERS[self._kind]})

    def _buffer(self, name: str) -> Tensor:
        """One of the optimizer's buffers over all parameters, zero where it has not begun. Shape (parameters,)."""
        held = [(self._optimizer.state.get(p, {}).get(name), p) for p in self._parameters.values()]
        return torch.cat([(torch.zeros_like(p) if b is None else b).detach().reshape(-1).cpu() for b, p in held])

    def _settings_now(self) -> tuple[Mapping[str, Any], ...]:
        keys = SETTINGS[self._kind]
        return tuple({key: _plain(g[key]) for key in keys if key in g} for g in self._optimizer.param_groups)

    def _owners(self) -> list[int]:
        """The parameter group of each slot, -1 where the optimizer has none or the parameter is frozen."""
        group_of = {id(p): k for k, g in enumerate(self._optimizer.param_groups) for p in g["params"]}
        if set(group_of) - {id(p) for p in self._parameters.values()}:
            raise UnsupportedError(
                "the optimizer must move the model's own parameters only, it holds others besides; give them to an "
                "optimizer of their own, or make them part of the model"
            )
        owners = []
        for slot in self._slots:
            p = None if slot.buffer else self._parameters[slot.name]
            owners.append(group_of.get(id(p), -1) if p is not None and p.requires_grad else -1)
        return owners

    def _check_unchanged(self, settings: Sequence[Mapping[str, Any]]) -> None:
        owner = self._owners()
        changed = [s.name for s, old, new in zip(self._slots, self._owner, owner, strict=True) if old != new]
        if changed:
            raise UnsupportedError(
                "what is trained may not change in mid-training (frozen layers, parameter groups), it changed for "
                f"{changed[0]} before step {self.steps}; record one path for each stage of the training"
            )
        check_settings(self._settings, settings)

    def _flush(self) -> None:
        """Write the block; halve the density of stored states until the budget holds."""
        write_block(self.root, self.steps - len(self._steps), self._steps, self._snapshots)
        self._written, self._pending = self._written + self._pending, 0
        self._steps, self._snapshots, self._since = [], [], time.monotonic()
        while self._written > self.budget * (1 - 1 / BLOCKS_IN_BUDGET) and self.every <= self.steps:
            self.every *= 2
            self._written = thin_blocks(self.root, self.every)


def _plain(value: Any) -> Any:
    return [float(v) for v in value] if isinstance(value, (tuple, list)) else value if value is None else float(value)

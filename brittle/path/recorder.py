"""Record a training run: three lines in a plain PyTorch loop.

    recorder = Recorder(model, optimizer, "runs/path")
    ...
        recorder.batch(ids)          # positions of this batch's examples in the training data
        loss.backward()
        optimizer.step()
    ...
    recorder.close()

The recorder hooks the optimizer: before each step it stores the weights and what the optimizer holds, and it
notes the examples, learning rates, settings, and what happened to the gradients between backward and step. The
running statistics that belong to a step's weights are those that the step before it left behind: the step's own
forward pass has moved them on by the time the optimizer is called. States are kept every step while the disk budget
allows and writing keeps up, then every second, fourth, ... step; what lies between is replayed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from brittle.errors import DataError, NotFiniteError
from brittle.path import store
from brittle.path.average import AverageWatch
from brittle.path.flat import keep_freed_memory, layout, on_cpu, state_of
from brittle.path.forwards import ForwardWatch, resting
from brittle.path.keeping import WRITING, Keeper
from brittle.path.observed import Manner, Snapshot, Step
from brittle.path.passes import Call, batch_of, checked_call, matched
from brittle.path.processes import check_all_record, gathered, world
from brittle.path.recipe import OBSERVED
from brittle.path.spending import Spending
from brittle.path.taking_up import check_as_it_was, cut, state_at
from brittle.path.training import bare, check_training, counts_batches
from brittle.path.watch import GradientWatch


class Recorder:
    """Writes the path of a training run into a folder, crash-safe.

    Under DistributedDataParallel every process makes one and calls `batch` for its own batches; the first one writes.

    Args:
        model: the model in training, before its first step.
        optimizer: moves the model's parameters. Of torch's SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop and
            Adagrad the rule is known; any other is observed, and what that misses is shown as unexplained.
        out: an empty or absent folder.
        budget: bytes of disk that the states may take.
        average: a model into which the loop averages the weights (EMA, SWA); then it is the audited one.
        writing: part of the training's time that writing may take before states are kept less often (`math.inf`:
            never for that reason). It runs beside the training. An optimizer of an unknown rule is not replayed
            from its gradients, so its states are only thinned for the budget.
        repeats: whether an example may be in a batch twice (a sampler that draws with replacement).
        resume: take the path in `out` up again after so many steps, the model and the optimizer being as they
            were then; what was recorded behind that is dropped.

    Raises:
        UnsupportedError: for what the path kernel cannot account for, by name.
        NotFiniteError: where weights or gradients stop being finite.
        DiskError: where the disk is full.
        DataError, PathMismatchError: where `out` or `resume` do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        out: str | Path,
        budget: int = 2 << 30,
        *,
        average: nn.Module | None = None,
        writing: float = WRITING,
        repeats: bool = False,
        resume: int | None = None,
    ) -> None:
        self.root = Path(out)
        if resume is None and store.finished(self.root):
            raise DataError(
                f"{self.root} already holds a finished path; name another folder, delete it, or go on with resume="
            )
        self._model, self._repeats = bare(model), repeats
        rank, self._processes = world()
        check_all_record()
        check_training(self._model)
        self._slots = layout(self._model)
        self._parameters = dict(self._model.named_parameters())
        self._spending = Spending(optimizer, self._slots, self._parameters)
        self._average = AverageWatch(average, self._model) if average is not None else None
        self._counts_batches = counts_batches(self._model)
        self._calls: list[Call] = []
        self._open: Step | None = None
        self._modules = dict(self._model.named_modules())
        named = [slot.name.rpartition(".") for slot in self._slots if slot.buffer]
        self._buffers = [(self._modules[owner], leaf) for owner, _, leaf in named]
        self._statistics = next(self._model.parameters()).detach().new_zeros(0).cpu()
        self._statistics = self._statistics_now()
        keep_freed_memory()
        known = self._spending.kind != OBSERVED
        self._keeper = Keeper(self.root, budget, writes=rank == 0, writing=writing if known else math.inf)
        if rank == 0:
            self._begin(resume)
        self._watch = GradientWatch(self._parameters, lambda: self._forwards.last, lambda: self._spending.trained)
        self._forwards = ForwardWatch(self._model, self._watch.follow, lambda: self._keeper.at_state)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def steps(self) -> int:
        """The number of steps so far."""
        return self._keeper.steps

    @property
    def every(self) -> int:
        """A state is stored before every so many steps."""
        return self._keeper.every

    def batch(
        self,
        ids: Tensor | Sequence[int],
        *,
        epoch: int = 0,
        shares: Tensor | None = None,
        inputs: Tensor | None = None,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Say which training examples a forward and backward pass is made from; before it or after it.

        Call it once for every backward pass: several before one optimizer.step() are gradient accumulation.

        Args:
            ids: positions in the training data, (B,); or (B, K) for rows that are mixed from K examples.
            epoch: which augmentation the inputs had, where the subject's `augment` makes them again.
            shares: (B, K), to whom a mixed row is credited; each row adds up to 1.
            inputs: the raw inputs that the pass saw (B, *shape), stored where nothing else makes them again.
            targets: the targets that the loss saw, (B, ...), where they are not the training data's labels.
            weights: the loss's third argument, (B,).

        Raises:
            DataError: where ids are negative or repeated, or shapes do not fit.
        """
        given = {"shares": shares, "inputs": inputs, "targets": targets, "weights": weights}
        self._calls.append(checked_call(ids, epoch, given, self._repeats, at=len(self._watch.passes)))

    def flush(self) -> int:
        """Write what is in memory; returns the number of steps that are safe. Save it with your checkpoints.

        Where weights are averaged, call it after the average has been updated.
        """
        self._look_at_average()
        self._spending.check_others()
        self._keeper.add_state(self._snapshot())
        self._keeper.write(wait=True)
        return self.steps

    def close(self) -> None:
        """Store the final weights and finish the path. Call it once, after the last step."""
        self._unhook()
        if store.finished(self.root):
            return
        if self.steps == 0:
            raise DataError("a path needs at least one optimizer.step() between Recorder(...) and close(), found none")
        self._look_at_average()
        self._spending.check_others()
        average = None if self._average is None else state_of(self._average.model).cpu()
        try:
            self._keeper.finish(self._snapshot(), average)
        finally:
            self._keeper.stop()

    def release(self) -> None:
        """Let go of model and optimizer without finishing the path, as after an error; what was written stays."""
        self._unhook()
        self._keeper.stop()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.release()

    def _unhook(self) -> None:
        self._watch.close()
        self._forwards.close()
        for hook in self._hooks:
            hook.remove()

    def _begin(self, at: int | None) -> None:
        """Begin the folder, or take it up again after `at` steps."""
        spending = self._spending
        if at is None:
            store.clear(self.root)
            store.write_header(self.root, self._slots, spending.kind, spending.name, spending.warnings)
            return
        there = state_at(self.root, at, self._slots, spending.kind)
        if there is not None:
            check_as_it_was(there, self._snapshot(), spending.kind)
            spending.restore(there.buffers)
        self._keeper.take_up(at, cut(self.root, at))
        self._keeper.add_state(self._snapshot())

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Note the step; one that is given a closure is noted when the closure has run."""
        values = [*args[1:], *kwargs.values()]
        closure = next((value for value in values if callable(value)), None)
        if closure is None:
            self._note_step()
            return None

        def noted() -> Any:
            loss = closure()
            self._note_step()
            return loss

        swap = lambda value: noted if value is closure else value  # noqa: E731
        return (args[0], *map(swap, args[1:])), {key: swap(value) for key, value in kwargs.items()}

    def _note_step(self) -> None:
        """What can be seen of a step when its gradients are there and its weights have not moved yet."""
        if self._spending.skipped():
            return
        self._look_at_average()
        if self._keeper.full:
            self._spending.check_others()
            self._keeper.write()
        spending, watch = self._spending, self._watch
        if not (watch.passes or watch.taken()):
            self._forget()  # a step without gradients moves nothing
            return
        pairs = matched(self._calls, watch.passes, watch.alive())
        changes = watch.changes() if self._processes == 1 else watch.averaged()
        counted = {name for name, factor in changes.factors.items() if factor}
        batches = tuple(gathered([batch_of(call, one, counted) for call, one in pairs]))
        if self._keeper.wants_state:
            self._keeper.add_state(self._snapshot())
        counts, factors, bounds = spending.begin(changes)
        last = pairs[-1][1].forward
        at_rest = last.resting if last else resting(self._modules)
        manner = Manner(spending.owner(), spending.settings(), at_rest)
        nothing = torch.zeros(len(self._slots), dtype=torch.float64)
        self._open = Step(batches, spending.lr(), manner, counts, factors, bounds, nothing, changes.length)

    def _after_step(self, *_: Any) -> None:
        if self._open is None:
            return
        statistics = self._statistics_now()
        alone = self._forwards.count == len(self._open.batches) and not self._counts_batches
        kept = None if alone or not len(statistics) else statistics
        self._keeper.add_step(replace(self._open, extra=self._spending.end(), statistics=kept))
        self._statistics, self._open = statistics, None
        self._forget()

    def _forget(self) -> None:
        """Begin the next step anew."""
        self._calls.clear()
        self._watch.forget()
        self._forwards.forget()

    def _look_at_average(self) -> None:
        """Note how the average moved since the last step."""
        share = self._average.share() if self._average is not None else 0.0
        if share:
            self._keeper.note_average(share)

    def _statistics_now(self) -> Tensor:
        """The running statistics, a copy in the order of the state; modules may put new tensors in their place."""
        found = [getattr(module, leaf) for module, leaf in self._buffers]
        return on_cpu(found) if found else self._statistics

    def _snapshot(self) -> Snapshot:
        state = on_cpu([*self._parameters.values(), self._statistics], self._keeper.spare)
        if not (math.isfinite(state.sum().item()) or state.isfinite().all()):
            raise NotFiniteError(
                f"weights must be finite, found NaN or infinity before step {self.steps}; the training diverged"
            )
        held = self._spending
        return Snapshot(self.steps, state, held.buffers(self._keeper.spare), held.updates, held.extra())

"""Record the training of a Hugging Face `Trainer` with one callback.

    arguments = TrainingArguments("runs/out", remove_unused_columns=False)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[RecorderCallback("runs/path")])
    trainer.train()

Where the ids come from: callbacks do not see the batches, but the model does. Each item of the data set holds its
position under "ids", the collator makes a tensor of them, and `remove_unused_columns=False` lets them through. The
callback's hook on the model takes them out of its keyword arguments, so that `forward` never sees them: while
training it records them; in an evaluation, and ever after, it drops them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from brittle.errors import UnsupportedError
from brittle.integrations import POSITIONS, MissingPackageError, part_of, tell_epoch
from brittle.path.keeping import WRITING
from brittle.path.recorder import Recorder

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.state import AcceleratorState
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise MissingPackageError("transformers", "huggingface") from error

REMEDY = (
    "let the data set return each example's position under this key, keep it in the collator, and set "
    "TrainingArguments(remove_unused_columns=False)"
)


class RecorderCallback(TrainerCallback, ExportableState):
    """Writes the path of `Trainer.train` into a folder.

    Args:
        out: an empty or absent folder.
        ids: the keyword under which the model is given the ids (B,), as a tensor; `forward` never sees it.
        inputs: the keyword under which it is given its inputs, where they cannot be made again (augmentation
            without a seed): they are stored with the path, as raw inputs. Nothing is stored by default.
        average: the module that holds a running average of the model's weights, which a callback of yours updates in
            `on_step_end`; then it is the audited one.
        budget: bytes of disk that the states may take.
        writing: part of the training's time that writing may take, as in `Recorder`.
        repeats: ids may repeat within a batch.

    A checkpoint holds the number of steps that are safe on disk, and `train(resume_from_checkpoint=...)` goes on
    from there in the same folder. The Trainer does not bring back weights whose names in a file are not those in
    memory, as in `ViTModel`: make the model by `from_pretrained(checkpoint)`, or the path is refused there.

    A training set with `set_epoch`, such as `brittle.Augmented`, is told each epoch when it begins. Under bf16 or fp16
    the Trainer leaves a `forward` of that precision behind: hand a fresh model with the trained weights to `Subject`.

    Raises:
        PathMismatchError: where a training goes on with other weights than the checkpoint's.
        UnsupportedError: for several processes or GPUs, sharded or compiled models, weights that are exchanged at
            the end, and an average that a checkpoint does not hold; and what `Recorder` refuses.
        DataError: for batches without ids.
    """

    def __init__(
        self,
        out: str | Path,
        ids: str = "ids",
        *,
        inputs: str | None = None,
        average: nn.Module | None = None,
        budget: int = 2 << 30,
        writing: float = WRITING,
        repeats: bool = False,
    ) -> None:
        self.out, self.ids, self.inputs, self.average = Path(out), ids, inputs, average
        self.budget, self.writing, self.repeats = budget, writing, repeats
        self.averages = average is not None
        self.recorder: Recorder | None = None
        self._model: Any = None
        self._hooks: list[RemovableHandle] = []
        self._epoch: int | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if model is not None:  # evaluations before the training get ids as well
            _door_of(model).key = self.ids

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any,
        optimizer: Any,
        **_: Any,
    ) -> None:
        """Begin to record: the weights and the optimizer are now as a checkpoint left them."""
        check_arguments(args)
        if self.averages and self.average is None:
            raise UnsupportedError(
                "a checkpoint holds no average=, this callback was made from one; train with "
                "restore_callback_states_from_checkpoint=False, which keeps the callback that was handed over"
            )
        door, steps = _door_of(model), _safe_steps(state)
        if door.callback is not None:
            door.callback._let_go()  # a training that an exception ended: the Trainer does not tell
        with _in_its_precision(model) as self._hooks:
            self.recorder = Recorder(
                model,
                _unwrapped(optimizer),
                self.out,
                self.budget,
                average=self.average,
                writing=self.writing,
                repeats=self.repeats,
                resume=steps,
            )
        self._model, self._epoch = model, None
        door.key, door.callback = self.ids, self

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, train_dataloader: Any, **_: Any
    ) -> None:
        self._epoch = int(state.epoch or 0) if self._epoch is None else self._epoch + 1
        tell_epoch(train_dataloader, self._epoch)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self.recorder is not None
        self.recorder.close()
        self._let_go()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: how to make this callback again, and how many steps are safe."""
        names = ("ids", "inputs", "budget", "writing", "repeats")
        options = {"out": str(self.out), **{name: getattr(self, name) for name in names}}
        steps = {} if self.recorder is None else {"steps": self.recorder.flush()}
        return {"args": options, "attributes": {"averages": self.averages, **steps}}

    def record(self, batch: dict[str, Any]) -> None:
        """Give the recorder one forward pass's ids. batch: the model's keyword arguments."""
        assert self.recorder is not None
        ids = part_of(batch, self.ids, POSITIONS, REMEDY)
        given = {}
        if self.inputs is not None:
            given["inputs"] = part_of(batch, self.inputs, "its inputs", "name the model's keyword in inputs=")
        self.recorder.batch(ids, epoch=self._epoch or 0, **given)

    def _let_go(self) -> None:
        """Leave the model, and the path as it is."""
        _door_of(self._model).callback = None
        for hook in self._hooks:
            hook.remove()
        assert self.recorder is not None
        self.recorder.release()


class _Door:
    """A forward hook that takes the ids out of the keyword arguments, and shows them to a callback while it records."""

    def __init__(self) -> None:
        self.key = "ids"
        self.callback: RecorderCallback | None = None

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if self.callback is not None and model.training and torch.is_grad_enabled():
            self.callback.record(kwargs)
        return args, {key: value for key, value in kwargs.items() if key != self.key}


_doors: WeakKeyDictionary[nn.Module, _Door] = WeakKeyDictionary()
"""One hook a model, whatever number of trainers and callbacks it goes through."""


def _door_of(model: nn.Module) -> _Door:
    if model not in _doors:
        _doors[model] = _Door()
        model.register_forward_pre_hook(_doors[model], with_kwargs=True)
    return _doors[model]


def check_arguments(args: TrainingArguments) -> None:
    """Refuse by name what a path cannot be recorded from. Raises `UnsupportedError`."""
    refused = (
        (args.deepspeed, "DeepSpeed", "deepspeed=None"),
        (args.fsdp, "FSDP", "fsdp=None"),
        (args.world_size > 1, f"training in {args.world_size} processes", "one process, which sees all ids"),
        (args.n_gpu > 1, f"DataParallel over {args.n_gpu} GPUs", "one visible GPU"),
        (args.torch_compile, "a compiled model", "torch_compile=False"),
        (args.neftune_noise_alpha is not None, "NEFTune's noise", "neftune_noise_alpha=None"),
        (
            args.load_best_model_at_end,
            "a training that ends with earlier weights",
            "load_best_model_at_end=False, and audit the last weights",
        ),
    )
    for found, name, remedy in refused:
        if found:
            raise UnsupportedError(f"{name} cannot be recorded; train with {remedy}")


@contextmanager
def _in_its_precision(model: nn.Module) -> Iterator[list[RemovableHandle]]:
    """Hooks that are put on the model meanwhile run in the precision of its forward pass.

    Accelerate switches autocast on inside `forward`, behind all hooks: so one before them switches it on, and one
    behind them off again.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(AcceleratorState().mixed_precision)
    if dtype is None:
        yield []
        return
    autocast = torch.autocast(next(model.parameters()).device.type, dtype)

    def on(*_: Any) -> None:
        autocast.__enter__()

    def off(*_: Any) -> None:
        autocast.__exit__(None, None, None)

    hooks = [model.register_forward_pre_hook(on)]
    yield hooks
    hooks.append(model.register_forward_pre_hook(off))


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Torch's own optimizer inside accelerate's."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _safe_steps(state: TrainerState) -> int | None:
    """The recorder's steps in the checkpoint that the training goes on from; None at its beginning."""
    if state.global_step == 0:
        return None
    stored = state.stateful_callbacks.get(RecorderCallback.__name__)
    if stored is None:
        raise UnsupportedError(
            f"a path begins with the first step, this checkpoint was saved at step {state.global_step} without a "
            "RecorderCallback; train from the beginning, or audit the trained model without a path"
        )
    return int((stored[-1] if isinstance(stored, list) else stored)["attributes"]["steps"])

"""Record a Lightning training with one callback.

    trainer = Trainer(max_epochs=20, callbacks=[RecorderCallback("runs/path")])
    trainer.fit(module, loader)

Where the ids come from: a batch brings them along, under "ids" or as the last of three parts or more, because the
data set returns each example's position beside the input and the label; `ids=` reads them from anything else.
Lightning calls the forward and backward passes from within `optimizer.step(closure)`, and the `Recorder` watches
them there: clipping, accumulation, precision and schedules are what it sees, nothing is read from the Trainer.

Works with the package `lightning`, and with `pytorch-lightning` where that is the one installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from brittle.errors import DataError, UnsupportedError
from brittle.integrations import POSITIONS, MissingPackageError, part_of, tell_epoch
from brittle.path.keeping import WRITING
from brittle.path.recorder import Recorder

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer
    except ImportError as error:
        raise MissingPackageError("lightning", "lightning") from error

SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy")
"""Strategies under which no process holds the weights and gradients as torch's optimizer spends them."""

AVERAGE = "_average_model"
"""Where Lightning's `WeightAveraging` callbacks hold the averaged weights."""

REMEDY = "let the data set return (input, label, position), or pass ids=, a function of the batch"


def ids_of(batch: Any) -> Any:
    """The ids of a batch: `batch["ids"]` of a mapping, or the last of a tuple's or list's three parts or more.

    Raises:
        DataError: for any other batch. A pair is one of them: its last part are the labels.
    """
    if isinstance(batch, Mapping):
        return part_of(batch, "ids", POSITIONS, REMEDY)
    if isinstance(batch, (tuple, list)) and len(batch) > 2:
        return batch[-1]
    parts = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else type(batch).__name__
    raise DataError(f"a batch must end with {POSITIONS}, found {parts}; {REMEDY}")


class RecorderCallback(Callback):
    """Writes the path of `Trainer.fit` into a folder.

    Args:
        out: an empty or absent folder.
        ids: what `Recorder.batch` is given, from a batch: the ids (B,), or a mapping of its arguments ("ids",
            "shares", "inputs", "targets", "weights") for mixed rows or inputs that cannot be made again.
        model: the name of the submodule that is audited, as in `LightningModule.get_submodule`; the module itself
            by default. `training_step` must call it as a module, `self(x)` or `self.net(x)`.
        average: the name of a submodule that holds a running average of `model`; Lightning's own `WeightAveraging`
            is found without.
        budget: bytes of disk that the states may take.
        writing: part of the training's time that writing may take, as in `Recorder`.
        repeats: ids may repeat within a batch.

    A checkpoint holds the number of steps that are safe on disk, and `fit(ckpt_path=...)` goes on from there in the
    same folder. An exception or an interrupt leaves the path unfinished. A training set with `set_epoch`, such as
    `brittle.Augmented`, is told each epoch when it begins; before a training that goes on with loader workers, which
    Lightning starts earlier, tell it yourself.

    Raises:
        UnsupportedError: for several optimizers, several processes, sharded or compiled models, weights that are
            exchanged at the end; and what `Recorder` refuses.
        DataError: for batches without ids.
    """

    def __init__(
        self,
        out: str | Path,
        ids: Callable[[Any], Any] = ids_of,
        *,
        model: str = "",
        average: str | None = None,
        budget: int = 2 << 30,
        writing: float = WRITING,
        repeats: bool = False,
    ) -> None:
        self.out, self.ids, self.model, self.average = Path(out), ids, model, average
        self.budget, self.writing, self.repeats = budget, writing, repeats
        self.recorder: Recorder | None = None
        self._resume: int | None = None
        self._batch: dict[str, Any] = {}
        self._called = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_trainer(trainer, pl_module)
            if any(hasattr(callback, AVERAGE) for callback in trainer.callbacks[: trainer.callbacks.index(self)]):
                raise UnsupportedError(
                    "the last weights must be recorded before WeightAveraging puts the averaged ones in their place; "
                    "list the RecorderCallback before it in callbacks="
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to record: the weights and the optimizer are now as a checkpoint left them."""
        if len(trainer.optimizers) != 1:
            names = [type(optimizer).__name__ for optimizer in trainer.optimizers]
            raise UnsupportedError(
                f"a path has one optimizer, this module configures {len(names)} ({', '.join(names)}); give the "
                "parameters to one, in several groups, or audit the trained model without a path"
            )
        model = pl_module.get_submodule(self.model)
        self.recorder = Recorder(
            model,
            trainer.optimizers[0],
            self.out,
            self.budget,
            average=self._averaged(trainer, pl_module),
            writing=self.writing,
            repeats=self.repeats,
            resume=self._resume,
        )
        self._resume = None
        self._called, self._hook = False, model.register_forward_pre_hook(self._note_call)
        tell_epoch(trainer.train_dataloader, trainer.current_epoch)  # one that goes on in its middle has no start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tell_epoch(trainer.train_dataloader, trainer.current_epoch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        found = self.ids(batch)
        given = dict(found) if isinstance(found, Mapping) else {"ids": found}
        self._batch = {"epoch": trainer.current_epoch, **given}

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Record the batch once it is sure to count: a `training_step` that returns None has no backward pass."""
        assert self.recorder is not None
        if not self._called:
            name = type(pl_module.get_submodule(self.model)).__name__
            raise UnsupportedError(
                f"training_step must call the model that is recorded, {name} was not called; call self(x), or name the "
                'submodule that it calls, RecorderCallback(model="net")'
            )
        self.recorder.batch(**self._batch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.recorder is not None
        self.recorder.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.recorder is not None:
            self._hook.remove()
            self.recorder.release()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.recorder is None else {"steps": self.recorder.flush()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume = state_dict["steps"]

    def _note_call(self, *_: Any) -> None:
        self._called = True
        self._hook.remove()

    def _averaged(self, trainer: Trainer, pl_module: LightningModule) -> nn.Module | None:
        """The running average of the recorded model, if there is one."""
        if self.average is not None:
            return pl_module.get_submodule(self.average)
        for callback in trainer.callbacks:
            averaged = getattr(getattr(callback, AVERAGE, None), "module", None)
            if isinstance(averaged, nn.Module):
                return averaged.get_submodule(self.model)
        return None


def check_trainer(trainer: Trainer, module: LightningModule) -> None:
    """Refuse by name what a path cannot be recorded from. Raises `UnsupportedError`."""
    strategy = type(trainer.strategy).__name__
    if strategy in SHARDED:
        raise UnsupportedError(f"{strategy} cannot be recorded; train with strategy='auto', devices=1")
    if trainer.world_size > 1:
        raise UnsupportedError(
            f"a path is recorded in one process that sees all ids, found {trainer.world_size} ({strategy}); train with "
            "devices=1, num_nodes=1"
        )
    if getattr(module, "_compiler_ctx", None) is not None:
        raise UnsupportedError("a compiled module cannot be recorded; call fit with the module itself")
    for callback in trainer.callbacks:
        if type(callback).__name__ == "StochasticWeightAveraging":
            raise UnsupportedError(
                "StochasticWeightAveraging exchanges the weights when the training ends; use the callback "
                "WeightAveraging, or train without averaging"
            )

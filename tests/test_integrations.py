"""The callbacks under the real frameworks: a small training each way, and its account closes."""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

import brittle
from brittle.errors import DataError, PathMismatchError, UnsupportedError
from brittle.integrations import huggingface, lightning
from brittle.integrations.lightning import ids_of
from brittle.kernel.sweep import sweep
from brittle.path.match import check_path
from brittle.path.recorder import Recorder
from brittle.path.store import PathReader
from brittle.records import Ledger, Pairs

TRAIN, TEST, BATCH = 150, 6, 32  # five batches an epoch, the last one incomplete


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Handwritten digits for training and for queries: inputs (N, 1, 8, 8) in [0, 1], labels (N,)."""
    found = load_digits()
    inputs = torch.tensor(found.images / 16, dtype=torch.float32)[:, None]
    labels = torch.tensor(found.target)
    return (inputs[:TRAIN], labels[:TRAIN]), (inputs[TRAIN : TRAIN + TEST], labels[TRAIN : TRAIN + TEST])


def ledger_of(model: nn.Module, path: Path, **options: Any) -> Ledger:
    """The account of the trained model's outputs at the test inputs, from the path that the callback wrote."""
    train, test = digits()
    subject = brittle.Subject(model.cpu().eval(), train, test, path=path, **options)
    reader = PathReader(path)
    check_path(reader, subject)
    return sweep(reader, subject, test[0], Pairs.of(subject.predict(test[0]))).ledger


def assert_closes(ledger: Ledger, unexplained: float = 1e-3, least: float = 0.1) -> None:
    learned = (ledger.output - ledger.start).abs().mean().item()
    assert learned > least, "nothing was learned"
    assert ledger.relative_residual < 0.02
    assert ledger.unexplained.abs().mean().item() < unexplained * learned
    assert torch.allclose(ledger.total(), ledger.output, atol=1e-4)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The frameworks' advice about loaders and loggers is not what is tested."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ----------------------------------------------------------------------------------------------------------- Lightning


class Net(nn.Module):
    """A small convolution net; batch normalization and dropout where asked for."""

    def __init__(self, normalized: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6) if normalized else nn.Identity()
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(6 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(F.gelu(self.norm(self.conv(x)))).flatten(1))


class Digits(LightningModule):
    """Trains a `Net` with AdamW, or what `optimizer` says, under a schedule that steps with every batch."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer] | None = None, **net: Any) -> None:
        super().__init__()
        self.net, self.optimizer = Net(**net), optimizer
        self.seen: list[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y, ids = batch
        self.seen.append(ids.tolist())
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        make = self.optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=5e-3))
        optimizer = make(self.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(augment: Any = None, workers: int = 0) -> DataLoader[Any]:
    """Batches (input, label, id) in another order each epoch."""
    data = brittle.Augmented(digits()[0], augment or (lambda x, id, epoch: x))
    order = torch.Generator().manual_seed(3)
    return DataLoader(data, BATCH, shuffle=True, generator=order, num_workers=workers)


NOISE = brittle.Augmentation(lambda x: (x + 0.2 * torch.rand_like(x)).clamp(0, 1), seed=1)


def trainer_of(*callbacks: Callback, **options: Any) -> LightningTrainer:
    settings = {"max_epochs": 3, "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)}
    return LightningTrainer(
        accelerator="cpu",
        devices=options.pop("devices", 1),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings | options,
    )


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)


LIGHTNING = {
    "adamw under a schedule": ({}, {}),
    "batch normalization and momentum": ({"optimizer": sgd, "normalized": True}, {}),
    "dropout": ({"dropout": 0.2}, {}),
    "clipped by norm": ({}, {"gradient_clip_val": 0.3}),
    "clipped by value": ({}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "accumulated, the last step of an epoch from fewer batches": ({}, {"accumulate_grad_batches": 3}),
    "accumulated and clipped": ({"optimizer": sgd}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}),
}


@pytest.mark.parametrize("case", LIGHTNING)
def test_a_lightning_training_is_accounted_for(case: str, tmp_path: Path) -> None:
    module_options, trainer_options = LIGHTNING[case]
    seed_everything(0)
    module = Digits(**module_options)
    trainer = trainer_of(lightning.RecorderCallback(tmp_path), **trainer_options)
    trainer.fit(module, loader(), loader())  # the second one validates after every epoch
    reader = PathReader(tmp_path)
    assert reader.steps == trainer.global_step
    assert [b.ids.tolist() for k in range(reader.steps) for b in reader.step(k).batches] == module.seen
    assert_closes(ledger_of(module, tmp_path))


def test_mixed_precision_is_recorded(tmp_path: Path) -> None:
    seed_everything(0)
    module = Digits()
    trainer_of(lightning.RecorderCallback(tmp_path), precision="bf16-mixed").fit(module, loader())
    assert PathReader(tmp_path).autocast
    assert_closes(ledger_of(module, tmp_path), unexplained=0.02)


def test_the_audited_model_may_be_a_submodule(tmp_path: Path) -> None:
    seed_everything(0)
    module = Digits()
    trainer_of(lightning.RecorderCallback(tmp_path, model="net")).fit(module, loader())
    assert_closes(ledger_of(module.net, tmp_path))


def test_averaged_weights_are_the_audited_ones(tmp_path: Path) -> None:
    seed_everything(0)
    module = Digits(optimizer=sgd)
    trainer_of(lightning.RecorderCallback(tmp_path), EMAWeightAveraging(decay=0.8)).fit(module, loader(), loader())
    assert PathReader(tmp_path).average is not None
    assert_closes(ledger_of(module, tmp_path))


@pytest.mark.parametrize("workers", [0, 2])
def test_seeded_augmentation_is_told_each_epoch(workers: int, tmp_path: Path) -> None:
    seed_everything(0)
    module = Digits()
    trainer_of(lightning.RecorderCallback(tmp_path)).fit(module, loader(NOISE, workers))
    assert {b.epoch for k in range(15) for b in PathReader(tmp_path).step(k).batches} == {0, 1, 2}
    assert_closes(ledger_of(module, tmp_path, augment=NOISE))


def test_mixed_rows_are_recorded_as_the_step_saw_them(tmp_path: Path) -> None:
    """Each example mixed with its neighbour in the batch, 3 to 1, in inputs and targets."""

    class Mixed(Digits):
        def on_before_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> dict[str, Tensor]:
            x, y, ids = batch
            mixed = {"inputs": 0.75 * x + 0.25 * x.roll(1, 0), "ids": torch.stack([ids, ids.roll(1)], 1)}
            hot = F.one_hot(y, 10).float()
            shares = torch.tensor([0.75, 0.25]).expand(len(y), 2)
            return {**mixed, "targets": 0.75 * hot + 0.25 * hot.roll(1, 0), "shares": shares}

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
            return F.cross_entropy(self(batch["inputs"]), batch["targets"])

    seed_everything(0)
    module = Mixed()
    trainer_of(lightning.RecorderCallback(tmp_path, ids=dict)).fit(module, loader())
    assert_closes(ledger_of(module, tmp_path))


class Stop(Callback):
    """Ends the training after a number of batches, by an exception."""

    def __init__(self, after: int, error: type[BaseException] = RuntimeError) -> None:
        self.after, self.error = after, error

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.after:
            raise self.error("stopped")


def test_a_stopped_lightning_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    path, checkpoint = tmp_path / "path", ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=7)
    seed_everything(0)
    with pytest.raises(RuntimeError, match="stopped"):
        trainer_of(lightning.RecorderCallback(path), checkpoint, Stop(9)).fit(Digits(), loader(NOISE))
    with pytest.raises(PathMismatchError, match="must be finished"):
        PathReader(path)
    module = Digits()
    trainer = trainer_of(lightning.RecorderCallback(path), ModelCheckpoint(tmp_path / "again"))
    trainer.fit(module, loader(NOISE), ckpt_path=str(tmp_path / "last.ckpt"))
    assert PathReader(path).steps == trainer.global_step == 15
    assert len(module.seen) == 8, "the first seven steps were taken before"
    assert_closes(ledger_of(module, path, augment=NOISE))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_path_unfinished_and_the_model_alone(
    error: type[BaseException], tmp_path: Path
) -> None:
    module, callback = Digits(), lightning.RecorderCallback(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises((RuntimeError, SystemExit)):  # Lightning turns an interrupt into an exit
            trainer_of(callback, Stop(2, error)).fit(module, loader())
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "end.json").exists()
    assert not [m for m in module.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert not [p for p in module.parameters() if p._backward_hooks]


class Two(Digits):
    """Two optimizers, by hand."""

    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net.conv, self.net.head)]


class Bypassing(Digits):
    """Calls the net past the module that is recorded."""

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


def test_what_lightning_cannot_have_recorded_is_refused_by_name(tmp_path: Path) -> None:
    callback = lightning.RecorderCallback(tmp_path)
    with pytest.raises(UnsupportedError, match=r"one optimizer, this module configures 2 \(SGD, SGD\)"):
        trainer_of(callback).fit(Two(), loader())
    with pytest.raises(UnsupportedError, match="Bypassing was not called"):
        trainer_of(callback).fit(Bypassing(), loader())
    with pytest.raises(UnsupportedError, match=r"found 2 \(DDPStrategy\)"):
        callback.setup(trainer_of(strategy="ddp", devices=2), Digits(), "fit")
    with pytest.raises(UnsupportedError, match="FSDPStrategy cannot be recorded"):
        lightning.check_trainer(SimpleNamespace(strategy=FSDPStrategy(), world_size=1, callbacks=[]), Digits())
    with pytest.raises(UnsupportedError, match="StochasticWeightAveraging"):
        callback.setup(trainer_of(callback, StochasticWeightAveraging(swa_lrs=0.1)), Digits(), "fit")
    with pytest.raises(UnsupportedError, match="list the RecorderCallback before it"):
        callback.setup(trainer_of(EMAWeightAveraging(), callback), Digits(), "fit")
    with pytest.raises(UnsupportedError, match="a compiled module cannot be recorded"):
        trainer_of(callback).fit(torch.compile(Digits()), loader())
    callback.setup(trainer_of(strategy="ddp", devices=2), Digits(), "validate")


def test_a_batch_without_ids_is_told_where_to_take_them() -> None:
    ids, x = torch.arange(4), torch.rand(4, 3)
    assert ids_of([x, ids % 2, ids]) is ids
    assert ids_of({"x": x, "ids": ids}) is ids
    for batch, found in (([x, ids], "found 2 parts"), (x, "found Tensor"), ({"x": x, "y": ids}, r"keys \['x', 'y'\]")):
        with pytest.raises(
            DataError, match=rf"{found}; let the data set return \(input, label, position\), or pass ids="
        ):
            ids_of(batch)


# -------------------------------------------------------------------------------------------------------- Hugging Face


class Rows(Dataset[dict[str, Any]]):
    """The digits as a Trainer's collator takes them, each with its position."""

    def __init__(self, part: int = 0, key: str = "ids") -> None:
        self.inputs, self.labels = digits()[part]
        self.key = key

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixel_values": self.inputs[i], "labels": int(self.labels[i]), self.key: i}


STEPS = 12


def vit(dropout: float = 0.0) -> ViTForImageClassification:
    """A vision transformer of two layers for images of 8 x 8 pixels."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,  # at the default, so small a model learns nothing in so few steps
        num_labels=10,
    )
    return ViTForImageClassification(config)


def hugging(model: nn.Module, out: Path, *callbacks: TrainerCallback, data: Any = None, **options: Any) -> Trainer:
    settings = {"max_steps": STEPS, "learning_rate": 5e-3, "weight_decay": 0.01, "remove_unused_columns": False}
    arguments = TrainingArguments(
        str(out / "out"),
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        **{"save_strategy": "no"} | settings | options,
    )
    return Trainer(model, arguments, train_dataset=data or Rows(), eval_dataset=Rows(1), callbacks=list(callbacks))


SMOOTHED = 0.1
HUGGING: dict[str, tuple[float, dict[str, Any]]] = {
    "adamw, clipped by norm as by default": (0.0, {}),
    "dropout": (0.1, {}),
    "accumulated, evaluated in mid-training": (
        0.0,
        {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 3},
    ),
    "accumulated with dropout, not clipped": (0.1, {"gradient_accumulation_steps": 3, "max_grad_norm": 0.0}),
    "label smoothing": (0.0, {"label_smoothing_factor": SMOOTHED, "max_grad_norm": 0.1}),
    "sgd": (0.0, {"optim": "sgd", "learning_rate": 0.3, "lr_scheduler_type": "constant"}),
}


@pytest.mark.parametrize("case", HUGGING)
def test_a_trainers_training_is_accounted_for(case: str, tmp_path: Path) -> None:
    dropout, options = HUGGING[case]
    model = vit(dropout)
    trainer = hugging(model, tmp_path, huggingface.RecorderCallback(tmp_path / "path"), **options)
    trainer.train()
    assert PathReader(tmp_path / "path").steps == trainer.state.global_step == STEPS
    loss = nn.CrossEntropyLoss(label_smoothing=options.get("label_smoothing_factor", 0.0))
    forward = lambda model, x: model(pixel_values=x)  # noqa: E731
    assert_closes(ledger_of(model, tmp_path / "path", forward=forward, loss=loss))


def test_a_trainers_seeded_augmentation_is_told_each_epoch(tmp_path: Path) -> None:
    class Noisy(Rows):
        """Its items are told the epoch."""

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __getitem__(self, i: int) -> dict[str, Any]:
            item = super().__getitem__(i)
            return item | {"pixel_values": NOISE(item["pixel_values"], i, self.epoch)}

    model = Plain()
    hugging(model, tmp_path, huggingface.RecorderCallback(tmp_path / "path"), data=Noisy()).train()
    assert_closes(ledger_of(model, tmp_path / "path", augment=NOISE))


def test_a_trainers_mixed_precision_is_recorded(tmp_path: Path) -> None:
    model, fresh = vit(), vit()
    hugging(model, tmp_path, huggingface.RecorderCallback(tmp_path / "path"), bf16=True).train()
    assert not torch.is_autocast_enabled("cpu")
    assert PathReader(tmp_path / "path").autocast
    fresh.load_state_dict(model.state_dict())
    assert_closes(ledger_of(fresh, tmp_path / "path"), unexplained=0.02)


class Plain(nn.Module):
    """A model of one's own, whose `forward` would fail if it were given ids."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(64, 20), nn.Linear(20, 10)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(F.tanh(self.first(pixel_values.flatten(1))))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_evaluations_and_predictions_may_have_ids_at_any_time(tmp_path: Path) -> None:
    model = Plain()
    trainer = hugging(model, tmp_path, huggingface.RecorderCallback(tmp_path / "path"))
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert trainer.predict(Rows(1)).predictions.shape == (TEST, 10)
    assert_closes(ledger_of(model, tmp_path / "path"))


class Averaging(TrainerCallback):
    """Holds a running average of the weights."""

    def __init__(self, model: nn.Module) -> None:
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.average.update_parameters(model)


def test_a_trainers_averaged_weights_are_the_audited_ones(tmp_path: Path) -> None:
    model, path = Plain(), tmp_path / "path"
    averaging = Averaging(model)
    callback = huggingface.RecorderCallback(path, average=averaging.average)
    hugging(model, tmp_path, callback, averaging).train()
    assert PathReader(path).average is not None
    assert_closes(ledger_of(averaging.average.module, path))
    assert not torch.equal(averaging.average.module.head.weight, model.head.weight)


def test_an_average_that_a_checkpoint_does_not_hold_is_refused(tmp_path: Path) -> None:
    """Where the Trainer makes the callback again from what the checkpoint holds."""
    saving = {"save_strategy": "steps", "save_steps": 4, "restore_callback_states_from_checkpoint": True}

    def trainer(*callbacks: TrainerCallback) -> Trainer:
        averaging = Averaging(model := Plain())
        recorded = huggingface.RecorderCallback(tmp_path / "path", average=averaging.average)
        return hugging(model, tmp_path, averaging, recorded, *callbacks, **saving)

    with pytest.raises(RuntimeError, match="stopped"):
        trainer(Cut()).train()
    with pytest.raises(UnsupportedError, match="restore_callback_states_from_checkpoint=False"):
        trainer().train(resume_from_checkpoint=True)


def test_both_callbacks_pass_on_what_the_recorder_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    class Noted(Recorder):
        def __init__(self, *args: Any, **given: Any) -> None:
            asked.append(given)
            super().__init__(*args, **given)

    for module in (lightning, huggingface):
        monkeypatch.setattr(module, "Recorder", Noted)
    trainer_of(lightning.RecorderCallback(tmp_path / "a", writing=0.2, repeats=True)).fit(Digits(), loader())
    hugging(Plain(), tmp_path, huggingface.RecorderCallback(tmp_path / "b", writing=0.2, repeats=True)).train()
    assert [{name: given[name] for name in ("writing", "repeats", "resume")} for given in asked] == [
        {"writing": 0.2, "repeats": True, "resume": None}
    ] * 2


class Cut(TrainerCallback):
    """Ends the training in the middle, by an exception."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 9:
            raise RuntimeError("stopped")


def test_a_training_that_failed_leaves_nothing_behind_for_the_next_one(tmp_path: Path) -> None:
    model, path = Plain(), tmp_path / "path"
    with pytest.raises(RuntimeError, match="stopped"):
        hugging(model, tmp_path, huggingface.RecorderCallback(path), Cut()).train()
    hugging(model, tmp_path, huggingface.RecorderCallback(path)).train()
    assert PathReader(path).steps == STEPS
    assert len(model._forward_pre_hooks) == 1, "the one that drops ids"
    assert not model._forward_hooks
    assert not [p for p in model.parameters() if p._backward_hooks]
    assert_closes(ledger_of(model, path))


@pytest.mark.parametrize("anew", [False, True])
def test_a_stopped_trainers_training_goes_on_from_its_checkpoint(anew: bool, tmp_path: Path) -> None:
    """anew: the Trainer makes the callback again from what the checkpoint holds."""
    saving = {"save_strategy": "steps", "save_steps": 4, "restore_callback_states_from_checkpoint": anew}
    path = tmp_path / "path"
    recorded = lambda: huggingface.RecorderCallback(path, inputs="pixel_values", budget=1 << 24)  # noqa: E731
    with pytest.raises(RuntimeError, match="stopped"):
        hugging(Plain(), tmp_path, recorded(), Cut(), **saving).train()
    model = Plain()
    hugging(model, tmp_path, recorded(), **saving).train(resume_from_checkpoint=True)
    reader = PathReader(path)
    assert reader.steps == STEPS
    assert [b.epoch for k in range(STEPS) for b in reader.step(k).batches] == [0] * 5 + [1] * 5 + [2] * 2
    assert all(b.inputs is not None for k in range(STEPS) for b in reader.step(k).batches)
    assert_closes(ledger_of(model, path))


def test_a_checkpoint_that_did_not_bring_the_weights_back_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving, path = {"save_strategy": "steps", "save_steps": 4}, tmp_path / "path"
    with pytest.raises(RuntimeError, match="stopped"):
        hugging(Plain(), tmp_path, huggingface.RecorderCallback(path), Cut(), **saving).train()
    monkeypatch.setattr(Trainer, "_load_from_checkpoint", lambda *_, **__: None)
    with pytest.raises(PathMismatchError, match="as it was after 8 steps, its weights differ"):
        hugging(Plain(), tmp_path, huggingface.RecorderCallback(path)).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    hugging(vit(), tmp_path, save_strategy="steps", save_steps=STEPS).train()
    again = hugging(vit(), tmp_path, huggingface.RecorderCallback(tmp_path / "path"))
    with pytest.raises(UnsupportedError, match=f"saved at step {STEPS} without a RecorderCallback"):
        again.train(resume_from_checkpoint=True)


def test_what_a_trainer_cannot_have_recorded_is_refused_by_name(tmp_path: Path) -> None:
    plain = {"deepspeed": None, "fsdp": None, "world_size": 1, "n_gpu": 1, "torch_compile": False}
    plain |= {"neftune_noise_alpha": None, "load_best_model_at_end": False}
    huggingface.check_arguments(SimpleNamespace(**plain))
    for changed, said in (
        ({"fsdp": True}, "FSDP cannot be recorded; train with fsdp=None"),
        ({"deepspeed": "config.json"}, "DeepSpeed cannot be recorded"),
        ({"world_size": 4}, "training in 4 processes cannot be recorded; train with one process, which sees all ids"),
        ({"n_gpu": 2}, "DataParallel over 2 GPUs"),
        ({"torch_compile": True}, "a compiled model cannot be recorded"),
        ({"neftune_noise_alpha": 5.0}, "NEFTune's noise cannot be recorded"),
        ({"load_best_model_at_end": True}, "a training that ends with earlier weights cannot be recorded"),
    ):
        with pytest.raises(UnsupportedError, match=said):
            huggingface.check_arguments(SimpleNamespace(**plain | changed))


def test_a_trainer_whose_columns_are_removed_is_told_to_keep_them(tmp_path: Path) -> None:
    trainer = hugging(vit(), tmp_path, huggingface.RecorderCallback(tmp_path / "path"), remove_unused_columns=True)
    with pytest.raises(DataError, match=r"under 'ids', found the keys .*remove_unused_columns=False"):
        trainer.train()
    named = hugging(
        vit(), tmp_path, huggingface.RecorderCallback(tmp_path / "path", ids="index"), data=Rows(key="index")
    )
    named.train()
    assert PathReader(tmp_path / "path").largest_id == TRAIN - 1


# ---------------------------------------------------------------------------------------------- the readme and packages


def test_the_readmes_blocks_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```py\n(from brittle.integrations.*?)^```", readme, re.MULTILINE | re.DOTALL)
    under_lightning, under_trainer = blocks
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    module, model, few = Digits(), vit(), Subset(Rows(), range(40))
    exec(under_lightning, {"lightning": import_module("lightning"), "module": module, "loader": loader()})
    exec(under_trainer, {"transformers": import_module("transformers"), "model": model, "data": few})
    assert_closes(ledger_of(module, Path("runs/lightning")))
    assert_closes(ledger_of(model, Path("runs/huggingface")), least=0.005)


@pytest.mark.parametrize(
    ("module", "missing", "remedy"),
    [
        ("lightning", ("lightning", "lightning.pytorch", "pytorch_lightning"), "brittle[lightning]"),
        ("huggingface", ("transformers", "accelerate", "accelerate.optimizer"), "brittle[huggingface]"),
    ],
)
def test_a_missing_package_is_named_with_the_remedy(
    module: str, missing: tuple[str, ...], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"brittle.integrations.{module}")
    with pytest.raises(brittle.integrations.MissingPackageError) as caught:
        import_module(f"brittle.integrations.{module}")
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ImportError)


def test_the_package_under_its_other_name_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "brittle.integrations.lightning")
    monkeypatch.setattr(brittle.integrations, "lightning", lightning)  # put back in the end
    again = import_module("brittle.integrations.lightning")
    assert issubclass(again.RecorderCallback, import_module("pytorch_lightning").Callback)


def test_the_package_of_callbacks_is_light() -> None:
    heavy = ("torch", "lightning", "pytorch_lightning", "transformers", "accelerate")
    script = f"import sys, brittle.integrations; print([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"

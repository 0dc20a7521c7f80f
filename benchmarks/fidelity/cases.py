"""The cases: optimizer x model x what the loop does, crossed so that each of them meets several of the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.fidelity import draws, loops, models, starts
from benchmarks.fidelity.optimizers import Lion, Make, by_kind, in_groups, of, without_first
from benchmarks.fidelity.problem import BATCH, EPOCHS, TRAIN
from brittle.augmentation import Augment

STEPS = EPOCHS * TRAIN // BATCH

Schedule = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]


@dataclass(frozen=True)
class Case:
    """One kind of training.

    gather: batches a step. average: of the weights, begun after step `average_after`; it is the audited model.
    prepare: what happens to the model before the training. repeats: an example may be twice in a batch. resumed: the
    training is killed and taken up again. known: whether the optimizer's rule is; mixed: whether precision is.
    """

    name: str
    model: models.Build
    optimizer: Make
    draw: draws.Draw = draws.plain
    take: loops.Take = loops.plainly
    gather: int = 1
    clip: loops.Clip = loops.unclipped
    schedule: Schedule | None = None
    loss: loops.Loss = F.cross_entropy
    average: Callable[[nn.Module], AveragedModel] | None = None
    average_after: int = 0
    prepare: Callable[[nn.Module], None] | None = None
    augment: Augment | None = None
    repeats: bool = False
    resumed: bool = False
    known: bool = True
    mixed: bool = False

    @property
    def binary(self) -> bool:
        """Whether the model has a single logit."""
        return self.model is models.binary


def warm_up(optimizer: Optimizer) -> LRScheduler:
    """Linear warm-up, then a cosine."""
    parts = [LinearLR(optimizer, 0.1, total_iters=8), CosineAnnealingLR(optimizer, STEPS - 8)]
    return SequentialLR(optimizer, parts, milestones=[8])


def exponential(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


def exponential_with_statistics(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)


_OPTIMIZERS = (
    Case("sgd", models.mlp, of(SGD, lr=0.2)),
    Case("sgd momentum", models.cnn, of(SGD, lr=0.2, momentum=0.9)),
    Case("sgd dampening l2", models.layer_norm, of(SGD, lr=0.04, momentum=0.9, dampening=0.3, weight_decay=0.01)),
    Case("sgd nesterov l2", models.batch_norm, of(SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)),
    Case("sgd maximize", models.group_norm, of(SGD, lr=0.05, momentum=0.9, maximize=True), loss=loops.negated),
    Case("sgd foreach", models.residual, of(SGD, lr=0.05, momentum=0.9, foreach=True)),
    Case("sgd fused", models.Attention, of(SGD, lr=0.02, momentum=0.9, fused=True)),
    Case("adam", models.batch_norm, of(Adam, lr=0.003)),
    Case("adam l2", models.Attention, of(Adam, lr=0.01, weight_decay=0.01)),
    Case("adam maximize", models.cnn, of(Adam, lr=0.01, maximize=True), loss=loops.negated),
    Case("adam decoupled", models.mlp, of(Adam, lr=0.005, weight_decay=0.05, decoupled_weight_decay=True)),
    Case("adam fused", models.residual, of(Adam, lr=0.003, fused=True)),
    Case("adamw", models.residual, of(AdamW, lr=0.003, weight_decay=0.05)),
    Case("adamw amsgrad", models.layer_norm, of(AdamW, lr=0.001, amsgrad=True)),
    Case("adamw foreach", models.Tokens, of(AdamW, lr=0.01, foreach=True)),
    Case("rmsprop", models.mlp, of(RMSprop, lr=0.002)),
    Case("rmsprop momentum l2", models.group_norm, of(RMSprop, lr=0.0002, momentum=0.9, weight_decay=0.01)),
    Case("rmsprop centered", models.batch_norm, of(RMSprop, lr=0.001, centered=True, momentum=0.5)),
    Case("adagrad", models.Tokens, of(Adagrad, lr=0.015)),
    Case("adagrad decay l2", models.cnn, of(Adagrad, lr=0.01, lr_decay=0.01, weight_decay=0.01)),
    Case("nadam", models.residual, of(NAdam, lr=0.003)),
    Case("nadam decoupled", models.Attention, of(NAdam, lr=0.002, weight_decay=0.05, decoupled_weight_decay=True)),
    Case("radam", models.batch_norm, of(RAdam, lr=0.02)),
    Case("radam l2", models.layer_norm, of(RAdam, lr=0.02, weight_decay=0.01)),
    Case("adamax", models.Shared, of(Adamax, lr=0.005)),
    Case("two groups adamw", models.Attention, by_kind(AdamW, lr=0.01, weight_decay=0.1)),
    Case(
        "groups of their own",
        models.layer_norm,
        in_groups(SGD, {"lr": 0.05}, {"momentum": 0.9}, {"momentum": 0.5, "nesterov": True}, lr=0.01),
    ),
    Case("frozen sgd", models.cnn, without_first(SGD, lr=0.2, momentum=0.9)),
    Case("frozen adamw", models.mlp, without_first(AdamW, lr=0.02)),
    Case("missing gradients sgd", models.Idle, of(SGD, lr=0.05, momentum=0.9, weight_decay=0.01)),
    Case("missing gradients adamw", models.Idle, of(AdamW, lr=0.005)),
    Case("unknown: lion", models.mlp, of(Lion, lr=0.003), known=False),
    Case("unknown: adadelta", models.batch_norm, of(Adadelta, lr=0.5), known=False),
    Case("unknown: asgd", models.cnn, of(ASGD, lr=0.1), known=False),
    Case("unknown: rprop", models.mlp, of(Rprop, lr=0.0002), known=False),
)

_MODELS = (
    Case("dropout", models.dropout, of(SGD, lr=0.2, momentum=0.9)),
    Case("dropout batch norm adamw", models.batch_norm_dropout, of(AdamW, lr=0.003)),
    Case("attention dropout", models.attention_dropout, of(Adam, lr=0.01)),
    Case("weight sharing", models.Shared, of(SGD, lr=0.03, momentum=0.9)),
    Case("recurrent", models.Recurrent, of(AdamW, lr=0.03)),
    Case("dict output", models.in_dict, of(RMSprop, lr=0.002)),
    Case("tuple output", models.in_tuple, of(NAdam, lr=0.005)),
    Case("single logit", models.binary, of(SGD, lr=0.2, momentum=0.5), loss=loops.binary),
)

_LOOPS = (
    Case("warm-up and cosine", models.Attention, of(AdamW, lr=0.01), schedule=warm_up),
    Case(
        "one cycle (momentum too)",
        models.batch_norm,
        of(SGD, lr=0.05, momentum=0.9),
        schedule=lambda o: OneCycleLR(o, 0.1, total_steps=STEPS + 1),
    ),
    Case(
        "one cycle adam (betas too)",
        models.layer_norm,
        of(Adam, lr=0.005),
        schedule=lambda o: OneCycleLR(o, 0.005, total_steps=STEPS + 1),
    ),
    Case("warm restarts", models.cnn, of(Adam, lr=0.01), schedule=lambda o: CosineAnnealingWarmRestarts(o, 16)),
    Case("steps down", models.mlp, of(RMSprop, lr=0.003), schedule=lambda o: StepLR(o, 16, 0.3)),
    Case("plateau", models.mlp, of(SGD, lr=0.5), schedule=lambda o: ReduceLROnPlateau(o, factor=0.5, patience=2)),
    Case("clip by norm", models.Attention, of(AdamW, lr=0.01), clip=loops.by_norm(0.5)),
    Case("clip by norm sgd", models.residual, of(SGD, lr=0.1, momentum=0.9), clip=loops.by_norm(0.5)),
    Case("clip by value", models.cnn, of(SGD, lr=0.2, momentum=0.9, weight_decay=0.01), clip=loops.by_value(0.02)),
    Case("clip by value adam", models.batch_norm, of(Adam, lr=0.003), clip=loops.by_value(0.002)),
    Case("accumulation", models.cnn, of(SGD, lr=0.1, momentum=0.9), draw=draws.shuffled(16), gather=2),
    Case(
        "accumulation, clipped, batch norm",
        models.batch_norm,
        of(AdamW, lr=0.003),
        draw=draws.shuffled(16),
        gather=4,
        clip=loops.by_norm(0.5),
    ),
    Case("accumulation, incomplete", models.mlp, of(NAdam, lr=0.003), draw=draws.shuffled(24), gather=2),
    Case("accumulation, dropout", models.dropout, of(Adam, lr=0.01), draw=draws.shuffled(16), gather=2),
    Case("scaler, a skipped step", models.cnn, of(SGD, lr=0.2, momentum=0.9), take=loops.scaled(False)),
    Case(
        "scaler, clipped, accumulated",
        models.layer_norm,
        of(AdamW, lr=0.003),
        draw=draws.shuffled(16),
        gather=2,
        take=loops.scaled(False),
        clip=loops.by_norm(0.5),
    ),
    Case("scaler inside a fused step", models.mlp, of(AdamW, lr=0.005, fused=True), take=loops.scaled(False)),
    Case(
        "mixed precision sgd",
        models.cnn,
        of(SGD, lr=0.2, momentum=0.9),
        take=loops.scaled(True),
        clip=loops.by_norm(1.0),
        mixed=True,
    ),
    Case("mixed precision adamw", models.residual, of(AdamW, lr=0.003), take=loops.scaled(True), mixed=True),
    Case("mixed precision attention", models.Attention, of(AdamW, lr=0.01), take=loops.scaled(True), mixed=True),
    Case("label smoothing", models.group_norm, of(AdamW, lr=0.003), loss=loops.smoothed),
    Case("class weights", models.mlp, of(RMSprop, lr=0.002, momentum=0.5), loss=loops.by_class),
    Case("mixup", models.layer_norm, of(SGD, lr=0.05, momentum=0.9), draw=draws.mixed_up),
    Case("mixup batch norm", models.batch_norm, of(AdamW, lr=0.003), draw=draws.mixed_up),
    Case("weights by example", models.mlp, of(Adam, lr=0.005), draw=draws.weighted, loss=loops.by_example),
    Case("ema", models.cnn, of(SGD, lr=0.2, momentum=0.9), average=exponential),
    Case("ema of statistics too", models.batch_norm, of(AdamW, lr=0.003), average=exponential_with_statistics),
    Case("swa", models.layer_norm, of(SGD, lr=0.04, momentum=0.9), average=AveragedModel, average_after=STEPS // 2),
    Case("fine-tuning", models.residual, of(AdamW, lr=0.001), prepare=starts.pretrained),
    Case("fine-tuning, frozen trunk", models.batch_norm, of(SGD, lr=0.1, momentum=0.9), prepare=starts.frozen_trunk),
    Case("resumed", models.batch_norm, of(AdamW, lr=0.003), schedule=warm_up, resumed=True),
    Case("resumed, dropout", models.dropout, of(SGD, lr=0.2, momentum=0.9), resumed=True),
    Case(
        "resumed ema",
        models.mlp,
        of(RAdam, lr=0.03),
        average=exponential,
        resumed=True,
    ),
    Case("closure", models.mlp, of(SGD, lr=0.1, momentum=0.9), take=loops.by_closure),
    Case("closure adam", models.batch_norm, of(Adam, lr=0.003), take=loops.by_closure),
    Case("noted before the forward pass", models.dropout, of(AdamW, lr=0.01), take=loops.noted_first),
)

_DATA = (
    Case("augmentation", models.cnn, of(AdamW, lr=0.01), draw=draws.augmented(), augment=draws.AUGMENTATION),
    Case(
        "augmentation by workers",
        models.batch_norm,
        of(SGD, lr=0.05, momentum=0.9),
        draw=draws.augmented(workers=2),
        augment=draws.AUGMENTATION,
    ),
    Case("stored inputs", models.residual, of(Adamax, lr=0.005), draw=draws.noisy),
    Case("adversarial training", models.batch_norm, of(AdamW, lr=0.003), draw=draws.attacked(False)),
    Case("adversarial, training mode", models.dropout, of(SGD, lr=0.2, momentum=0.9), draw=draws.attacked(True)),
    Case("with replacement", models.cnn, of(Adam, lr=0.01), draw=draws.uniform_with_replacement, repeats=True),
    Case(
        "with replacement, balanced",
        models.batch_norm,
        of(SGD, lr=0.05),
        draw=draws.balanced_with_replacement,
        repeats=True,
    ),
    Case("incomplete last batch", models.batch_norm, of(AdamW, lr=0.003), draw=draws.shuffled(40)),
    Case("iterable data set", models.mlp, of(Adagrad, lr=0.03), draw=draws.streamed),
    Case("loader workers", models.cnn, of(SGD, lr=0.2, momentum=0.9), draw=draws.by_workers),
    Case("other data every epoch", models.mlp, of(AdamW, lr=0.005), draw=draws.growing),
)

CASES = {case.name: case for case in _OPTIMIZERS + _MODELS + _LOOPS + _DATA}

QUICK = ("sgd momentum", "adam", "scaler, a skipped step", "augmentation", "unknown: lion")
"""The cases of a smoke test."""

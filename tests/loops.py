"""One plain training loop with everything that people do in theirs, and notes of all that it saw.

Nothing of the package's mathematics: the loop takes torch's optimizer and tells a recorder, where there is one, what
a user would tell it. The notes (`reference.Seen`) are what the slow account is made from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from reference import Loss, Seen, SeenPass, SeenStep, State, logits_in
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import update_bn

BATCH = 4


@dataclass(frozen=True)
class Averaging:
    """A running average of the weights, which is audited in their place.

    keep: how much of the average so far the n-th update (from 0) keeps. begin: steps before the first update;
    every: steps from update to update. refresh: whether its running statistics are found anew in the end.
    """

    make: Callable[[nn.Module], nn.Module]
    update: Callable[[nn.Module, nn.Module], None]  # (average, model)
    keep: Callable[[int], float]
    begin: int = 1
    every: int = 1
    refresh: bool = False


@dataclass(frozen=True)
class Recipe:
    """How a case is trained: the optimizer, and what the loop does besides."""

    optimizer: Callable[[nn.Module], Optimizer]
    schedule: Callable[[Optimizer], LRScheduler] | None = None
    loss: Loss | None = None  # (logits, targets[, weights]) -> scalar
    clip: float | None = None  # all gradients by their norm
    change: Callable[[nn.Module], object] | None = None  # what else is done to gradients before the step
    passes: int = 1  # forward and backward passes a step: gradient accumulation
    weighted: bool = False  # examples have weights, which the loss takes
    mixup: bool = False
    augment: Callable[[Tensor, int, int], Tensor] | None = None  # (input, id, epoch) -> input
    attack: Literal["eval", "train", "backward"] | None = None  # inputs made by FGSM, against the model in this mode
    scaler: Callable[[], torch.amp.GradScaler] | None = None  # skips the steps OVERFLOWS
    fused: bool = False  # the optimizer itself takes the scale out, and skips the step
    average: Averaging | None = None
    tuned: bool = False  # from weights that an earlier training left
    replacement: bool = False  # the sampler may draw an example twice
    epochs: bool = False  # all examples, batch by batch, the last one incomplete
    told: Literal["before", "after"] = "after"  # the forward pass
    closure: bool = False
    resting: bool = False  # batch normalization in evaluation mode
    keep_zeros: bool = False  # zero_grad(set_to_none=False)
    between: Callable[[nn.Module, Optimizer, int], None] | None = None  # done before each step, which is counted
    resume: int | None = None  # the step after which a checkpoint is taken up again


OVERFLOWS = (2, 3, 7)
"""The passes whose loss is infinite under a gradient scaler."""


class Loop:
    """A training as a user writes it. `steps` are its notes, `tell` is the recorder's `batch`."""

    def __init__(
        self, model: nn.Module, recipe: Recipe, data: tuple[Tensor, Tensor], place: Tensor, loss: Loss
    ) -> None:
        self.model, self.recipe, (self.inputs, self.targets) = model, recipe, data
        self.place, self.loss = place, recipe.loss or loss
        self.optimizer = recipe.optimizer(model)
        self.schedule = recipe.schedule(self.optimizer) if recipe.schedule else None
        self.scaler = recipe.scaler() if recipe.scaler else None
        self.average = recipe.average.make(model) if recipe.average else None
        self.order = torch.Generator().manual_seed(0)
        self.passes = self.updates = 0
        self.left: list[int] = []
        self.steps: list[SeenStep] = []
        self.shares = [1.0]  # of each step's weights in the average
        self.tell: Callable[..., None] = lambda *_, **__: None

    def run(self, steps: int) -> None:
        """Train until so many steps were taken, those before included."""
        while len(self.steps) < steps:
            self._step()

    def finish(self) -> None:
        """What is done when the last step is taken."""
        if self.recipe.average and self.recipe.average.refresh:
            update_bn([self.inputs], self.average)
        self.model.eval()

    @property
    def audited(self) -> nn.Module:
        """The trained model, its average where there is one."""
        return getattr(self.average, "module", self.average or self.model).eval()

    def seen(self) -> Seen:
        """The notes of the whole training."""
        final = state_of(self.audited)
        seen = Seen(
            copy.deepcopy(self.model).eval(),
            type(self.optimizer).__name__,
            self.steps,
            final,
            self.inputs,
            self.targets,
            self.loss,
        )
        return replace(seen, last=state_of(self.model), average=torch.tensor(self.shares)) if self.average else seen

    def checkpoint(self) -> dict[str, Any]:
        """What a user saves to resume the training."""
        parts = {n: getattr(self, n) for n in ("model", "optimizer", "schedule", "scaler", "average")}
        saved = {n: copy.deepcopy(part.state_dict()) for n, part in parts.items() if part is not None}
        notes = {n: copy.copy(getattr(self, n)) for n in ("passes", "updates", "left", "steps", "shares")}
        return {"parts": saved, "notes": notes, "order": self.order.get_state(), "random": torch.get_rng_state()}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take a training up again, in a new process as it were."""
        for name, state in saved["parts"].items():
            getattr(self, name).load_state_dict(state)
        for name, value in saved["notes"].items():
            setattr(self, name, value)
        self.order.set_state(saved["order"])
        torch.set_rng_state(saved["random"])

    # one step ------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        before, stepped = state_of(self.model), False
        if self.recipe.between:
            self.recipe.between(self.model, self.optimizer, len(self.steps))
        while not stepped:
            stepped = self._closure_step(before) if self.recipe.closure else self._plain_step(before)
        if self.schedule:
            self.schedule.step()
        if self.recipe.average:
            self._average(self.recipe.average)

    def _plain_step(self, before: State) -> bool:
        """Backward, then step; False where the scaler skips the step."""
        self.optimizer.zero_grad(set_to_none=not self.recipe.keep_zeros)
        passes = [self._pass(self._draw()) for _ in range(self.recipe.passes)]
        if self.scaler and not self.recipe.fused:
            self.scaler.unscale_(self.optimizer)
        raw = self._gradients()
        self._change()
        factor, settings = self._shrunk(raw), self._settings()
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if not all(g.isfinite().all() for g in raw.values()):
                return False
        else:
            self.optimizer.step()
        self.steps.append(SeenStep(before, passes, factor, settings, self._observed()))
        return True

    def _closure_step(self, before: State) -> bool:
        """The optimizer itself asks for the gradients."""
        drawn, made = self._draw(), []
        self._tell(drawn)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            seen, loss = self._forward(drawn)
            loss.backward()
            raw = self._gradients()
            self._change()
            made.append(([seen], self._shrunk(raw), self._settings()))
            return loss

        self.optimizer.step(closure)
        self.steps.append(SeenStep(before, *made[0], self._observed()))
        return True

    def _pass(self, drawn: SeenPass) -> SeenPass:
        """One forward and backward pass, told to the recorder before or after it."""
        if self.recipe.told == "before":
            self._tell(drawn)
        seen, loss = self._forward(drawn)
        if self.scaler:
            loss = self.scaler.scale(loss * (torch.inf if self.passes in OVERFLOWS else 1.0))
        loss.backward()
        if self.recipe.told == "after":
            self._tell(drawn)
        return seen

    def _forward(self, drawn: SeenPass) -> tuple[SeenPass, Tensor]:
        self._set_modes()
        random, extra = torch.get_rng_state(), () if drawn.weights is None else (drawn.weights,)
        loss = self.loss(logits_in(self.model(drawn.inputs)), drawn.targets, *extra) * drawn.part
        training = frozenset(name for name, module in self.model.named_modules() if module.training)
        return replace(drawn, random=random, training=training), loss

    def _set_modes(self) -> None:
        self.model.train()
        if self.recipe.resting:
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def _change(self) -> None:
        if self.recipe.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        if self.recipe.change:
            self.recipe.change(self.model)

    def _average(self, how: Averaging) -> None:
        """Update the average, and the shares that the weights of each step have in it."""
        since = len(self.steps) - how.begin
        self.shares.append(0.0)
        if since >= 0 and since % how.every == 0:
            assert self.average is not None
            how.update(self.average, self.model)
            keep = how.keep(self.updates)
            self.shares = [keep * share for share in self.shares]
            self.shares[-1] += 1 - keep
            self.updates += 1

    # the data ------------------------------------------------------------------------------------------------------

    def _draw(self) -> SeenPass:
        """The next batch, as the model will be given it."""
        self.passes += 1
        ids = self.place[self._positions()]
        inputs, targets, shares, weights = self.inputs[ids], self.targets[ids], None, None
        if self.recipe.augment:
            inputs = torch.stack([self.recipe.augment(self.inputs[i], i, self.passes) for i in ids.tolist()])
        if self.recipe.mixup:
            ids, shares, inputs, targets = self._mixed(ids)
        if self.recipe.attack:
            inputs = self._attacked(inputs, targets)
        if self.recipe.weighted:
            weights = torch.rand(len(ids), generator=self.order) + 0.5
        return SeenPass(ids, inputs, targets, part=1 / self.recipe.passes, shares=shares, weights=weights)

    def _positions(self) -> Tensor:
        count = len(self.inputs)
        if self.recipe.epochs:
            self.left = self.left or torch.randperm(count, generator=self.order).tolist()
            drawn, self.left = self.left[:BATCH], self.left[BATCH:]
            return torch.tensor(drawn)
        drawn = torch.randperm(count, generator=self.order)[:BATCH]
        return drawn // 3 if self.recipe.replacement else drawn

    def _mixed(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mixup: each row is drawn between its example and another one of the batch."""
        both = torch.stack([ids, ids[torch.randperm(len(ids), generator=self.order)]], 1)
        share = torch.rand(len(ids), generator=self.order)
        shares = torch.stack([share, 1 - share], 1)
        hard = F.one_hot(self.targets, int(self.targets.max()) + 1).to(self.inputs.dtype)
        inputs, targets = (torch.einsum("bk,bk...->b...", shares, part[both]) for part in (self.inputs, hard))
        return both, shares, inputs, targets

    def _attacked(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The fast gradient sign method (Goodfellow et al. 2014) against the model as it is now."""
        self.model.train(self.recipe.attack != "eval")
        inputs = inputs.clone().requires_grad_(True)
        loss = self.loss(logits_in(self.model(inputs)), targets)
        if self.recipe.attack == "backward":  # through the weights as well, whose gradients are thrown away
            loss.backward()
            pull = inputs.grad
            self.optimizer.zero_grad()
        else:
            [pull] = torch.autograd.grad(loss, inputs)
        return (inputs + 0.1 * pull.sign()).clamp(0, 1).detach()

    def _tell(self, drawn: SeenPass) -> None:
        """The recorder's line in the loop: nothing is told that it could know itself."""
        told: dict[str, Any] = {}
        if drawn.shares is not None:
            told |= {"shares": drawn.shares, "inputs": drawn.inputs, "targets": drawn.targets}
        if drawn.weights is not None:
            told["weights"] = drawn.weights
        if self.recipe.attack:
            told["inputs"] = drawn.inputs
        if self.recipe.augment:
            told["epoch"] = self.passes
        self.tell(drawn.ids, **told)

    # notes ---------------------------------------------------------------------------------------------------------

    def _gradients(self) -> State:
        return {n: p.grad.clone() for n, p in self._held().items()}

    def _shrunk(self, raw: State) -> State:
        """By what each coordinate of the gradient was multiplied: 1 where it was zero, 0 where it was not asked for."""
        held, given = self._held(), self._gradients()
        return {n: torch.where(g == 0, 1.0, given[n] / g) * held[n].requires_grad for n, g in raw.items()}

    def _settings(self) -> dict[str, dict[str, Any]]:
        groups = self.optimizer.param_groups
        of = {id(p): {k: v for k, v in g.items() if k != "params"} for g in groups for p in g["params"]}
        return {n: of[id(p)] for n, p in self._held().items()}

    def _observed(self) -> dict[str, State]:
        held = {n: self.optimizer.state.get(p, {}) for n, p in self._held().items()}
        return {n: {k: v.clone() for k, v in s.items() if isinstance(v, Tensor)} for n, s in held.items()}

    def _held(self) -> dict[str, nn.Parameter]:
        """The parameters that this step moves: the optimizer has them, and they have a gradient."""
        moved = {id(p) for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None}
        return {n: p for n, p in self.model.named_parameters() if id(p) in moved}


def state_of(model: nn.Module) -> State:
    """Copies of a model's parameters and running statistics, tied ones once."""
    floats = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    return {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *floats.items())}

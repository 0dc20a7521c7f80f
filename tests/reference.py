"""The slow, obvious account of a training, in float64: one loop an axis, nothing shared with the package's mathematics.

Each example keeps its own optimizer buffer and is walked forward through the training,

    displacement of example i in step s  =  what its gradients so far, spent by the optimizer, did to the weights,
    contribution of example i            =  sum_s  integral J(x; w_s + t D_s) . displacement_i,s dt,

with every gradient by plain autograd, one example at a time. Written from the documentation of torch.optim and
from the identity f(x; w_S) - f(x; w_0) = sum_s integral J D_s, not from `brittle`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

State = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SeenStep:
    """What a training loop sees of one step."""

    before: State  # parameters and running statistics
    ids: Tensor
    clip: float  # by how much gradients were shrunk before the optimizer saw them
    settings: Mapping[str, Mapping[str, Any]]  # of each parameter that the optimizer moves: lr, momentum, ...
    second: State  # Adam's exp_avg_sq after the step


@dataclass(frozen=True)
class Seen:
    """What a training loop sees of the whole training."""

    model: nn.Module
    optimizer: str
    steps: list[SeenStep]
    final: State
    inputs: Tensor
    targets: Tensor
    loss: Loss

    def state(self, step: int) -> State:
        return self.steps[step].before if step < len(self.steps) else self.final


@dataclass(frozen=True)
class Account:
    """The rows of the ledger, each (M,), and contributions (M, N)."""

    start: Tensor
    contributions: Tensor
    decay: Tensor
    buffers: Tensor
    residual: Tensor
    output: Tensor


# ---------------------------------------------------------------------------------------------------------- gradients


def logits(model: nn.Module, state: State, x: Tensor, training: bool = False) -> Tensor:
    """The model's output at any state; batch normalization is written out, so that its statistics have gradients."""
    if not isinstance(model, nn.Sequential):
        return logits_in(functional_call(model, state, (x,)))
    for name, layer in model.named_children():
        own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
        x = _normalized(layer, own, x, training) if isinstance(layer, _BatchNorm) else functional_call(layer, own, (x,))
    return x


def logits_in(output: Any) -> Tensor:
    """The logits in a tensor, in a dict that names them, or in front of a tuple."""
    return output["logits"] if isinstance(output, dict) else output[0] if isinstance(output, tuple) else output


def _normalized(layer: _BatchNorm, own: State, x: Tensor, training: bool) -> Tensor:
    wide = [1, -1, *[1] * (x.dim() - 2)]
    over = [0, *range(2, x.dim())]
    mean = x.mean(over) if training else own["running_mean"]
    variance = x.var(over, unbiased=False) if training else own["running_var"]
    x = (x - mean.reshape(wide)) / (variance.reshape(wide) + layer.eps).sqrt()
    return x * own["weight"].reshape(wide) + own["bias"].reshape(wide)


def example_gradients(seen: Seen, step: SeenStep) -> list[State]:
    """The gradient of each example of a step's batch, its weight of 1/B in the mean loss included."""
    return [
        gradient(
            lambda w, i=i: (
                seen.loss(logits(seen.model, step.before | w, seen.inputs[i : i + 1]), seen.targets[i : i + 1])
                / len(step.ids)
            ),
            trained_part(seen, step.before),
        )
        for i in step.ids.tolist()
    ]


def row_gradients(seen: Seen, step: SeenStep) -> list[State]:
    """The row split: every row of the batch has its own copy of the weights, and the batch's statistics are shared.

    The gradient of the batch's loss with respect to row i's copy is the part that passes through row i's own
    activations. Only for `nn.Sequential`.
    """
    rows = step.ids.tolist()
    copies = [{k: v.clone().requires_grad_(True) for k, v in trained_part(seen, step.before).items()} for _ in rows]
    x = seen.inputs[step.ids]
    for name, layer in seen.model.named_children():
        own = [{k.removeprefix(f"{name}."): v for k, v in c.items() if k.startswith(f"{name}.")} for c in copies]
        if isinstance(layer, _BatchNorm):
            over, wide = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
            mean, variance = x.mean(over, keepdim=True), x.var(over, unbiased=False, keepdim=True)
            x = (x - mean) / (variance + layer.eps).sqrt()
            x = torch.cat([x[[i]] * w["weight"].reshape(wide) + w["bias"].reshape(wide) for i, w in enumerate(own)])
        else:
            x = torch.cat([functional_call(layer, w, (x[[i]],)) for i, w in enumerate(own)])
    loss = seen.loss(x, seen.targets[step.ids])
    found = [dict(zip(c, torch.autograd.grad(loss, list(c.values()), retain_graph=True), strict=True)) for c in copies]
    for name in found[0]:  # where the rows cancel, as for a bias before the normalization, nothing is shared out
        every = torch.stack([g[name] for g in found])
        nothing = every.sum(0).abs() < 1e-13 * every.abs().sum(0)
        for g in found:
            g[name] = torch.where(nothing, 0.0, g[name])
    return found


def loss_term_gradients(seen: Seen, step: SeenStep) -> list[State]:
    """The other split under batch normalization: the gradient of each example's own loss, other rows included."""
    found = []
    for k in range(len(step.ids)):

        def own(w: State, k: int = k) -> Tensor:
            out = logits(seen.model, step.before | w, seen.inputs[step.ids], training=True)
            return seen.loss(out[[k]], seen.targets[step.ids[[k]]]) / len(step.ids)

        found.append(gradient(own, trained_part(seen, step.before)))
    return found


def gradient(scalar: Callable[[State], Tensor], at: State) -> State:
    """Plain autograd: zero where the scalar does not depend on a tensor."""
    leaves = {k: v.clone().requires_grad_(True) for k, v in at.items()}
    found = torch.autograd.grad(scalar(leaves), list(leaves.values()), allow_unused=True)
    return {k: torch.zeros_like(v) if g is None else g for (k, v), g in zip(leaves.items(), found, strict=True)}


def trained_part(seen: Seen, state: State) -> State:
    """The parameters among a state's tensors."""
    return {name: state[name] for name, _ in seen.model.named_parameters()}


def flat(state: State, seen: Seen) -> Tensor:
    """One vector: the parameters in their order, then the running statistics."""
    floats = [name for name, b in seen.model.named_buffers() if b.is_floating_point()]
    names = [name for name, _ in seen.model.named_parameters()] + floats
    return torch.cat([(state[n] if n in state else torch.zeros_like(seen.final[n])).reshape(-1) for n in names])


# ------------------------------------------------------------------------------------------------------- displacements


def displacements(seen: Seen, gradients: Callable[[Seen, SeenStep], list[State]] = example_gradients) -> Tensor:
    """What every example did to the weights in every step: (S, N + 1, P), decay in the last row.

    One optimizer buffer an example, also while it is in no batch, and one for L2 decay.
    """
    count = len(seen.inputs)
    buffers: list[State] = [{} for _ in range(count + 1)]
    out = []
    for t, step in enumerate(seen.steps, start=1):
        in_batch: list[list[State]] = [[] for _ in range(count)]
        for i, g in zip(step.ids.tolist(), gradients(seen, step), strict=True):
            in_batch[i].append(g)
        moved: list[State] = []
        for i in range(count + 1):
            own: State = {}
            for name, s in step.settings.items():
                weight = step.before[name]
                if i < count:
                    spent = sum((step.clip * g[name] for g in in_batch[i]), torch.zeros_like(weight))
                else:
                    spent = 0 * weight if _decoupled(seen, s) else s["weight_decay"] * weight
                own[name] = _spend(seen, s, t, buffers[i], name, spent, step)
                if i == count and _decoupled(seen, s):
                    own[name] = own[name] - s["lr"] * s["weight_decay"] * weight
            moved.append(own)
        out.append(torch.stack([flat(m | _still(seen), seen) for m in moved]))
    return torch.stack(out)


def _decoupled(seen: Seen, settings: Mapping[str, Any]) -> bool:
    return seen.optimizer == "AdamW" or bool(settings.get("decoupled_weight_decay"))


def _still(seen: Seen) -> State:
    return {k: torch.zeros_like(v) for k, v in seen.final.items() if k not in dict(seen.model.named_parameters())}


def _spend(seen: Seen, s: Mapping[str, Any], t: int, buffer: State, name: str, spent: Tensor, step: SeenStep) -> Tensor:
    """The displacement of one parameter by one example, from the formulas of torch.optim."""
    if seen.optimizer == "SGD":
        if s["momentum"] == 0:
            return -s["lr"] * spent
        first = t == 1
        buffer[name] = spent if first else s["momentum"] * buffer[name] + (1 - s["dampening"]) * spent
        return -s["lr"] * (spent + s["momentum"] * buffer[name] if s["nesterov"] else buffer[name])
    beta1, beta2 = s["betas"]
    buffer[name] = beta1 * buffer.get(name, torch.zeros_like(spent)) + (1 - beta1) * spent
    root = (step.second[name] / (1 - beta2**t)).sqrt() + s["eps"]
    return -s["lr"] * (buffer[name] / (1 - beta1**t)) / root


# ------------------------------------------------------------------------------------------------------------- account


def output(seen: Seen, state: State, x: Tensor, pair: tuple[int, int]) -> Tensor:
    """The margin of a pair of classes at one input, in evaluation mode; a single logit z counts as (0, z)."""
    found = logits(seen.model, state, x[None])
    found = found.reshape(-1)
    found = torch.cat([torch.zeros(1), found]) if len(found) == 1 else found
    return found[pair[0]] - found[pair[1]]


def jacobian(seen: Seen, state: State, x: Tensor, pair: tuple[int, int]) -> Tensor:
    """The gradient of one output with respect to parameters and running statistics, (P,)."""
    return flat(gradient(lambda w: output(seen, w, x, pair), state), seen)


def account(
    seen: Seen,
    moved: Tensor,
    inputs: Tensor,
    pairs: Sequence[tuple[int, int]],
    nodes: int,
    cuts: Sequence[int] | None = None,
) -> Account:
    """The ledger of every input. moved: (S, N + 1, P). cuts: steps between which the path is taken as straight."""
    cuts = list(range(len(seen.steps) + 1)) if cuts is None else cuts
    count, size = moved.shape[1] - 1, sum(p.numel() for p in seen.model.parameters())
    rows: dict[str, list[Tensor]] = {name: [] for name in Account.__dataclass_fields__}
    for x, pair in zip(inputs, pairs, strict=True):
        contributions, decay, buffers = torch.zeros(count), torch.zeros(()), torch.zeros(())
        for a, b in pairwise(cuts):
            low, high = seen.state(a), seen.state(b)
            statistics = (flat(high, seen) - flat(low, seen))[size:]
            for k in range(nodes):
                between = {n: low[n] + (k + 0.5) / nodes * (high[n] - low[n]) for n in low}
                j = jacobian(seen, between, x, pair) / nodes
                for s in range(a, b):
                    for i in range(count):
                        contributions[i] += j @ moved[s, i]
                    decay += j @ moved[s, count]
                buffers += j[size:] @ statistics
        start, end = output(seen, seen.state(0), x, pair), output(seen, seen.final, x, pair)
        rows["start"].append(start)
        rows["contributions"].append(contributions)
        rows["decay"].append(decay)
        rows["buffers"].append(buffers)
        rows["output"].append(end)
        rows["residual"].append(end - start - contributions.sum() - decay - buffers)
    return Account(**{name: torch.stack(values).detach() for name, values in rows.items()})

"""The slow, obvious account of a training, in float64: one loop an axis, nothing shared with the package's mathematics.

Each example keeps its own optimizer buffer and is walked forward through the training,

    displacement of example i in step s  =  what its gradients so far, spent by the optimizer, did to the weights,
    contribution of example i            =  sum_s  integral J(x; w_s + t D_s) . displacement_i,s dt,

with every gradient by plain autograd, one row of a batch at a time. Written from the documentation of torch.optim and
from the identity f(x; w_S) - f(x; w_0) = sum_s integral J D_s, not from `brittle`. Where the audited weights are an
average sum_j a_j w_j of those that training went through, the straight line from w_S to them is one segment more:

    sum_j a_j w_j - w_S  =  - sum_s A_s D_s,    A_s = sum_{j <= s} a_j.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

State = dict[str, Tensor]
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class SeenPass:
    """What a training loop sees of one forward and backward pass."""

    ids: Tensor  # (B,), or (B, K) where K examples are mixed in a row
    inputs: Tensor  # as the model was given them
    targets: Tensor
    random: Tensor | None = None  # torch's random state before the forward pass
    training: frozenset[str] | None = None  # the modules that were in training mode, by default all
    part: float = 1.0  # by what the loss was multiplied, as 1/K for the mean of K passes
    shares: Tensor | None = None  # (B, K): of the examples in a row
    weights: Tensor | None = None  # (B,): third argument of the loss


@dataclass(frozen=True)
class SeenStep:
    """What a training loop sees of one step of the optimizer."""

    before: State  # parameters and running statistics
    passes: list[SeenPass]
    factor: State  # by what each coordinate of the gradient was shrunk before the optimizer saw it
    settings: Mapping[str, Mapping[str, Any]]  # of each parameter that has a gradient: lr, momentum, ...
    observed: Mapping[str, State]  # what the optimizer holds of each parameter after the step

    @property
    def ids(self) -> Tensor:
        """The examples in the order of the rows, mixed ones beside each other."""
        return torch.cat([p.ids.reshape(-1) for p in self.passes])

    @property
    def clip(self) -> float:
        """The smallest factor."""
        return min(f.min().item() for f in self.factor.values())


@dataclass(frozen=True)
class Seen:
    """What a training loop sees of the whole training."""

    model: nn.Module
    optimizer: str
    steps: list[SeenStep]
    final: State  # the audited weights
    inputs: Tensor
    targets: Tensor
    loss: Loss
    last: State | None = None  # the weights after the last step, where the audited ones are an average
    average: Tensor | None = None  # (S + 1,): share of each step's weights in the average

    @property
    def segments(self) -> int:
        """The straight lines that the path consists of."""
        return len(self.steps) + (self.average is not None)

    def state(self, at: int) -> State:
        """The state at the beginning of a segment; after the last one, the audited state."""
        if at < len(self.steps):
            return self.steps[at].before
        return self.final if self.last is None or at > len(self.steps) else self.last


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
        own = _within(name, state)
        x = _normalized(layer, own, x, training) if isinstance(layer, _BatchNorm) else functional_call(layer, own, (x,))
    return x


def logits_in(output: Any) -> Tensor:
    """The logits in a tensor, in a dict that names them, or in front of a tuple."""
    return output["logits"] if isinstance(output, dict) else output[0] if isinstance(output, tuple) else output


def _within(name: str, state: State) -> State:
    """The tensors of one layer, under the layer's own names."""
    return {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}


def _normalized(layer: _BatchNorm, own: State, x: Tensor, training: bool) -> Tensor:
    wide = [1, -1, *[1] * (x.dim() - 2)]
    over = [0, *range(2, x.dim())]
    mean = x.mean(over) if training else own["running_mean"]
    variance = x.var(over, unbiased=False) if training else own["running_var"]
    x = (x - mean.reshape(wide)) / (variance.reshape(wide) + layer.eps).sqrt()
    return x * own["weight"].reshape(wide) + own["bias"].reshape(wide)


def example_gradients(seen: Seen, step: SeenStep) -> list[State]:
    """The gradient of each example of a step's batch on its own, its weight of 1/B in the mean loss included.

    For a plain mean over a single batch, whose rows do not see each other.
    """
    [batch] = step.passes
    return [
        gradient(
            lambda w, k=k: (
                seen.loss(logits(seen.model, step.before | w, batch.inputs[[k]]), batch.targets[[k]]) / len(batch.ids)
            ),
            trained_part(seen, step.before),
        )
        for k in range(len(batch.ids))
    ]


def row_gradients(seen: Seen, step: SeenStep) -> list[State]:
    """The row split: the part of a step's gradient that passes through the activations of each row, pass by pass."""
    rows = []
    for batch in step.passes:
        coupled = any(isinstance(m, _BatchNorm) and _trains(n, batch) for n, m in seen.model.named_modules())
        rows += (_rows_in_company if coupled else _rows_apart)(seen, step.before, batch)
    return rows


def _rows_apart(seen: Seen, before: State, batch: SeenPass) -> list[State]:
    """The chain rule, where rows do not see each other: the loss pulls at each row's logits, they at the weights."""
    weights = {k: v.clone().requires_grad_(True) for k, v in trained_part(seen, before).items()}
    with _as_in(batch, seen.model):
        out = logits_in(functional_call(seen.model, before | weights, (batch.inputs,)))
    heads = out.detach().requires_grad_(True)
    [pull] = torch.autograd.grad(_loss(seen, batch, heads), heads)
    rows = []
    for k in range(len(batch.ids)):
        found = torch.autograd.grad(out[k], list(weights.values()), pull[k], retain_graph=True, allow_unused=True)
        rows.append(
            {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(weights.items(), found, strict=True)}
        )
    return rows


def _rows_in_company(seen: Seen, before: State, batch: SeenPass) -> list[State]:
    """Where rows see each other: each has its own copy of the weights, and the batch's statistics are shared.

    The gradient of the batch's loss with respect to row i's copy is the part that passes through row i's own
    activations. Only for `nn.Sequential`.
    """
    copies = [{k: v.clone().requires_grad_(True) for k, v in trained_part(seen, before).items()} for _ in batch.ids]
    with _as_in(batch, seen.model):
        out = _through_copies(seen.model, [before | own for own in copies], batch.inputs)
    loss = _loss(seen, batch, out)
    found = [dict(zip(c, torch.autograd.grad(loss, list(c.values()), retain_graph=True), strict=True)) for c in copies]
    for name in found[0]:  # where the rows cancel, as for a bias before the normalization, nothing is shared out
        every = torch.stack([g[name] for g in found])
        nothing = every.sum(0).abs() < 1e-13 * every.abs().sum(0)
        for g in found:
            g[name] = torch.where(nothing, 0.0, g[name])
    return found


def _through_copies(model: nn.Module, states: list[State], x: Tensor) -> Tensor:
    """A batch's logits, each row going through its own copy of the weights."""
    for name, layer in model.named_children():
        own = [_within(name, state) for state in states]
        if isinstance(layer, _BatchNorm) and layer.training:
            over, wide = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
            mean, variance = x.mean(over, keepdim=True), x.var(over, unbiased=False, keepdim=True)
            x = (x - mean) / (variance + layer.eps).sqrt()
            x = torch.cat([x[[i]] * w["weight"].reshape(wide) + w["bias"].reshape(wide) for i, w in enumerate(own)])
        elif own[0]:
            x = torch.cat([functional_call(layer, w, (x[[i]],)) for i, w in enumerate(own)])
        else:  # dropout draws for all rows at once
            x = layer(x)
    return x


def loss_term_gradients(seen: Seen, step: SeenStep) -> list[State]:
    """The other split under batch normalization: the gradient of each example's own loss, other rows included.

    For a plain mean over a single batch.
    """
    [batch], found = step.passes, []
    for k in range(len(batch.ids)):

        def own(w: State, k: int = k) -> Tensor:
            out = logits(seen.model, step.before | w, batch.inputs, training=True)
            return seen.loss(out[[k]], batch.targets[[k]]) / len(batch.ids)

        found.append(gradient(own, trained_part(seen, step.before)))
    return found


def _loss(seen: Seen, batch: SeenPass, out: Tensor) -> Tensor:
    extra = () if batch.weights is None else (batch.weights,)
    return batch.part * seen.loss(out, batch.targets, *extra)


@contextmanager
def _as_in(batch: SeenPass, model: nn.Module) -> Iterator[None]:
    """Torch's random state and the modules' modes as they were in a pass."""
    modes = {name: module.training for name, module in model.named_modules()}
    with torch.random.fork_rng(devices=[]):
        if batch.random is not None:
            torch.set_rng_state(batch.random)
        for name, module in model.named_modules():
            module.training = _trains(name, batch)
        yield
    for name, module in model.named_modules():
        module.training = modes[name]


def _trains(module: str, batch: SeenPass) -> bool:
    return batch.training is None or module in batch.training


def gradient(scalar: Callable[[State], Tensor], at: State) -> State:
    """Plain autograd: zero where the scalar does not depend on a tensor."""
    leaves = {k: v.clone().requires_grad_(True) for k, v in at.items()}
    found = torch.autograd.grad(scalar(leaves), list(leaves.values()), allow_unused=True)
    return {k: torch.zeros_like(v) if g is None else g for (k, v), g in zip(leaves.items(), found, strict=True)}


def trained_part(seen: Seen, state: State) -> State:
    """The parameters among a state's tensors."""
    return {name: state[name] for name, _ in seen.model.named_parameters()}


def flat(state: State, seen: Seen) -> Tensor:
    """One vector: the parameters in their order, then the running statistics; zero where the state lacks a tensor."""
    floats = [name for name, b in seen.model.named_buffers() if b.is_floating_point()]
    names = [name for name, _ in seen.model.named_parameters()] + floats
    return torch.cat([(state[n] if n in state else torch.zeros_like(seen.final[n])).reshape(-1) for n in names])


# ------------------------------------------------------------------------------------------------------- displacements


def displacements(seen: Seen, gradients: Callable[[Seen, SeenStep], list[State]] = row_gradients) -> Tensor:
    """What every example did to the weights in every segment: (segments, N + 1, P), decay in the last row.

    One optimizer buffer an example, also while it is in no batch, and one for L2 decay. A parameter that has no
    gradient in a step rests: its count, its buffers and its decay stand still.
    """
    count = len(seen.inputs)
    buffers: list[dict[str, State]] = [{} for _ in range(count + 1)]
    updates: dict[str, int] = {}
    out = []
    for step in seen.steps:
        given = by_example(step, gradients(seen, step), count)
        updates |= {name: updates.get(name, 0) + 1 for name in step.settings}
        moved: list[State] = [{} for _ in range(count + 1)]
        for name, s in step.settings.items():
            how = (seen.optimizer, s, updates[name], step.observed[name])
            for i in range(count):
                moved[i][name] = spend(*how, buffers[i].setdefault(name, {}), given[i][name])
            l2, direct = decay(seen.optimizer, s, step.before[name])
            moved[count][name] = spend(*how, buffers[count].setdefault(name, {}), l2) + direct
        out.append(torch.stack([flat(m, seen) for m in moved]))
    if seen.average is not None:
        out.append(-sum(a * moved for a, moved in zip(seen.average.cumsum(0)[:-1], out, strict=True)))
    return torch.stack(out)


def by_example(step: SeenStep, rows: list[State], count: int) -> list[State]:
    """A step's gradient as the optimizer sees it, split over the examples: mixed rows by shares, then clipped."""
    given = [{name: torch.zeros_like(step.before[name]) for name in step.settings} for _ in range(count)]
    several = [p.ids.reshape(len(p.ids), -1) for p in step.passes]
    shares = [
        torch.ones(ids.shape) if p.shares is None else p.shares for p, ids in zip(step.passes, several, strict=True)
    ]
    for ids, parts, row in zip(torch.cat(several).tolist(), torch.cat(shares), rows, strict=True):
        for i, share in zip(ids, parts, strict=True):
            for name, s in step.settings.items():
                given[i][name] += share * step.factor[name] * (-row[name] if s["maximize"] else row[name])
    return given


def decay(optimizer: str, s: Mapping[str, Any], weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight decay in the gradient's place (L2), and the displacement of decoupled decay; one of them is zero."""
    nothing, decayed = torch.zeros_like(weight), s["weight_decay"] * weight
    decoupled = optimizer == "AdamW" or bool(s.get("decoupled_weight_decay"))
    return (nothing, -s["lr"] * decayed) if decoupled else (decayed, nothing)


def spend(optimizer: str, s: Mapping[str, Any], t: int, observed: State, buffer: State, g: Tensor) -> Tensor:
    """The displacement of one parameter by gradients `g` in its t-th update (from 1), linear in them and `buffer`.

    s: the settings of its parameter group. observed: what the optimizer holds after the step; what its squared
    gradients made of it is taken as given. buffer: these gradients' own share of the averages, moved on here.
    """
    return SPENT[optimizer](s, t, observed, buffer, g)


def _sgd(s: Mapping[str, Any], t: int, observed: State, buffer: State, g: Tensor) -> Tensor:
    if s["momentum"] == 0:
        return -s["lr"] * g
    b = buffer["b"] = s["momentum"] * buffer["b"] + (1 - s["dampening"]) * g if "b" in buffer else g
    return -s["lr"] * (g + s["momentum"] * b if s["nesterov"] else b)


def _averaged(s: Mapping[str, Any], buffer: State, g: Tensor) -> Tensor:
    """The first moment of Adam and its kin."""
    beta1 = s["betas"][0]
    buffer["m"] = beta1 * buffer.get("m", torch.zeros_like(g)) + (1 - beta1) * g
    return buffer["m"]


def _adam(s: Mapping[str, Any], t: int, observed: State, buffer: State, g: Tensor) -> Tensor:
    beta1, beta2 = s["betas"]
    v = observed["max_exp_avg_sq" if s["amsgrad"] else "exp_avg_sq"] / (1 - beta2**t)
    return -s["lr"] * _averaged(s, buffer, g) / (1 - beta1**t) / (v.sqrt() + s["eps"])


def _nadam(s: Mapping[str, Any], t: int, observed: State, buffer: State, g: Tensor) -> Tensor:
    beta1, beta2 = s["betas"]
    mu = [beta1 * (1 - 0.5 * 0.96 ** (k * s["momentum_decay"])) for k in range(1, t + 2)]  # mu_1 to mu_{t+1}
    now, following = float(np.prod(mu[:-1])), float(np.prod(mu))
    moved = (1 - mu[-2]) / (1 - now) * g + mu[-1] / (1 - following) * _averaged(s, buffer, g)
    return -s["lr"] * moved / ((observed["exp_avg_sq"] / (1 - beta2**t)).sqrt() + s["eps"])


def _radam(s: Mapping[str, Any], t: int, observed: State, buffer: State, g: Tensor) -> Tensor:
    beta1, beta2 = s["betas"]
    m = _averaged(s, buffer, g) / (1 - beta1**t)
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / (1 - beta2**t)
    if length <= 5:
        return -s["lr"] * m
    r = ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5
    return -s["lr"] * m * r * (1 - beta2**t) ** 0.5 / (observed["exp_avg_sq"].sqrt() + s["eps"])


def _adamax(s: Mapping[str, Any], t: int, observed: State, buffer: State, g: Tensor) -> Tensor:
    return -s["lr"] / (1 - s["betas"][0] ** t) * _averaged(s, buffer, g) / observed["exp_inf"]


def _rmsprop(s: Mapping[str, Any], t: int, observed: State, buffer: State, g: Tensor) -> Tensor:
    v = observed["square_avg"] - (observed["grad_avg"] ** 2 if s["centered"] else 0)
    b = buffer["b"] = s["momentum"] * buffer.get("b", torch.zeros_like(g)) + g / (v.sqrt() + s["eps"])
    return -s["lr"] * b


def _adagrad(s: Mapping[str, Any], t: int, observed: State, buffer: State, g: Tensor) -> Tensor:
    return -s["lr"] / (1 + (t - 1) * s["lr_decay"]) * g / (observed["sum"].sqrt() + s["eps"])


SPENT: dict[str, Callable[[Mapping[str, Any], int, State, State, Tensor], Tensor]] = {
    "SGD": _sgd,
    "Adam": _adam,
    "AdamW": _adam,
    "NAdam": _nadam,
    "RAdam": _radam,
    "Adamax": _adamax,
    "RMSprop": _rmsprop,
    "Adagrad": _adagrad,
}


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
    gauss: bool = False,
) -> Account:
    """The ledger of every input. moved: (segments, N + 1, P). cuts: between which the path is taken as straight.

    nodes: midpoints, or Gauss-Legendre nodes, of each stretch between cuts. The row `buffers` is what nobody is
    credited with: running statistics, and a bias before batch normalization, whose gradient is nothing but rounding.
    """
    cuts = list(range(seen.segments + 1)) if cuts is None else cuts
    count = moved.shape[1] - 1
    rows: dict[str, list[Tensor]] = {name: [] for name in Account.__dataclass_fields__}
    for x, pair in zip(inputs, pairs, strict=True):
        contributions, decayed, buffers = torch.zeros(count), torch.zeros(()), torch.zeros(())
        for a, b in pairwise(cuts):
            low, high = seen.state(a), seen.state(b)
            uncredited = flat(high, seen) - flat(low, seen) - moved[a:b].sum((0, 1))
            for at, weight in _rule(nodes, gauss):
                between = {n: low[n] + at * (high[n] - low[n]) for n in low}
                j = weight * jacobian(seen, between, x, pair)
                for s in range(a, b):
                    for i in range(count):
                        contributions[i] += j @ moved[s, i]
                    decayed += j @ moved[s, count]
                buffers += j @ uncredited
        start, end = output(seen, seen.state(0), x, pair), output(seen, seen.final, x, pair)
        rows["start"].append(start)
        rows["contributions"].append(contributions)
        rows["decay"].append(decayed)
        rows["buffers"].append(buffers)
        rows["output"].append(end)
        rows["residual"].append(end - start - contributions.sum() - decayed - buffers)
    return Account(**{name: torch.stack(values).detach() for name, values in rows.items()})


def _rule(nodes: int, gauss: bool) -> list[tuple[float, float]]:
    """Places in [0, 1] and their weights."""
    if not gauss:
        return [((k + 0.5) / nodes, 1 / nodes) for k in range(nodes)]
    at, weights = np.polynomial.legendre.leggauss(nodes)
    return [(float(t) / 2 + 0.5, float(w) / 2) for t, w in zip(at, weights, strict=True)]

"""The model: does it say the same of the same input, alone or in a batch, and finite things at the bounds?

And does it know its data: a model that does not was given other inputs in training, another order of the classes, or
other weights than it is audited with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from brittle.checks import check_logits
from brittle.data import Examples
from brittle.doctor.check import Check, Visit
from brittle.subject import Subject, replace_quietly

ROWS, SAMPLE = 16, 500
"""Inputs that are looked at one by one, and inputs on which accuracy is measured."""

SAME = 1e-3
"""Share of the range of the logits up to which two of them are the same."""

GAIN = 0.02
"""Accuracy above guessing, or that another normalization brings, below which it is none."""


def facts(v: Visit) -> Check:
    """What is audited."""
    s = v.subject
    count = sum(p.numel() for p in s.model.parameters())
    frozen = sum(p.numel() for p in s.model.parameters() if not p.requires_grad)
    still = f", {frozen:,} of them frozen" if frozen else ""
    low, high = s.range
    kind = str(next(s.model.parameters()).dtype).removeprefix("torch.")
    return Check("subject", "ok", f"{s.name}: {count:,} {kind} parameters{still}, inputs within [{low:g}, {high:g}]")


def evaluation(v: Visit) -> Check:
    """Are logits a function of their own input alone?"""
    x = v.subject.test.inputs[:ROWS]
    with torch.random.fork_rng(devices=[]):
        first, again = (v.subject.predict(x) for _ in range(2))
        alone = v.subject.predict(x, batch=1)
    allowed = SAME * (first.amax() - first.amin()).clamp_min(1e-6).item()
    for other, rule, remedy in (
        (again, "the same inputs must get the same logits twice", "draw no random numbers in evaluation mode"),
        (alone, "an input must get the same logits alone as in a batch", "let no layer look across the batch"),
    ):
        off = (first - other).abs().max().item()
        if not off <= allowed:
            return Check("evaluation", "fail", f"{rule}, found them {off:.3g} apart; {remedy} (self.training)")
    return Check("evaluation", "ok", "the same logits twice, and row by row")


def corners(v: Visit) -> Check:
    """Is the model finite where attacks and probes may lead?"""
    shape = v.subject.train.inputs.shape[1:]
    mixed = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)) < 0.5
    low, high = (torch.as_tensor(b, dtype=torch.get_default_dtype()).expand(1, *shape) for b in v.subject.bounds)
    points = torch.cat([low, high, torch.where(mixed, low, high)])
    check_logits(v.subject.predict(points.to(v.subject.train.inputs)), len(points))
    least, most = v.subject.range
    return Check("bounds", "ok", f"finite logits where all inputs are at the bounds {least:g}, {most:g}, or either")


def accuracy(v: Visit) -> Check:
    """Does the model know its data?"""
    s, train, test = v.subject, _sample(v.subject.train), _sample(v.subject.test)
    known, right = _accuracy(s, train), _accuracy(s, test)
    line = f"{known:.1%} on {len(train)} training and {right:.1%} on {len(test)} test inputs"
    if right == 0:
        return Check("accuracy", "fail", f"some test inputs must be right to be attacked, found {line}; {ORDER}")
    commonest = torch.bincount(train.targets).max().item() / len(train)
    if known <= commonest + GAIN:
        return Check("accuracy", "warn", f"a model must know its training data, found {line}; {ORDER}")
    scaled = _accuracy(replace_quietly(s, normalize=_own_scale(s.train.inputs)), train)
    if scaled >= known + GAIN and 1 - scaled <= (1 - known) / 2:
        own = f"{scaled:.1%} on training inputs with the mean and standard deviation of the training data"
        return Check("accuracy", "warn", f"inputs must be as in training, found {line}, but {own}; look at normalize=")
    return Check("accuracy", "ok", line)


ORDER = "look at normalize=, the order of the classes, and the weights that were loaded"


def _sample(examples: Examples) -> Examples:
    return examples[torch.linspace(0, len(examples) - 1, min(len(examples), SAMPLE)).long()]


def _accuracy(subject: Subject, examples: Examples) -> float:
    return (subject.predict(examples.inputs).argmax(1) == examples.targets).double().mean().item()


def _own_scale(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel: (C,)."""
    std, mean = torch.std_mean(inputs.transpose(0, 1).flatten(1), dim=1)
    return mean, std.clamp_min(1e-6)

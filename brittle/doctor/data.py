"""The data: how much there is, how it spreads over the classes, and what stands in it twice."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import torch

from brittle.data import Examples
from brittle.doctor.check import Check, Visit
from brittle.split import FEWEST

TINY = 10
"""Training examples of a class below which it is too small to be told apart into clusters."""


def sizes(v: Visit) -> Check:
    """Are there enough test inputs to predict on some and test on others?"""
    s, wanted = v.subject, 2 * v.queries
    parts = [f"{len(s.train):,} training", f"{len(s.test):,} test"] + ([f"{len(s.pool):,} pool"] if s.pool else [])
    line = f"{', '.join(parts)} examples of shape {tuple(s.train.inputs.shape[1:])}"
    if len(s.test) < FEWEST:
        return Check("examples", "fail", f"test needs at least {FEWEST} inputs, found {len(s.test)}; pass more")
    if len(s.test) < wanted:
        rest = f"{len(s.test) // 2} predict and as many test in place of {v.queries}; pass more, or ask for --queries"
        return Check("examples", "warn", f"{line}: {rest} {len(s.test) // 2}")
    return Check("examples", "ok", line)


def classes(v: Visit) -> Check:
    """Does every class have training and test examples?"""
    s = v.subject
    train, test = (torch.bincount(part.targets, minlength=s.classes) for part in (s.train, s.test))
    least, most = int(train.min()), int(train.max())
    spread = f"{s.classes} classes of {f'{least:,} to ' if least < most else ''}{most:,} training examples"
    absent, untested = _named(s.class_names, train == 0), _named(s.class_names, test == 0)
    tiny = _named(s.class_names, (train > 0) & (train < TINY))
    if absent:
        return Check("classes", "warn", f"{spread}, none at all of {absent}; pass all data that training drew from")
    if untested:
        return Check("classes", "warn", f"{spread}, but no test input is of {untested}; nothing can be said of it")
    if tiny:
        return Check("classes", "warn", f"{spread}; what is said of {tiny} rests on fewer than {TINY} examples")
    return Check("classes", "ok", spread)


def duplicates(v: Visit) -> Check:
    """Are test inputs training inputs?"""
    seen = set(digests(v.subject.train))
    both = [i for i, digest in enumerate(digests(v.subject.test)) if digest in seen]
    if both:
        line = (
            f"test inputs must not be training inputs, {len(both):,} of {len(v.subject.test):,} are, first "
            f"{v.subject.test.name(both[0])}; take them out, they make failures look rarer"
        )
        return Check("duplicates", "warn", line)
    return Check("duplicates", "ok", "no test input is a training input")


def labels(v: Visit) -> Check:
    """Do equal training inputs have equal labels?"""
    train, at = v.subject.train, defaultdict(list)
    for i, digest in enumerate(digests(train)):
        at[digest].append(i)
    doubled = [ids for ids in at.values() if len(ids) > 1]
    torn = [ids for ids in doubled if len(train.targets[ids].unique()) > 1]
    if torn:
        i, j = torn[0][0], next(j for j in torn[0] if train.targets[j] != train.targets[torn[0][0]])
        of = [f"{train.name(k)} (a {v.subject.class_names[int(train.targets[k])]})" for k in (i, j)]
        line = (
            f"equal inputs must have equal labels, {len(torn):,} have several, first {of[0]} and {of[1]}; correct them"
        )
        return Check("labels", "warn", line)
    again = sum(len(ids) - 1 for ids in doubled)
    twice = f"; {again:,} training inputs are copies of others" if again else ""
    return Check("labels", "ok", f"equal inputs have equal labels{twice}")


def digests(examples: Examples) -> list[bytes]:
    """Of each input's values: equal where the inputs are."""
    rows = (examples.inputs.flatten(1) + 0.0).numpy()  # -0 becomes 0
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]


def _named(names: tuple[str, ...], which: torch.Tensor) -> str:
    """The chosen names, three at most."""
    chosen = [name for name, taken in zip(names, which.tolist(), strict=True) if taken]
    return ", ".join(chosen[:3]) + (f" and {len(chosen) - 3} more" if len(chosen) > 3 else "")

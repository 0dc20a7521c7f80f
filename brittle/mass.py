"""Mass: contributions summed over groups of training examples.

Groups are the classes, clusters within the classes, or the user's own labels within them; a group's mass is the sum of
its examples' contributions to an output, in logits. *Net* mass is the signed sum over groups, *gross* mass the sum of
absolute values; support is what part of the gross mass is left over as net.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from brittle.checks import checked_groups
from brittle.data import Examples
from brittle.kernel.layers import units
from brittle.kernel.quadrature import blocks
from brittle.records import Groups
from brittle.subject import Subject

FEATURE_BATCH = 1024


def groups_of(subject: Subject, per_class: int) -> Groups:
    """The user's own groups (`Subject(groups=...)`), or else clusters."""
    return cluster_groups(subject, per_class) if subject.groups is None else labelled_groups(subject, subject.groups)


def labelled_groups(subject: Subject, labels: Sequence[Any]) -> Groups:
    """Groups by the user's own labels, one a training example: of a source, a writer, a batch of collecting.

    A label that several classes bear makes a group in each of them, named `CLASS/LABEL`. A class without examples
    keeps an empty group. Raises `DataError` where there are not as many labels as training examples.
    """
    texts, targets = checked_groups(labels, len(subject.train)), subject.train.targets.tolist()
    found = sorted({*zip(targets, texts, strict=True)})
    found += [(c, "") for c in range(subject.classes) if c not in set(targets)]
    place = {group: g for g, group in enumerate(found)}
    names = tuple(f"{subject.class_names[c]}/{text}" if text else subject.class_names[c] for c, text in found)
    of_each = torch.tensor([place[group] for group in zip(targets, texts, strict=True)])
    return Groups(of_each, torch.tensor([c for c, _ in found]), names)


def class_groups(subject: Subject) -> Groups:
    """One group a class."""
    return Groups(subject.train.targets, torch.arange(subject.classes), subject.class_names)


def cluster_groups(subject: Subject, per_class: int, seed: int = 0) -> Groups:
    """At most `per_class` clusters in each class, by k-means on the network's penultimate features.

    A class with fewer than ten examples a cluster gets fewer clusters; an absent class keeps an empty group, so
    that every class has one. Names are `CLASS/1`, `CLASS/2`, ... from the largest cluster to the smallest.
    """
    features = penultimate(subject, subject.train).double().numpy()
    labels = torch.zeros(len(subject.train), dtype=torch.int64)
    classes: list[int] = []
    names: list[str] = []
    for c, class_name in enumerate(subject.class_names):
        members = (subject.train.targets == c).nonzero()[:, 0]
        k = max(1, min(per_class, len(members) // 10))
        found = torch.zeros(len(members), dtype=torch.int64)
        if k > 1:
            fitted = KMeans(k, n_init=4, random_state=seed).fit(features[members.numpy()])
            found = torch.as_tensor(fitted.labels_, dtype=torch.int64)
        rank = torch.bincount(found, minlength=k).argsort(descending=True).argsort()
        labels[members] = len(classes) + rank[found]
        classes += [c] * k
        names += [f"{class_name}/{i + 1}" if k > 1 else class_name for i in range(k)]
    return Groups(labels, torch.tensor(classes), tuple(names))


@torch.no_grad()
def penultimate(subject: Subject, examples: Examples) -> Tensor:
    """What enters the module with parameters that is called last, flattened: (len(examples), D)."""
    entered: list[Tensor] = []
    features: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered[:] = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)][:1]

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for _, module in units(subject.model)]
    try:
        for rows in blocks(len(examples), FEATURE_BATCH):
            subject.predict(examples.inputs[rows], FEATURE_BATCH)
            features.append(entered[0].detach().flatten(1).cpu())
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(features)


def by_group(contributions: Tensor, groups: Groups) -> Tensor:
    """Sum contributions over groups. contributions: (..., N) -> (..., G)."""
    out = contributions.new_zeros(*contributions.shape[:-1], len(groups))
    return out.index_add(-1, groups.labels, contributions)


def net(mass: Tensor) -> Tensor:
    """Signed sum over groups. mass: (..., G) -> (...)."""
    return mass.sum(-1)


def gross(mass: Tensor) -> Tensor:
    """Sum of absolute values over groups. mass: (..., G) -> (...)."""
    return mass.abs().sum(-1)


def support(mass: Tensor) -> Tensor:
    """Net over gross mass, between -1 and 1: 1 where every group pulls to the predicted class. (..., G) -> (...)."""
    return net(mass) / gross(mass).clamp_min(torch.finfo(mass.dtype).tiny)

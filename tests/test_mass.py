"""Mass by group: sums, and the groups themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import CASES, Attention, Twice, queries, train, two_per_class
from cases import float64 as float64
from torch import Tensor, nn

from brittle.errors import DataError
from brittle.kernel.memory import build
from brittle.kernel.memory import mass as mass_of
from brittle.mass import (
    by_group,
    class_groups,
    cluster_groups,
    gross,
    groups_of,
    labelled_groups,
    net,
    penultimate,
    support,
)
from brittle.records import Groups
from brittle.scores import (
    lack_of_support,
    late_path,
    late_path_at_reference,
    late_probabilities,
)
from brittle.subject import Subject


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


GROUPS = Groups(torch.tensor([0, 2, 1, 2, 0]), torch.tensor([1, 0, 1]), ("a", "b", "c"))


def test_contributions_are_summed_over_their_groups() -> None:
    contributions = random(4, 5)
    found = by_group(contributions, GROUPS)
    for g in range(3):
        assert torch.allclose(found[:, g], contributions[:, GROUPS.labels == g].sum(1))
    classes = GROUPS.by_class(found, 2)
    assert torch.allclose(classes[:, 0], found[:, 1])
    assert torch.allclose(classes[:, 1], found[:, 0] + found[:, 2])


def test_net_gross_and_support() -> None:
    mass = torch.tensor([[3.0, -1.0, 2.0], [-2.0, -2.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    assert net(mass).tolist() == [4.0, -4.0, 0.0, 0.0]
    assert gross(mass).tolist() == [6.0, 4.0, 2.0, 0.0]
    assert support(mass).tolist() == pytest.approx([2 / 3, -1.0, 0.0, 0.0])
    assert (support(random(100, 7)).abs() <= 1).all()
    assert torch.allclose(lack_of_support(random(2, 3), GROUPS, 2), -support(GROUPS.by_class(random(2, 3), 2)))


# -------------------------------------------------------------------------------------------------------------- groups


def blobs(per_class: tuple[int, ...] = (40, 25, 9), centres: int = 2) -> Subject:
    """Classes of several blobs each, and a network that passes its inputs on to the last layer."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(len(per_class)).repeat_interleave(torch.tensor(per_class))
    which = torch.cat([torch.arange(n) * centres // n for n in per_class])
    centre = torch.rand(len(per_class), centres, 4, generator=generator)
    inputs = (centre[targets, which] + 0.01 * torch.randn(len(targets), 4, generator=generator)).clamp(0, 1)
    model = nn.Sequential(nn.Identity(), nn.Linear(4, len(per_class))).eval()
    return Subject(model, (inputs, targets), (inputs, targets))


def assert_partition(groups: Groups, subject: Subject) -> None:
    assert len(groups.labels) == len(subject.train)
    assert len(groups) == len(groups.classes) == len(set(groups.names))
    assert torch.equal(groups.classes[groups.labels], subject.train.targets), "finer than the classes"
    assert set(groups.classes.tolist()) == set(range(subject.classes))


def test_clusters_are_found_within_the_classes() -> None:
    subject = blobs()
    groups = cluster_groups(subject, per_class=2)
    assert_partition(groups, subject)
    assert groups.names == ("0/1", "0/2", "1/1", "1/2", "2"), "nine examples make one group"
    sizes = groups.labels.bincount()
    assert sizes.tolist()[:2] == [20, 20]
    assert sizes[2] >= sizes[3], "from the largest to the smallest"
    for c, n in ((0, 40), (1, 25)):
        rows = (subject.train.targets == c).nonzero()[:, 0]
        blob = torch.arange(n) * 2 // n
        together = {(int(b), int(g)) for b, g in zip(blob, groups.labels[rows], strict=True)}
        assert len(together) == 2, "one blob, one group"


def test_clusters_depend_on_their_seed_alone() -> None:
    subject = blobs(centres=5)
    assert torch.equal(cluster_groups(subject, 3, seed=1).labels, cluster_groups(subject, 3, seed=1).labels)


def test_an_absent_class_keeps_an_empty_group() -> None:
    subject = blobs()
    some = subject.train[subject.train.targets != 1]
    groups = cluster_groups(Subject(subject.model, some, subject.test), per_class=2)
    assert groups.names == ("0/1", "0/2", "1", "2")
    assert groups.labels.bincount(minlength=4).tolist() == [20, 20, 0, 9]


def test_classes_are_groups() -> None:
    subject = blobs()
    assert_partition(class_groups(subject), subject)
    assert class_groups(subject).names == ("0", "1", "2")


class HeadFirst(nn.Module):
    """The head is made first and called last."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(5, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=self.body(x).tanh())


@pytest.mark.parametrize(
    ("build_model", "shape", "width", "features"),
    [
        (CASES["tanh"].build, (4,), 5, lambda m, x: m[0](x).tanh()),
        (CASES["cnn"].build, (1, 5, 5), 36, lambda m, x: nn.functional.gelu(m[0](x)).flatten(1)),
        (HeadFirst, (4,), 5, lambda m, x: m.body(x).tanh()),
        (Twice, (4,), 4, lambda m, x: m.shared(m.shared(x).tanh()).tanh()),
        (Attention, (3, 2), 4, None),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), (2, 2), 4, lambda m, x: x.flatten(1)),
    ],
)
def test_features_are_what_enters_the_last_layer(
    build_model: Callable[[], nn.Module],
    shape: tuple[int, ...],
    width: int,
    features: Callable[[nn.Module, Tensor], Tensor] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("brittle.mass.FEATURE_BATCH", 3)
    model = build_model().eval()
    inputs = torch.rand(10, *shape, generator=torch.Generator().manual_seed(0))
    subject = Subject(model, (inputs, torch.arange(10) % 3), (inputs, torch.arange(10) % 3))
    found = penultimate(subject, subject.train)
    assert found.shape == (10, width)
    if features is not None:
        assert torch.allclose(found, features(model, inputs))
    assert not model._forward_pre_hooks


# --------------------------------------------------------------------------------------------------- scores of the path


def test_the_late_path_averages_the_later_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = train("batch norm", "momentum", tmp_path)
    inputs, pairs = queries(training.subject)
    monkeypatch.setattr("brittle.scores.FORWARD_BLOCK", 2)
    found = late_probabilities(training.path, training.subject, inputs)
    model, expected = CASES["batch norm"].model().eval(), []
    for s in range(6, 13):
        model.load_state_dict(training.seen.state(s), strict=False)
        expected.append(model(inputs).softmax(1))
    assert torch.allclose(found, torch.stack(expected).mean(0))
    lead = found.gather(1, pairs.predicted[:, None])[:, 0].log()
    for m, own in enumerate(pairs.predicted.tolist()):
        best = max(p for c, p in enumerate(found[m].tolist()) if c != own)
        assert late_path(found, pairs)[m] == pytest.approx(math.log(best) - lead[m].item())


def test_the_late_path_is_carried_on_in_a_straight_line() -> None:
    clean, slope = random(5), random(5, seed=1)
    assert torch.allclose(late_path_at_reference(clean, clean + 0.25 * slope, 0.25), clean + slope)


def test_mass_by_class_is_mass_of_classes(tmp_path: Path) -> None:
    training = train("tanh", "adamw", tmp_path)
    inputs, pairs = queries(training.subject)
    fine, coarse = two_per_class(training.subject), class_groups(training.subject)
    by_pair, by_class = (
        mass_of(build(training.path, training.subject, g, segments=3), training.subject, inputs, pairs)[:, :-1]
        for g in (fine, coarse)
    )
    assert torch.allclose(fine.by_class(by_pair, 3), by_class, atol=1e-12)


def test_a_users_own_labels_are_followed_within_each_class(tmp_path: Path) -> None:
    subject = train("tanh", "sgd", tmp_path).subject
    targets = subject.train.targets
    labels = ["old" if i % 3 else "new" for i in range(len(targets))]
    groups = labelled_groups(subject, labels)
    for i, (target, label) in enumerate(zip(targets.tolist(), labels, strict=True)):
        g = int(groups.labels[i])
        assert groups.names[g] == f"{subject.class_names[target]}/{label}"
        assert groups.classes[g] == target
    assert len(groups) == len({*zip(targets.tolist(), labels, strict=True)})
    contributions = random(2, len(targets))
    by_class = groups.by_class(by_group(contributions, groups), subject.classes)
    assert torch.allclose(by_class, by_group(contributions, class_groups(subject)))


def test_a_class_without_examples_keeps_an_empty_group(tmp_path: Path) -> None:
    subject = train("tanh", "sgd", tmp_path).subject
    rows = subject.train.targets != 2
    subject = Subject(subject.model, subject.train[rows.nonzero()[:, 0]], subject.test)
    groups = labelled_groups(subject, torch.ones(len(subject.train), dtype=torch.int64))
    assert groups.names == ("0/1", "1/1", "2")
    assert groups.classes.tolist() == [0, 1, 2]


def test_the_subject_names_the_groups_of_the_audit(tmp_path: Path) -> None:
    subject = train("tanh", "sgd", tmp_path).subject
    data = (subject.train.inputs, subject.train.targets)
    own = Subject(subject.model, data, subject.test, groups=list(range(len(subject.train))))
    assert len(groups_of(own, 3)) == len(subject.train)
    assert groups_of(subject, 3).names == cluster_groups(subject, 3).names


@pytest.mark.parametrize("labels", [["a", "b"], "ab", 3])
def test_wrong_groups_get_one_line(labels: object, tmp_path: Path) -> None:
    subject = train("tanh", "sgd", tmp_path).subject
    with pytest.raises(DataError, match=r"^groups must hold one label a training example, found .*; pass them in"):
        Subject(subject.model, (subject.train.inputs, subject.train.targets), subject.test, groups=labels)  # type: ignore[arg-type]

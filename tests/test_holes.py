"""Holes: made from leaks, bounded, merged, ranked, and said again by their own rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from brittle.holes import LEAST_SUPPORT, MOST, OVERLAP, Leak, Region, find_holes, leak_of, membership
from brittle.records import Groups, ShiftMap

GROUPS = 8


def leak(seed: int, queries: int = 60, families: int = 3, classes: int = 4, scale: float = 2.0) -> Leak:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high: torch.randint(high, (queries, families), generator=generator)  # noqa: E731
    from_group, to_group = draw(GROUPS), draw(GROUPS)
    return Leak(
        share=scale * torch.rand(queries, families, generator=generator, dtype=torch.float64),
        from_class=from_group % classes,
        to_class=to_group % classes,
        from_group=from_group,
        to_group=to_group,
        shift=torch.randn(queries, families, GROUPS, generator=generator, dtype=torch.float64),
    )


def steady(share: Tensor) -> Tensor:
    """A rate that falls with the predicted severity."""
    return 1 - share / 2


@st.composite
def problems(draw: st.DrawFn) -> tuple[Leak, list[int]]:
    families = draw(st.integers(1, 4))
    columns = draw(st.lists(st.sampled_from(range(families)), min_size=1, max_size=families, unique=True))
    made = leak(draw(st.integers(0, 10_000)), draw(st.integers(1, 80)), families, draw(st.integers(2, 8)))
    return made, columns


def rows(region: Region, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.bool).index_fill(0, region.members, True)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_a_holes_members_are_those_that_its_rule_finds(problem: tuple[Leak, list[int]]) -> None:
    made, columns = problem
    for region in find_holes(made, columns, steady):
        inside, family = membership(region, made)
        assert torch.equal(inside.nonzero()[:, 0], region.members)
        chosen = made.share[region.members, family[region.members]]
        assert torch.equal(chosen, region.share)
        assert torch.equal(chosen, made.share[region.members, region.family_of])


@settings(max_examples=60, deadline=None)
@given(problems())
def test_holes_obey_their_definition(problem: tuple[Leak, list[int]]) -> None:
    made, columns = problem
    found = find_holes(made, columns, steady)
    assert len(found) <= MOST
    weights = [region.predicted_rate * region.support for region in found]
    assert weights == sorted(weights, reverse=True)
    flows = [flow for region in found for flow in region.flows]
    assert len(flows) == len(set(flows)), "a flow belongs to one hole"
    for region in found:
        assert region.support >= LEAST_SUPPORT
        assert set(region.families) <= set(columns)
        assert (region.share <= 1).all()
        assert torch.equal(region.rate, steady(region.share))
        assert region.exemplar in region.members.tolist()
        pairs = zip(
            made.from_class[region.members, region.family_of].tolist(),
            made.to_class[region.members, region.family_of].tolist(),
            strict=True,
        )
        assert set(pairs) <= set(region.flows)
        opened = region.family_of.bincount(minlength=4)[list(region.families)]
        assert opened.tolist() == sorted(opened.tolist(), reverse=True)
        assert opened.min() > 0


@settings(max_examples=60, deadline=None)
@given(problems())
def test_no_two_holes_have_mostly_the_same_members(problem: tuple[Leak, list[int]]) -> None:
    made, columns = problem
    found = [rows(region, len(made.share)) for region in find_holes(made, columns, steady, most=1000)]
    for i, a in enumerate(found):
        for b in found[:i]:
            assert (a & b).sum() < OVERLAP * (a | b).sum()


def chain() -> Leak:
    """Flows under three families such that the first two overlap, and only their union overlaps the third."""
    share = torch.full((20, 3), 9.0)
    share[0:12, 0] = 0.5
    share[[*range(10), 12, 13], 1] = 0.5
    share[4:20, 2] = 0.5
    classes = torch.tensor([1, 2, 3]).expand(20, 3)
    return Leak(share, torch.zeros(20, 3, dtype=torch.int64), classes, classes, classes, torch.ones(20, 3, 4))


def test_merging_goes_on_until_nothing_overlaps() -> None:
    [only] = find_holes(chain(), [0, 1, 2], steady)
    assert only.support == 20
    assert set(only.flows) == {(0, 1), (0, 2), (0, 3)}


def test_a_share_above_one_is_no_failure() -> None:
    made = leak(0)
    surviving = Leak(made.share + 1.001, made.from_class, made.to_class, made.from_group, made.to_group, made.shift)
    assert find_holes(surviving, [0, 1, 2], steady) == []


def test_families_that_do_not_count_open_nothing() -> None:
    made = leak(1)
    made.share[:, 1] = 0.0
    for region in find_holes(made, [0, 2], steady):
        assert 1 not in region.families


def test_the_exemplar_is_the_member_whose_shift_is_most_like_the_others() -> None:
    share = torch.tensor([[0.5]] * 4)
    zero = torch.zeros(4, 1, dtype=torch.int64)
    shift = torch.tensor([[1.0, 0.1], [0.0, 1.0], [1.0, 0.3], [10.0, 6.0]])[:, None]
    [region] = find_holes(Leak(share, zero, zero + 1, zero, zero + 1, shift), [0], steady)
    assert region.exemplar == 3
    assert (region.from_group, region.to_group) == (0, 1)


def test_the_largest_rate_times_support_comes_first() -> None:
    share = torch.tensor([[0.1]] * 6 + [[0.9]] * 9)
    start = torch.tensor([[0]] * 6 + [[1]] * 9)
    [first, second] = find_holes(
        Leak(share, start, start + 2, start, start + 2, torch.ones(15, 1, 4)), [0], lambda s: 1 - s
    )
    assert (first.support, second.support) == (6, 9)


def test_leaks_are_read_from_the_shift_map() -> None:
    groups = Groups(torch.arange(4), torch.tensor([0, 0, 1, 2]), ("a", "b", "c", "d"))
    mass = torch.tensor([[2.0, 1.0, -1.0, -1.0]])
    probed = torch.tensor([[[[2.0, 1.0, -1.0, -1.0], [2.0, 0.0, -1.5, -4.0]]]])
    shift = ShiftMap(
        families=("f",),
        units=("u",),
        severities=torch.tensor([[0.5, 1.0]]),
        reference=torch.tensor([4.0]),
        mass=mass,
        probed=probed,
        rival=torch.tensor([1]),
        margin=torch.tensor([3.0]),
        probed_margin=torch.tensor([[[3.0, 1.5]]]),
        probed_lead=torch.tensor([[[3.0, 1.5]]]),
    )
    found = leak_of(shift, groups)
    assert found.share.tolist() == [[pytest.approx(2.0 / 4.0)]]
    assert (found.from_group.item(), found.from_class.item()) == (1, 0)
    assert (found.to_group.item(), found.to_class.item()) == (2, 1), "the rival's class, not the one that gains most"
    assert torch.equal(found.shift, (probed - mass[:, None, None])[:, :, -1])

"""Memberships: names stay, positions close up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_runtime.core.membership import Membership
from dp_runtime.layers.moe import RankSharding

MEMBERSHIPS = st.sets(st.integers(0, 40), min_size=1, max_size=12).map(
    lambda ranks: Membership(tuple(sorted(ranks)))
)


@given(MEMBERSHIPS, st.integers(1, 20))
def test_a_resized_membership_keeps_as_many_as_it_can(members: Membership, size: int) -> None:
    resized = members.resized(size)
    assert resized.size == size
    kept = {*resized.dp_ranks} & {*members.dp_ranks}
    assert len(kept) == min(size, members.size)
    came = {*resized.dp_ranks} - kept
    free = [number for number in range(64) if number not in members]
    assert sorted(came) == free[: len(came)]


@given(MEMBERSHIPS, st.data())
def test_those_that_are_left_keep_their_names_and_order(
    members: Membership, data: st.DataObject
) -> None:
    gone = data.draw(st.sets(st.sampled_from(members.dp_ranks), max_size=members.size - 1))
    left = members.without(gone)
    assert {*left.dp_ranks} == {*members.dp_ranks} - gone
    assert [left.position(rank) for rank in left.dp_ranks] == list(range(left.size))
    assert members.without({99}) == members


@given(MEMBERSHIPS, st.integers(1, 70), st.sampled_from(["ep", "tp"]))
def test_positions_share_all_experts(members: Membership, whole: int, kind: str) -> None:
    held: list[int] = []
    for rank in members.dp_ranks:
        shard = RankSharding(kind, members.position(rank), members.size).shard(whole, whole)
        held += shard.experts if kind == "ep" else shard.intermediate
    assert held == list(range(whole))


def test_a_membership_is_told_as_a_range_where_it_is_one() -> None:
    assert str(Membership.first(4)) == "0..3"
    assert str(Membership((2, 3))) == "2..3"
    assert str(Membership((2,))) == "2"
    assert str(Membership((0, 2))) == "0, 2"
    assert Membership((0, 2, 5)).named([2, 0]) == "5, 0"


def test_nobody_is_no_membership() -> None:
    with pytest.raises(AssertionError, match="somebody has to serve"):
        Membership((3,)).without([3])

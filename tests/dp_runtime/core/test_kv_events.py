"""KV events: who applies what is taken has the cache's content, however late it is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dp_runtime.core.rank_events.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KvEvent,
    PendingKvEvents,
)


def stored(page: int) -> BlockStored:
    return BlockStored((bytes([page]),), None, (page,), 1)


def apply(cache: set[bytes], events: tuple[KvEvent, ...]) -> None:
    """Follow a cache as a router does, which hears of nothing twice."""
    for event in events:
        match event:
            case BlockStored(block_hashes=hashes):
                assert cache.isdisjoint(hashes), "it was stored already"
                cache |= {*hashes}
            case BlockRemoved(block_hashes=hashes):
                assert cache.issuperset(hashes), "it was not there"
                cache -= {*hashes}
            case AllBlocksCleared():
                cache.clear()


@given(st.lists(st.tuples(st.sampled_from(["store", "remove", "take", "clear"]), st.integers(0, 5)),
                max_size=60))  # fmt: skip
def test_what_is_taken_leads_to_what_the_cache_has(acts: list[tuple[str, int]]) -> None:
    pending, cache, follower = PendingKvEvents(), set[bytes](), set[bytes]()
    for act, page in acts:
        name = bytes([page])
        match act:
            case "store" if name not in cache:
                pending.add([stored(page)])
                cache.add(name)
            case "remove" if name in cache:
                pending.add([BlockRemoved((name,))])
                cache.remove(name)
            case "clear" if page == 0:
                pending.add([AllBlocksCleared()])
                cache.clear()
            case "take":
                before = {*follower}
                events = pending.take()
                apply(follower, events)
                assert follower == cache
                pages = sum(
                    len(each.block_hashes)
                    for each in events
                    if not isinstance(each, AllBlocksCleared)
                )
                assert pages <= len(before) + len(cache)
                assert not pending
    apply(follower, pending.take())
    assert follower == cache


def test_pages_are_told_in_the_order_in_which_they_came() -> None:
    pending = PendingKvEvents()
    pending.add([stored(3), stored(1), BlockRemoved((bytes([3]),)), stored(2)])
    assert pending.take() == (stored(1), stored(2))
    assert pending.take() == ()
    pending.add([BlockRemoved((bytes([2]), bytes([1]))), stored(3)])
    assert pending.take() == (BlockRemoved((bytes([2]), bytes([1]))), stored(3))

"""The feed of all ranks' KV events."""

import threading

import pytest

from dp_runtime.core.rank_events.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from dp_runtime.engine.kv_event_feed import KvEventFeed
from dp_runtime.errors import EngineClosed

ONE = BlockStored((b"1",), None, (1, 2), 2)
TWO = BlockStored((b"2",), b"1", (3, 4), 2)


def test_each_rank_has_a_batch_of_what_changed() -> None:
    feed = KvEventFeed(is_on=True)
    assert feed.take(0) == ()
    feed.add(1, [ONE, TWO])
    feed.add(0, [ONE])
    feed.add(1, [BlockRemoved((b"2",))])
    batches = feed.take(0)
    assert [(each.data_parallel_rank, each.events) for each in batches] == [
        (0, (ONE,)),
        (1, (ONE,)),
    ]
    feed.clear({1})
    feed.add(1, [TWO])
    (batch,) = feed.take(0)
    assert (batch.data_parallel_rank, batch.events) == (1, (AllBlocksCleared(), TWO))


def test_who_waits_hears_of_changes_and_of_the_end() -> None:
    feed = KvEventFeed(is_on=True)
    threading.Timer(0.05, feed.add, (0, [ONE])).start()
    assert len(feed.take(30)) == 1
    threading.Timer(0.05, feed.close, (EngineClosed("closed"),)).start()
    with pytest.raises(EngineClosed, match="closed"):
        feed.take(30)


def test_without_the_setting_nothing_is_kept() -> None:
    feed = KvEventFeed(is_on=False)
    feed.add(0, [ONE])
    with pytest.raises(ValueError, match="kv_events: False is not allowed"):
        feed.take(0)

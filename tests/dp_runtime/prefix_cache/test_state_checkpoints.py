"""Slots of states behind cached pages: who has one, and which is given up first."""

from __future__ import annotations

import pytest

from dp_runtime.core.batch import NULL_PAGE
from dp_runtime.prefix_cache.prefix_cache import PrefixCache
from dp_runtime.prefix_cache.state_checkpoints import Checkpoint, StateCheckpoints


def filled(*pages: int) -> StateCheckpoints:
    """One slot for each page, from 5 on."""
    states = StateCheckpoints(range(5, 5 + len(pages)))
    for page in pages:
        keep(states, page)
    return states


def keep(states: StateCheckpoints, page: int) -> None:
    slot = states.take()
    assert slot is not None
    states.attach(page, Checkpoint(slot, 0))


def test_the_state_that_was_read_longest_ago_is_given_up_first() -> None:
    states = filled(1, 2, 3)
    for page in (1, 3):
        states.lock(page)
        states.unlock(page)
    assert [states.take() for _ in range(3)] == [6, 5, 7]
    assert (states.take(), states.num_evictions) == (None, 3)
    states.check([5, 6, 7])


def test_a_state_that_is_being_read_is_not_given_up() -> None:
    states = filled(1, 2)
    states.lock(1)
    states.lock(1)
    assert states.take() == 6
    states.unlock(1)
    assert states.take() is None
    with pytest.raises(AssertionError, match="page 1 is being read"):
        states.drop(1)
    states.unlock(1)
    assert states.take() == 5


def test_a_page_has_one_state_and_keeps_the_first() -> None:
    states = filled(1, 2)
    keep_again = states.take()
    assert keep_again == 5, "that of page 1"
    states.attach(2, Checkpoint(keep_again, 3))
    assert states.find(2) == Checkpoint(6, 0)
    assert states.take() == 5
    states.give_back(5)
    states.check([])


def test_a_state_with_one_further_on_is_given_up_first_unless_somebody_read_it() -> None:
    states = filled(1, 2, 3)
    states.lock(2)
    states.unlock(2)
    for page in (3, 2, 9):
        states.demote(page)
    assert states.take() == 7
    assert states.take() == 5


def test_slots_are_lost_or_twice_there_never() -> None:
    states = filled(1, 2)
    taken = states.take()
    states.check([5])
    with pytest.raises(AssertionError, match=r"of slots range\(5, 7\) there are \[6\]"):
        states.check([])
    assert taken == 5
    with pytest.raises(AssertionError, match="slot 9 is none"):
        states.give_back(9)


def test_a_page_that_leaves_the_cache_takes_its_state_along() -> None:
    cache = PrefixCache(range(3, 5))
    for page, parent in ((1, NULL_PAGE), (2, 1), (4, 1)):
        cache.insert(page, bytes([page]), bytes([page]), parent)
        if page != 4:
            keep(cache.states, page)
    assert [cache.has_children(page) for page in (1, 2, 4)] == [True, False, False]
    cache.remove(2)
    assert cache.states.pages == [1]
    cache.remove(4)
    assert not cache.has_children(1)
    cache.check()
    cache.states.check([])

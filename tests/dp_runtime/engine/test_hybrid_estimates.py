"""Routing by ranks whose models have recurrent layers: it expects what the scheduler serves."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from dp_runtime.core.rank_events.kv_events import BlockStored, StateStored
from dp_runtime.engine.routing.rank_caches import RankCaches, prompt_pages
from dp_runtime.prefix_cache.page_events import PageEvents
from dp_runtime.prefix_cache.page_hash import PageHasher
from tests.dp_runtime.scheduler.state_device import StateDevice
from tests.dp_runtime.scheduler.test_state_tracks import PAGE, actions, alone, limits, play, text_of


class FollowedDevice(StateDevice):
    """Compares what routing expects of a rank with what the device holds, before every step."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.names = PageHasher(PAGE, "a model")
        self.events, self.caches = PageEvents(PAGE), RankCaches(needs_states=True)
        self.scheduler.page_table.allocator.cache.follow(self.events)
        self.num_compared = 0

    def expected(self, number: int) -> int:
        self.caches.apply(0, self.events.pending.take())
        digests = prompt_pages(self.sequences[number].request, self.names)
        return PAGE * self.caches.num_pages(0, digests)

    def hits_due(self) -> dict[int, int]:
        due = super().hits_due()
        for number, hit in due.items():
            if not self.sequences[number].outputs:
                assert self.expected(number) == hit
                self.num_compared += hit > 0
        return due


@settings(deadline=None, max_examples=8)
@given(
    actions, st.integers(27, 60), st.integers(1, 4), st.sampled_from([70, 200]),
    st.integers(0, 1), st.sampled_from([0, PAGE]),
)  # fmt: skip
def test_what_is_expected_of_a_rank_is_what_it_serves(
    todo: list[tuple[str, Any, int, int]], num_pages: int, checkpoints: int, tokens: int,
    depth: int, interval: int,
) -> None:  # fmt: skip
    own = limits(checkpoints, tokens, interval=interval)
    play(FollowedDevice(num_pages, own, PAGE, depth), todo)


def test_turns_of_a_conversation_are_expected() -> None:
    device = FollowedDevice(60, limits(4, interval=2 * PAGE), PAGE)
    alone(device, [*range(100, 170)], 30)
    for _ in range(3):
        number = device.add([*text_of(device, len(device.sequences) - 1), 5], 20)
        expected = device.expected(number)
        device.drain()
        assert device.hits[number] == [expected]
    assert device.num_compared == 3


def test_a_prompt_on_its_way_counts_up_to_the_state_that_it_leaves() -> None:
    caches, pages = RankCaches(needs_states=True), [b"a", b"b", b"c"]
    caches.expect(0, pages)
    assert caches.num_pages(0, pages) == caches.num_pages(0, [*pages, b"d"]) == 3
    assert caches.num_pages(0, pages[:2]) == 0, "it leaves none there"
    caches.arrived(0, pages)
    caches.apply(0, [BlockStored((page,), None, (0,), 1) for page in pages])
    assert caches.num_pages(0, pages) == 0, "it left none, after all"
    caches.apply(0, [StateStored((b"b",))])
    assert caches.num_pages(0, pages) == 2
    plain = RankCaches(needs_states=True, copies_states=False)
    plain.expect(0, pages)
    assert plain.num_pages(0, pages) == 0

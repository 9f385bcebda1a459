"""Who follows KV events has what ranks have cached, and so has the router."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from dp_runtime import Engine, EngineConfig, SamplingParams
from dp_runtime.cli.model_choice import TINY_MODEL
from dp_runtime.core.rank_events.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from dp_runtime.startup.execution_choices import page_hasher

PAGE = 4
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
CONFIG = EngineConfig(
    str(TINY_MODEL), dp_size=2, launcher="thread", routing="prefix_aware", kv_events=True,
    page_size=PAGE, num_pages=40, max_model_len=100,
)  # fmt: skip


class Follower:
    """Applies events as a router outside does."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.pages: defaultdict[int, dict[bytes, BlockStored]] = defaultdict(dict)

    def follow(self) -> None:
        while batches := self.engine.kv_events():
            for batch in batches:
                pages = self.pages[batch.data_parallel_rank]
                for event in batch.events:
                    match event:
                        case BlockStored(block_hashes=(digest,), parent_block_hash=parent):
                            assert digest not in pages, "a page is stored once"
                            assert parent is None or parent in pages, "it follows another"
                            pages[digest] = event
                        case BlockRemoved(block_hashes=digests):
                            for digest in digests:
                                del pages[digest]
                        case AllBlocksCleared():
                            pages.clear()

    def check(self) -> None:
        """Compare with what ranks, and the router, really have; nothing runs meanwhile."""
        self.engine.generate([[3]] * 2, GREEDY, dp_ranks=self.engine.dp_ranks[:1] * 2)
        self.follow()
        router = self.engine._core._admission._loads.caches
        for seat in self.engine._core._group._ranks.seats:  # type: ignore[attr-defined]
            requests = seat.handle.worker._holder.requests
            cache = requests.scheduler.page_table.allocator.cache
            events = requests.take_kv_events()  # what nobody has polled yet
            assert not events or seat.dp_rank != self.engine.dp_ranks[0]
            self.engine._core._on_kv_events(seat.dp_rank, events)
            self.follow()
            assert self.pages[seat.dp_rank].keys() == cache._by_digest.keys()
            assert router.pages[seat.dp_rank].stored == {*cache._by_digest}


def test_followers_and_the_router_have_what_ranks_have() -> None:
    rng, evicted = Random(0), 0
    with Engine(CONFIG) as engine:
        follower, said = Follower(engine), [[*range(10, 40)], [*range(20, 60)]]
        for _ in range(6):
            prompts = [rng.choice(said)[: rng.randrange(1, 40)] for _ in range(5)]
            prompts += [[rng.randrange(3, 200) for _ in range(rng.randrange(1, 60))]]
            outputs = engine.generate(prompts, GREEDY)
            said += [[*prompt, *output.token_ids] for prompt, output in zip(prompts, outputs)]
            follower.follow()
        follower.check()
        names = page_hasher(engine.config)
        tokens = max(said, key=len)
        for each in follower.pages.values():
            for digest, event in each.items():
                assert len(event.token_ids) == event.block_size == PAGE
                if event.parent_block_hash is None:
                    assert names.digests(np.array(event.token_ids)) == [digest]
        ranks = engine.metrics()
        evicted = sum(rank.totals.prefixes.evictions for rank in ranks)
        assert evicted > 0
        found = sum(rank.requests.cached_tokens for rank in ranks)
        assert 0 < found <= sum(rank.totals.prefixes.hits for rank in ranks)
        assert sum(rank.requests.expected_cached_tokens for rank in ranks) > 0
        engine.resize(1)
        follower.follow()
        assert not follower.pages[1]
        engine.generate([tokens], GREEDY)
        follower.check()


def test_a_conversation_goes_where_it_is_cached() -> None:
    with Engine(CONFIG) as engine:
        first, other = [*range(10, 45)], [*range(50, 90)]
        engine.generate([first], GREEDY, dp_ranks=[1])
        engine.generate([other], GREEDY, dp_ranks=[0])
        for prompt, rank in ((first, 1), (other, 0)):
            (output,) = engine.generate([[*prompt, 7, 8]], GREEDY)
            assert (output.dp_rank, output.num_cached_tokens) == (rank, len(prompt) // PAGE * PAGE)
        expected = [rank.requests.expected_cached_tokens for rank in engine.metrics()]
        assert expected == [40, 32]


def test_events_of_a_cache_that_is_off_are_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"kv_events: True is not allowed; .* prefix_caching"):
        replace(CONFIG, prefix_caching=False)
    assert not replace(CONFIG, routing="least_tokens", kv_events=False).tells_kv_events

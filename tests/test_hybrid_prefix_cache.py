"""Tokens of hybrid models are the same with the prefix cache as without, over thread ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from dp_runtime import Engine, RequestOutput
from dp_runtime.runner.step_loop import StepLoop
from tests.serving import check_pages_free, joined_ranks
from tests.speculative_cases import Drafted, engine_of
from tests.test_prefix_cache import check_alike, converse

DraftedOf = Callable[[str], Drafted]


class Poison:
    """Fills the slots of states that leave a rank's cache with NaN, and those nobody took yet."""

    def __init__(self, loop: StepLoop, states: list[torch.Tensor]) -> None:
        self._cache = loop.scheduler.page_table.allocator.cache.states
        self._tracks = loop.scheduler.states
        self._states = states
        self._slots = loop.scheduler.limits.checkpoint_slots
        self._launch = loop._launch
        vars(loop)["_launch"] = self.launch

    def launch(self, *arguments: Any) -> None:
        kept = {self._cache.find(page).slot for page in self._cache.pages}
        free = [slot for slot in self._slots if slot not in kept.union(self._tracks.taken)]
        for tensor in self._states:
            tensor[free] = torch.nan
        self._launch(*arguments)


@contextmanager
def poisoned(engine: Engine) -> Iterator[Engine]:
    """All slots are dirty at first."""
    with engine:
        for rank in joined_ranks(engine):
            states = [tensor for state in rank.connected.loaded.rank.states for tensor in state]
            for tensor in states:
                tensor[::2], tensor[1::2] = torch.nan, 1e4
            Poison(rank.loop, states)
        yield engine
        check_pages_free(engine)


EVERY = {"page_size": 4, "state_track_interval": 4, "num_state_checkpoints": 8}
FEW = EVERY | {"num_pages": 36, "dp_size": 1, "num_state_checkpoints": 4}
NO_BUFFER = {"prefix_state_strategy": "no_buffer", "num_state_checkpoints": 8}
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "plain": ("hybrid", 0, EVERY | {"dp_size": 1}),
    "chunks, two ranks, overlap": ("hybrid", 0, EVERY | {"overlap": True, "max_num_tokens": 24}),
    "few pages, overlap": ("hybrid", 0, FEW | {"overlap": True}),
    "one draft, overlap": ("hybrid", 1, EVERY | {"overlap": True}),
    "two drafts, few pages, overlap": ("hybrid", 2, FEW | {"overlap": True}),
    "three drafts, few pages": ("hybrid", 3, FEW | {"max_num_tokens": 40}),
    "three drafts, overlap": ("hybrid", 3, EVERY | {"overlap": True, "poison_padding": True}),
    "no buffer": ("hybrid_next", 0, NO_BUFFER | {"page_size": 1}),
    "no buffer, drafts, overlap": (
        "hybrid", 2, NO_BUFFER | {"page_size": 2, "overlap": True}
    ),
}  # fmt: skip


SLOW = (
    "plain", "few pages, overlap", "one draft, overlap", "three drafts, few pages", "no buffer",
    "no buffer, drafts, overlap",
)  # fmt: skip
EACH = [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in CASES]


@pytest.fixture(scope="module")
def expected_of(drafted_of: DraftedOf) -> Callable[[str], list[RequestOutput]]:
    """What a model says without a cache, alone and without drafts: all others say the same."""
    known: dict[str, list[RequestOutput]] = {}

    def expected(checkpoint: str) -> list[RequestOutput]:
        if checkpoint not in known:
            with engine_of(drafted_of(checkpoint), 0, 1, prefix_caching=False) as engine:
                known[checkpoint] = converse(engine)
        return known[checkpoint]

    return expected


@pytest.mark.parametrize("kind", EACH)
def test_tokens_are_those_without_the_cache(
    kind: str, drafted_of: DraftedOf, expected_of: Callable[[str], list[RequestOutput]]
) -> None:
    checkpoint, num_steps, fields = CASES[kind]
    with poisoned(engine_of(drafted_of(checkpoint), num_steps, **fields)) as engine:
        outputs = converse(engine)
        report = engine.report()
        states = [rank.health.states for rank in engine.metrics()]
    check_alike(outputs, expected_of(checkpoint))
    assert {one.num_checkpoints for one in states} == {fields["num_state_checkpoints"]}
    assert all(one.free_checkpoints < one.num_checkpoints and one.num_slots for one in states)
    assert sum(one.hits for one in report.prefixes) > 20
    if "num_pages" in fields:
        assert report.preemptions > 0

"""Models with recurrent states that draft: recovered ranks, forced acceptance, other processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from dp_runtime import Engine, SamplingParams
from tests.dp_runtime.speculative_ranks import Watch
from tests.product_cases import random_prompt
from tests.reference import TOLERANCE, Reference
from tests.serving import check_pages_free, joined_ranks, loops_of
from tests.speculative_cases import Drafted, engine_of

DraftedOf = Callable[[str], Drafted]
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=24)
PROMPTS = [random_prompt(length, "drafted") for length in (1, 5, 9, 20, 33, 50, 3, 17)]


@contextmanager
def dirty(drafted: Drafted, num_steps: int, dp_size: int = 2, **others: Any) -> Iterator[Engine]:
    """An engine whose states hold what is no request's, NaN in every other slot."""
    with engine_of(drafted, num_steps, dp_size, poison_padding=True, **others) as engine:
        for rank in joined_ranks(engine):
            for tensor in (one for state in rank.connected.loaded.rank.states for one in state):
                tensor[::2], tensor[1::2] = torch.nan, 1e4
        yield engine


def tokens_of(engine: Engine) -> list[tuple[int, ...]]:
    handles = [engine.submit(prompt, GREEDY) for prompt in PROMPTS]
    return [tuple(handle.result(60).token_ids) for handle in handles]


@pytest.fixture(scope="module")
def plain(drafted_of: DraftedOf) -> list[tuple[int, ...]]:
    with engine_of(drafted_of("hybrid"), 0) as engine:
        return tokens_of(engine)


@pytest.mark.parametrize(
    ("num_steps", "fields"),
    [
        (1, {}),
        (3, {"overlap": False}),
        (7, {"max_num_requests": 3}),
        (4, {"speculative_adaptive": True, "num_pages": 14}),
    ],
)  # fmt: skip
def test_dirty_slots_are_begun_with_zeros_and_no_accepted_drafts(
    num_steps: int, fields: dict[str, Any], drafted_of: DraftedOf, plain: list[tuple[int, ...]]
) -> None:
    with dirty(drafted_of("hybrid"), num_steps, **fields) as engine:
        for _ in range(2):  # the second time with what the first one left
            assert tokens_of(engine) == plain
        assert engine.report().drafts_accepted > 0
        check_pages_free(engine)


@pytest.mark.parametrize(("kind", "overlap"), [("raise", False), ("raise", True), ("kill", True)])
def test_requests_of_a_rank_that_is_lost_go_on(
    kind: str, overlap: bool, drafted_of: DraftedOf, plain: list[tuple[int, ...]]
) -> None:
    """A survivor's step may have run its drafts; what it holds is not those of its outputs."""
    fields: dict[str, Any] = {"launcher": "local", "torch_threads": 1} if kind == "kill" else {}
    inject = ";".join(f"rank=1,step={step},kind={kind},epoch={e}" for e, step in enumerate((6, 4)))
    with engine_of(drafted_of("hybrid"), 3, overlap=overlap, inject=inject, **fields) as engine:
        assert tokens_of(engine) == plain
        assert {rank.epoch for rank in engine.health()} == {2}
        check_pages_free(engine)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_state_follows_drafts_that_are_accepted_by_force(
    overlap: bool, drafted_of: DraftedOf, oracle_of: Callable[[str], Reference]
) -> None:
    """Drafts that were not its own choice are in caches and states: it goes on as after those."""
    fields: dict[str, Any] = {"speculative_forced_tokens": 2.5, "overlap": overlap}
    reference, compared = oracle_of("hybrid_next"), 0
    with dirty(drafted_of("hybrid_next"), 3, **fields) as engine:
        watches = [Watch(loop) for loop in loops_of(engine)]
        outputs = engine.generate(PROMPTS, GREEDY)
        report = engine.report()
        check_pages_free(engine)
    verified = dict(sorted(item for watch in watches for item in watch.verified.items()))
    for output, ones in zip(outputs, verified.values(), strict=True):
        prompt, text = output.prompt_token_ids, (*output.prompt_token_ids, *output.token_ids)
        fed = [*prompt, output.token_ids[0]]
        for one in ones:
            place = one.num_known + one.num_accepted
            fed += [*one.drafts[: one.num_accepted], *text[place : place + 1]]
        (logits,) = reference.logits([tuple(fed)])
        for one in ones:
            place = one.num_known + one.num_accepted
            if place < len(text):
                row = logits[place - 1]
                assert row.max() - row[fed[place]] < TOLERANCE
                compared += 1
    assert compared > 50
    assert 2.2 < report.tokens_per_verification < 2.8


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "ray"])
def test_ranks_in_processes_of_their_own(
    launcher: str, drafted_of: DraftedOf, plain: list[tuple[int, ...]]
) -> None:
    fields: dict[str, Any] = {"launcher": launcher, "torch_threads": 1}
    with engine_of(drafted_of("hybrid"), 3, 3, speculative_adaptive=True, **fields) as engine:
        assert tokens_of(engine) == plain
        assert engine.report().drafts_accepted > 0
        check_pages_free(engine)

"""Serving a load with an engine, and what must hold of every load."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic, sleep
from typing import Any

from torch import Tensor

from dp_runtime import AsyncEngine, Engine, RequestOutput, SamplingParams
from dp_runtime.core.request import FinishReason, Prompt, TokensPrompt
from dp_runtime.models.causal_lm import CausalLM
from dp_runtime.runner.step_loop import StepLoop
from tests.product_cases import Item
from tests.reference import Reference, check_greedy
from workers.stages.rank_stages import Joined

IDLE_S, SERVED_S = 10.0, 60.0


@contextmanager
def bystander(serve: Callable[[], object]) -> Iterator[None]:
    """Someone who asks for the same good thing all the while, and gets it.

    `serve` returns what was got, or None where somebody else may have ended it.
    """
    expected, done = serve(), threading.Event()
    assert expected is not None
    seen: list[object] = []

    def ask() -> None:
        while not done.wait(0.02):
            try:
                seen.append(serve())
            except BaseException as error:
                seen.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(SERVED_S)
    assert seen
    assert [one for one in seen if one not in (expected, None)] == []


def check_load(
    engine: Engine, reference: Reference, items: Sequence[Item], extra: str = "none"
) -> list[RequestOutput]:
    """Serve a load greedily, and compare it with the oracle."""
    prompts: list[Prompt] = [item.prompt for item in items]
    if extra == "embeds":
        prompts = [in_disguise(item.prompt, reference) for item in items]
    logprobs: dict[str, dict[str, Any]] = {
        "logprobs": {"logprobs": 3},
        "prompt_logprobs": {"prompt_logprobs": 2},
    }
    greedy = SamplingParams(temperature=0.0, ignore_eos=True, **logprobs.get(extra, {}))
    params = [replace(greedy, max_tokens=item.max_tokens) for item in items]
    serve = generate_among_aborts if extra == "aborts" else Engine.generate
    ranks = [item.dp_rank for item in items]
    outputs = serve(engine, prompts, params, ranks)
    for item, output in zip(items, outputs, strict=True):
        assert len(output.token_ids) == item.max_tokens
        assert output.finish_reason is FinishReason.LENGTH
        assert output.dp_rank == item.dp_rank
        assert (output.logprobs is None) == (extra != "logprobs")
        assert (output.prompt_logprobs is None) == (extra != "prompt_logprobs")
    check_greedy(reference, outputs, [item.prompt for item in items])
    check_pages_free(engine)
    return outputs


def in_disguise(prompt: Sequence[int], reference: Reference) -> TokensPrompt:
    """The same prompt for the model: other tokens at some positions, with the right embeddings."""
    positions = [position for position in range(len(prompt)) if position % 3 != 1]
    shown = list(prompt)
    for position in positions:
        shown[position] = (prompt[position] + 7) % 199
    rows = reference.embeddings[[prompt[position] for position in positions]]
    return TokensPrompt(shown, rows.numpy(), positions)


def generate_among_aborts(
    engine: Engine,
    prompts: Sequence[Prompt],
    params: Sequence[SamplingParams],
    ranks: Sequence[int],
) -> list[RequestOutput]:
    """`generate`, with requests between that are aborted: at once, running, or after the others."""
    endless = SamplingParams(max_tokens=10**6, temperature=0.7, ignore_eos=True)
    handles, doomed = [], []
    for index, (prompt, one, rank) in enumerate(zip(prompts, params, ranks)):
        handles.append(engine.submit(prompt, one, rank))
        doomed.append(engine.submit(range(1, 12), endless, (rank + index) % engine.config.dp_size))
    for handle in doomed[::3]:
        handle.abort()
    for handle in doomed[1::3]:
        next(iter(handle))
        handle.abort()
    outputs = [handle.result(60) for handle in handles]
    for handle in doomed:
        handle.abort()
        assert handle.result(60).finish_reason in (FinishReason.ABORT, FinishReason.LENGTH)
    return outputs


def check_pages_free(engine: Engine | AsyncEngine) -> None:
    """Assert that all ranks soon have all their pages back; page 0 is nobody's."""
    deadline = monotonic() + IDLE_S
    while held := [
        rank for rank in engine._core.health(5.0) if rank.free_pages != rank.num_pages - 1
    ]:
        assert monotonic() < deadline, f"pages are still held: {held}"
        sleep(0.005)


def joined_ranks(engine: Engine) -> list[Joined]:
    group: Any = engine._core._group
    stages = [seat.handle.worker._stage for seat in group._ranks.seats]
    assert all(isinstance(stage, Joined) for stage in stages), stages
    return stages


def models_of(engine: Engine) -> list[CausalLM]:
    """The model every rank has loaded, of an engine whose ranks are threads."""
    models: list[Any] = [r.connected.loaded.rank.models.target for r in joined_ranks(engine)]
    return models


def loops_of(engine: Engine) -> list[StepLoop]:
    """Every rank's step loop, of an engine whose ranks are threads."""
    return [rank.loop for rank in joined_ranks(engine)]


def pools_of(engine: Engine) -> list[Sequence[Tensor]]:
    """Every rank's page pools, [layer], those of the draft behind the model's."""
    return [rank.connected.loaded.rank.pools for rank in joined_ranks(engine)]

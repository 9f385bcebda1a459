"""What the engine counts is what is unfinished, whatever was refused, failed or aborted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_runtime import Engine, EngineConfig, RequestHandle, SamplingParams
from dp_runtime.core.request import FinishReason
from dp_runtime.errors import EngineClosed, EngineOverloaded, RankFailed, RequestFailed
from tests.dp_runtime.engine.fake_group import FakeGroup, fake_engine, outstanding
from tests.dp_runtime.hostile import TWOS, junk

LIMIT = 5
ACTS = st.tuples(
    st.sampled_from(
        ("submit", "submit", "generate", "refused", "unsendable", "finish", "fail", "break",
         "abort", "abandon stream", "lose a rank")
    ),
    st.integers(0, 50),
)  # fmt: skip


def expected(group: FakeGroup) -> list[tuple[int, int]]:
    requests: Counter[int] = Counter()
    tokens: Counter[int] = Counter()
    for rank, request in group.taken.values():
        requests[rank] += 1
        tokens[rank] += len(request.prompt_token_ids) + request.params.known_max_tokens
    return [(requests[rank], tokens[rank]) for rank in range(2)]


class Caller:
    """Does what callers and ranks do, one act at a time."""

    def __init__(self, engine: Engine, group: FakeGroup) -> None:
        self.engine, self.group = engine, group
        self.handles: list[RequestHandle] = []
        self.lost = self.unsendable = False

    def act(self, name: str, number: int) -> None:
        running = sorted(self.group.taken)
        chosen = running[number % len(running)] if running else -1
        twos: Any = TWOS[number % len(TWOS)]
        match name:
            case "submit":
                self.submit([twos] * (1 + number % 9), SamplingParams(max_tokens=twos), twos % 2)
            case "generate" if not self.lost:
                with pytest.raises(ValueError, match=r"prompts\[2\]: prompt"):
                    self.engine.generate([[1], [2], [VALUES[number % len(VALUES)]]])
            case "refused" if not self.lost:
                bad = VALUES[number % len(VALUES)]
                for given in (([bad], None, None), ([1], bad, None), ([1], None, bad)):
                    with pytest.raises(ValueError, match=r"prompt|params|dp_rank"):
                        self.engine.submit(*given)
            case "unsendable":
                self.group.refusal, self.unsendable = TypeError("can't pickle"), True
                self.submit([1], SamplingParams(), None)
                self.group.refusal, self.unsendable = None, False
            case "finish":
                self.group.end(chosen, token_ids=(1,), finish_reason=FinishReason.LENGTH)
            case "fail":
                self.group.end(chosen, error="NaN logits", finish_reason=FinishReason.ABORT)
            case "break" if chosen >= 0:  # the driver can't make sense of what came
                self.group.end(chosen, token_ids=(1,), logprobs=5, finish_reason="length")
            case "abort" if self.handles:
                self.handles[number % len(self.handles)].abort()
            case "abandon stream" if not self.lost and len(running) < LIMIT:
                self.engine.stream([1]).close()
            case "lose a rank" if number % 10 == 0:
                self.lost = True
                self.group.on_failure(RankFailed("rank 1 died"))
                self.group.taken.clear()

    def submit(self, prompt: Any, params: SamplingParams, rank: Any) -> None:
        try:
            self.handles.append(self.engine.submit(prompt, params, rank))
        except EngineOverloaded:
            assert len(self.group.taken) == LIMIT
        except RankFailed:
            assert self.lost
        except TypeError:
            assert self.unsendable


VALUES = [value for name, value in junk().items() if name not in ("nested", "nested dict")]


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTS, max_size=40))
def test_the_count_is_what_ranks_have(acts: list[tuple[str, int]]) -> None:
    with fake_engine(max_queued_requests=LIMIT) as (engine, group):
        caller = Caller(engine, group)
        for name, number in acts:
            caller.act(name, number)
            assert outstanding(engine) == expected(group), name
    assert outstanding(engine) == [(0, 0), (0, 0)]
    assert engine._core._metrics.clock._num_inside == 0
    assert all(handle.done for handle in caller.handles)


def test_each_caller_gets_its_own_error() -> None:
    with fake_engine() as (engine, group):
        handle = engine.submit([1])
        failed = engine.submit([2])
        group.end(failed.request_id, error="NaN logits", finish_reason=FinishReason.ABORT)
        lost = RankFailed("rank 1 died")
        group.on_failure(lost)
        raised: list[BaseException] = []
        calls: list[Callable[[], object]] = [
            handle.result, lambda: list(handle), lambda: engine.submit([1]), engine.report,
            lambda: engine.generate([[1]]), lambda: engine.stream([1]), failed.result,
        ]  # fmt: skip
        for call in calls * 3:
            with pytest.raises((RankFailed, RequestFailed)) as caught:
                call()
            raised.append(caught.value)
    calls = [handle.result, engine.health, lambda: engine.submit([1])]
    for call in calls * 3:
        with pytest.raises((RankFailed, EngineClosed)) as caught:
            call()
        raised.append(caught.value)
    assert len({id(error) for error in raised}) == len(raised)
    assert {str(error) for error in raised} == {
        "rank 1 died", f"request {failed.request_id}: NaN logits", "the engine is closed",
    }  # fmt: skip
    assert lost.__traceback__ is None


@pytest.mark.parametrize(
    ("timeout", "message"),
    [(float("nan"), "timeout: nan"), (-1, "timeout: -1"), ("5", "timeout: '5'")],
)
def test_a_timeout_is_a_number_of_seconds(timeout: Any, message: str) -> None:
    with fake_engine() as (engine, group):
        handle = engine.submit([1])
        with pytest.raises(ValueError, match=message):
            handle.result(timeout)
        with pytest.raises(TimeoutError):
            handle.result(0)
        group.end(handle.request_id, finish_reason=FinishReason.LENGTH)
        assert handle.result(1e300).finish_reason == "length"


@pytest.mark.parametrize("config", ["path", None, EngineConfig, {"model": "x"}], ids=repr)
def test_an_engine_takes_a_configuration(config: Any) -> None:
    with pytest.raises(ValueError, match=r"config: .* is not allowed; an EngineConfig, as"):
        Engine(config)

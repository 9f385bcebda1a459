"""The driver's side of a request: order of tokens, text, ends."""

import threading

import pytest

from dp_runtime.core.request import FinishReason, RankRequest, RequestUpdate
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.engine.handle import RequestHandle
from dp_runtime.errors import RankFailed


def make_handle() -> RequestHandle:
    request = RankRequest(5, (1, 2), SamplingParams(max_tokens=4), 0, frozenset())
    return RequestHandle(request, 1, None, lambda handle: None)


def progress(first_index: int, *tokens: int, reason: FinishReason | None = None) -> RequestUpdate:
    return RequestUpdate(5, first_index, tokens, finish_reason=reason)


def test_tokens_are_put_together_in_order() -> None:
    handle = make_handle()
    assert not handle.apply(progress(0, 7))
    assert not handle.done
    handle.apply(progress(1, 8, reason=FinishReason.LENGTH))
    output = handle.result(0)
    assert (output.token_ids, output.finish_reason, output.dp_rank) == ((7, 8), "length", 1)
    assert [delta.token_ids for delta in handle] == [(7,), (8,)]


def test_a_token_delivered_twice_or_left_out_is_noticed() -> None:
    handle = make_handle()
    handle.apply(progress(0, 7))
    with pytest.raises(AssertionError, match="token 0 came, 1 is next"):
        handle.apply(progress(0, 7))
    with pytest.raises(AssertionError, match="token 3 came, 1 is next"):
        handle.apply(progress(3, 7))


def test_what_comes_after_the_end_is_dropped() -> None:
    handle = make_handle()
    handle.apply(progress(0, 7, reason=FinishReason.ABORT))
    handle.apply(progress(1, 9))
    assert handle.result(0).token_ids == (7,)


def test_a_failure_reaches_those_who_wait_and_those_who_iterate() -> None:
    handle = make_handle()
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            handle.result(5)
        except RankFailed as error:
            errors.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    handle.apply(progress(0, 7))
    handle.fail(RankFailed("rank 1 died"))
    waiter.join(5)
    assert len(errors) == 1
    with pytest.raises(RankFailed, match="rank 1 died"):
        list(handle)


def test_result_gives_up_after_its_timeout() -> None:
    with pytest.raises(TimeoutError, match="request 5 is not finished after 0"):
        make_handle().result(0)

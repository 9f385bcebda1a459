"""The driver's side of a request: order of tokens, text, ends."""

import threading
from unittest.mock import Mock

import pytest

from dp_runtime.core.request import FinishReason, RankRequest, RequestUpdate, TokenLogprob
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.engine.delta_queue import MAX_WAITING_DELTAS
from dp_runtime.engine.output_processor import Ends, OutputProcessor, deliver_here
from dp_runtime.engine.request_handle import RequestHandle, RequestStream
from dp_runtime.engine.request_log import RequestLog
from dp_runtime.engine.routing.load_balancer import Demand
from dp_runtime.errors import RankFailed, RequestFailed
from dp_runtime.metrics.request_totals import RequestTotals


class Served:
    """A request that was submitted, and what its rank tells of it."""

    def __init__(self, request_id: int = 5, logprobs: int | None = None) -> None:
        params = SamplingParams(max_tokens=1000, logprobs=logprobs)
        request = RankRequest(request_id, (1, 2), params, 0, frozenset())
        self.log = RequestLog(request, RequestTotals(1), None, Demand.of(request, None))
        self.aborted: list[int] = []
        self.handle = RequestHandle(
            self.log, Mock(Ends, abort=self.aborted.append, abandon=self.aborted.append)
        )
        self.processor = OutputProcessor()
        self.processor.add(self.log, self.handle)

    def apply(self, *updates: RequestUpdate) -> list[int]:
        """The requests that the rank must be told of."""
        deliveries = self.processor.process(updates)
        for delivery in deliveries:
            delivery.deliver()
        return [each.log.request_id for each in deliveries if each.rank_goes_on]


def progress(first_index: int, *tokens: int, reason: FinishReason | None = None) -> RequestUpdate:
    return RequestUpdate(5, first_index, tokens, finish_reason=reason)


def test_tokens_are_put_together_in_order() -> None:
    served = Served()
    deltas = iter(served.handle)
    assert not served.apply(progress(0, 7))
    assert not served.handle.done
    assert next(deltas).token_ids == (7,)
    served.apply(progress(1, 8, reason=FinishReason.LENGTH))
    output = served.handle.result(0)
    assert (output.token_ids, output.finish_reason, output.dp_rank) == ((7, 8), "length", 1)
    assert [delta.token_ids for delta in deltas] == [(8,)]


def test_a_token_delivered_twice_or_left_out_is_noticed() -> None:
    log = Served().log
    log.apply(progress(0, 7))
    with pytest.raises(AssertionError, match="token 0 came, 1 is next"):
        log.apply(progress(0, 7))
    with pytest.raises(AssertionError, match="token 3 came, 1 is next"):
        log.apply(progress(3, 7))


def test_what_comes_after_the_end_is_dropped() -> None:
    served = Served()
    served.apply(progress(0, 7, reason=FinishReason.ABORT))
    served.apply(progress(1, 9))
    assert served.handle.result(0).token_ids == (7,)


def test_a_failure_reaches_those_who_wait_and_those_who_iterate() -> None:
    served = Served()
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            served.handle.result(5)
        except RankFailed as error:
            errors.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    served.apply(progress(0, 7))
    deliver_here(served.processor.fail_all(RankFailed("rank 1 died")))
    waiter.join(5)
    assert len(errors) == 1
    with pytest.raises(RankFailed, match="rank 1 died"):
        list(served.handle)


def test_result_gives_up_after_its_timeout() -> None:
    with pytest.raises(TimeoutError, match="request 5 is not finished after 0"):
        Served().handle.result(0)


def test_an_error_of_one_request_ends_that_request_alone() -> None:
    served = Served()
    other = Served(request_id=6)
    served.processor.add(other.log, other.handle)
    told = served.apply(progress(3, 7), RequestUpdate(6, 0, (8,)))
    assert told == [5], "the rank must be told, or it goes on with a request that nobody follows"
    with pytest.raises(RequestFailed, match=r"request 5: AssertionError: .* 0 is next"):
        served.handle.result(0)
    assert not other.handle.done
    assert list(other.handle.token_ids) == [8]
    assert served.processor.get(5) is None
    assert served.processor.get(6) is not None


def test_a_slow_reader_gets_fewer_and_larger_deltas() -> None:
    served = Served(logprobs=0)
    count = 3 * MAX_WAITING_DELTAS
    for index in range(count):
        reason = FinishReason.LENGTH if index == count - 1 else None
        logprob = TokenLogprob(index, -float(index))
        served.apply(RequestUpdate(5, index, (index,), (logprob,), finish_reason=reason))
        if index == 0:
            first = next(iter(served.handle))
    (rest,) = served.handle
    assert (first.token_ids, first.finish_reason) == ((0,), None)
    assert (rest.token_ids, rest.finish_reason) == (tuple(range(1, count)), FinishReason.LENGTH)
    assert first.text + rest.text == served.handle.result(0).text
    assert [each.logprob for each in rest.logprobs or ()] == [
        -float(index) for index in range(1, count)
    ]


def test_a_stream_that_is_dropped_aborts_its_request_even_if_it_was_never_begun() -> None:
    served = Served()
    stream = RequestStream(served.handle)
    assert served.aborted == []
    del stream
    assert served.aborted == [5]


def test_a_batch_with_several_updates_of_a_request_ends_it_once() -> None:
    served = Served()
    deliveries = served.processor.process(
        [progress(0, 7), progress(1, 8, reason=FinishReason.STOP)]
    )
    assert [delivery.ends for delivery in deliveries] == [False, True]

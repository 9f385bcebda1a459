"""Routing and admission."""

import queue
import threading
from time import sleep

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_runtime.engine.admission import Admission
from dp_runtime.engine.load_balancer import LOAD_BALANCERS, LeastPaddedCost, LeastTokens, RoundRobin
from dp_runtime.engine.load_balancer import Outstanding as Queue
from dp_runtime.errors import EngineClosed, QueueFull


def test_round_robin_takes_one_rank_after_the_other() -> None:
    router = RoundRobin()
    queues = [Queue(9, 900), Queue(), Queue()]
    assert [router.choose(queues, 10) for _ in range(5)] == [0, 1, 2, 0, 1]


def test_least_tokens_looks_at_tokens_not_requests() -> None:
    assert LeastTokens().choose([Queue(1, 500), Queue(3, 100), Queue(2, 101)], 10) == 1
    assert LeastTokens().choose([Queue(), Queue()], 10) == 0


def test_least_padded_cost_fills_up_to_the_largest_rank_first() -> None:
    queues = [Queue(3, 10), Queue(2, 900), Queue(3, 20)]
    assert LeastPaddedCost().choose(queues, 10) == 1
    queues = [Queue(3, 30), Queue(3, 900), Queue(3, 20)]
    assert LeastPaddedCost().choose(queues, 10) == 2


@given(
    st.sampled_from(sorted(LOAD_BALANCERS)),
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5000)), min_size=1, max_size=8),
    st.integers(1, 1000),
)
def test_every_router_names_a_rank(name: str, queues: list[tuple[int, int]], tokens: int) -> None:
    ranks = [Queue(*queue) for queue in queues]
    assert LOAD_BALANCERS[name]().choose(ranks, tokens) in range(len(ranks))


def test_admission_counts_and_refuses_above_its_limit() -> None:
    admission = Admission(LeastTokens(), 2, 2)
    assert admission.enter(10, None, wait=False) == 0
    assert admission.enter(5, None, wait=False) == 1
    with pytest.raises(QueueFull, match="max_queued_requests"):
        admission.enter(1, None, wait=False)
    admission.leave(1, 5)
    assert admission.enter(1, 0, wait=False) == 0
    assert admission.num_unfinished == 2


def test_admission_lets_a_waiting_request_in_and_frees_it_on_close() -> None:
    admission = Admission(LeastTokens(), 1, 1)
    admission.enter(1, None, wait=True)
    entered = threading.Event()

    def wait_for_a_place() -> None:
        admission.enter(1, None, wait=True)
        entered.set()

    waiter = threading.Thread(target=wait_for_a_place, daemon=True)
    waiter.start()
    assert not entered.wait(0.05)
    admission.leave(0, 1)
    assert entered.wait(5)

    errors: list[BaseException] = []

    def wait_until_closed() -> None:
        try:
            admission.enter(1, None, wait=True)
        except EngineClosed as error:
            errors.append(error)

    closed = threading.Thread(target=wait_until_closed, daemon=True)
    closed.start()
    admission.close(EngineClosed("closed"))
    closed.join(5)
    assert len(errors) == 1


def test_callers_that_wait_enter_by_priority_then_in_order_of_arrival() -> None:
    admission, entered = Admission(LeastTokens(), 1, 1), queue.Queue[str]()
    admission.enter(1, None, wait=True)

    def wait_for_a_place(name: str, priority: int) -> None:
        admission.enter(1, None, wait=True, priority=priority)
        entered.put(name)

    for number, (name, priority) in enumerate((("a", 1), ("b", 0), ("c", 1), ("d", -1)), 1):
        threading.Thread(target=wait_for_a_place, args=(name, priority), daemon=True).start()
        while len(admission._waiting) < number:
            sleep(0.001)
    for name in ("d", "b", "a", "c"):
        admission.leave(0, 1)
        assert entered.get(timeout=10) == name
    assert admission.num_unfinished == 1

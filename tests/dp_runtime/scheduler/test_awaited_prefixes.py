"""Requests that begin alike: the first computes their pages, and the others wait for these."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from dp_runtime.prefix_cache.page_hash import PageHasher
from dp_runtime.sampling.sampler import SampledTokens
from dp_runtime.scheduler.scheduler_output import SchedulerOutput
from tests.dp_runtime.scheduler.test_scheduler import PROGRAM
from tests.dp_runtime.scheduler.test_shared_prefixes import (
    PAGE,
    SharingDriver,
    prompt_of,
    request,
    run,
)


def test_alike_requests_that_run_together_end_with_one_copy() -> None:
    driver = SharingDriver(40, tokens=40, min_awaited_tokens=13)
    prompt = prompt_of(0, 12)
    for number in (1000, 1001, 1002):
        driver.add(request(number, prompt, 9))
    assert driver.step().prefill_rows == 36, "fewer tokens than are worth waiting for"
    assert driver.scheduler.num_free_pages == 39 - 3 - 0, "three pages, computed three times"
    driver.drain()


def start_alike(driver: SharingDriver, count: int) -> SchedulerOutput:
    for number in range(1000, 1000 + count):
        driver.add(request(number, prompt_of(0, 14), 9))
    driver.add(request(1100, tuple(range(400, 405)), 9))
    return driver.step()


@pytest.mark.parametrize("depth", [0, 1])
def test_alike_requests_wait_for_the_first_and_block_nobody(depth: int) -> None:
    driver = SharingDriver(40, tokens=40, depth=depth)
    rows = [start_alike(driver, 4).prefill_rows, *(driver.step().prefill_rows for _ in range(2))]
    assert rows == ([14 + 5, 0, 3 * 2] if depth else [14 + 5, 3 * 2, 0])
    driver.drain()
    assert driver.scheduler.prefixes is not None
    assert driver.scheduler.prefixes.num_hits == 3 * 12


def test_who_waits_computes_itself_once_the_other_is_gone() -> None:
    driver = SharingDriver(40, tokens=8)
    step = start_alike(driver, 3)
    assert [(chunk.state.request_id, chunk.length) for chunk in step.chunks] == [(1000, 8)]
    driver.abort(1000)
    step = driver.step()
    assert [(chunk.state.request_id, chunk.start) for chunk in step.chunks] == [
        (1001, 8),
        (1100, 0),
    ]
    driver.drain()
    driver.check_outputs()


def test_those_who_wait_keep_their_places_among_the_running() -> None:
    driver = SharingDriver(40, tokens=40)
    step = start_alike(driver, 6)
    assert [chunk.state.request_id for chunk in step.chunks] == [1000], "six places"
    driver.drain()
    driver.check_outputs()


def test_a_blocked_request_is_matched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SharingDriver(12)
    prompt = prompt_of(0, 20)
    run(driver, request(1000, prompt, 2))
    driver.add(request(1001, prompt_of(1, 25), 14))
    driver.step()
    driver.step()
    driver.add(request(1002, prompt, 20))
    find = Mock(wraps=driver.cache.find)
    monkeypatch.setattr(driver.cache, "find", find)
    for _ in range(5):
        driver.step()
    assert [item.request_id for item in driver.scheduler.waiting] == [1002], "it lacks pages"
    assert find.call_count < 5 + 5
    driver.drain()
    driver.check_outputs()


def test_nobody_waits_for_a_page_that_did_not_get_into_the_cache() -> None:
    class OneDigest(PageHasher):
        def link(self, parent: bytes, content: bytes, embeds: bytes) -> bytes:
            return b"all pages"

    driver = SharingDriver(40, 40, hasher=OneDigest(PAGE, "a model"))
    for number in (1000, 1001):
        driver.scheduler.add(request(number, prompt_of(0, 12), 9))
    for begins in (1000, 1001):
        step = driver.scheduler.schedule(PROGRAM)
        assert [chunk.state.request_id for chunk in step.chunks] == [begins]
        count = len(step.samples)
        driver.scheduler.commit(step, SampledTokens((0,) * count, (None,) * count))
    assert len(driver.cache) == 1

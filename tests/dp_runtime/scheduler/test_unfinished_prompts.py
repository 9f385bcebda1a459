"""Prompts that are not computed to their end leave what was: aborted, preempted, not finite."""

from __future__ import annotations

import pytest

from dp_runtime.sampling.sampler import SampledTokens
from tests.dp_runtime.scheduler.test_scheduler import PROGRAM
from tests.dp_runtime.scheduler.test_shared_prefixes import SharingDriver, prompt_of, request, run

LONG = prompt_of(0, 35)  # in chunks of 16, 16 and 3


@pytest.mark.parametrize("depth", [0, 1])
def test_pages_of_an_aborted_prompt_are_found(depth: int) -> None:
    driver = SharingDriver(40, depth=depth)
    driver.add(request(1000, LONG, 4))
    driver.step()
    driver.step()
    driver.abort(1000)
    driver.step()  # nothing but the commit of what was in flight
    assert run(driver, request(1001, LONG, 4)) == [32]


def test_a_preempted_prompt_goes_on_where_its_pages_end() -> None:
    driver = SharingDriver(12)
    driver.add(request(1000, (1, 2, 3, 4), 30))
    driver.add(request(1001, prompt_of(0, 30), 4))
    starts = list[int]()
    while driver.scheduler.has_work:
        step = driver.step(prefill_budget=2 if driver.scheduler.num_preemptions == 0 else None)
        starts += [chunk.start for chunk in step.chunks if chunk.state.request_id == 1001]
    assert driver.scheduler.num_preemptions == 1
    assert starts[: starts.index(14) + 1] == [*range(0, 16, 2)], "it was preempted in its prompt"
    assert starts.count(0) == 1


def test_a_chunk_with_values_that_are_not_finite_leaves_nothing() -> None:
    driver = SharingDriver(40)
    driver.add(request(1000, LONG, 4))
    first = driver.step()
    second = driver.scheduler.schedule(PROGRAM)
    driver.scheduler.commit(second, SampledTokens((), (), not_finite=(0,)))
    assert driver.cached_pages() == {*first.target.page_table[0].tolist()}
    driver.scheduler.abort(1000)
    cleared = driver.scheduler.page_table.take_pages_to_clear()
    assert {*second.target.page_table[0, 4:].tolist()} <= {*cleared}
    assert not driver.cached_pages().intersection(cleared)


def test_who_waits_for_a_prompt_waits_for_its_last_pages_too() -> None:
    """Behind the first chunk three pages are lacking, which nobody would begin to wait for."""
    driver = SharingDriver(40, tokens=16, min_awaited_tokens=16)
    for number in range(1000, 1003):
        driver.add(request(number, prompt_of(0, 30), 4))
    assert [driver.step().prefill_rows for _ in range(3)] == [16, 14, 2 * 2]
    driver.drain()
    driver.check_outputs()

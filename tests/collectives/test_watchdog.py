"""The watch over a device, with events that are only pretended."""

from __future__ import annotations

import threading
import time

import pytest

from collectives.watchdog import Watchdog
from dp_runtime.errors import CollectiveAborted, CollectiveTimeout
from tests.workers.leftovers import wait_until


class Event:
    """Done when it is told to be; or a device that has failed."""

    def __init__(self, done: bool = False, error: str = "") -> None:
        self.done, self.error = done, error

    def query(self) -> bool:
        if self.error:
            raise RuntimeError(self.error)
        return self.done


class Failures:
    """What a watch reports, and when."""

    def __init__(self) -> None:
        self.all: list[RuntimeError] = []
        self.told = threading.Event()

    def note(self, failure: RuntimeError) -> None:
        self.all.append(failure)
        self.told.set()


class Clock:
    """The time that a watch sees; it passes when a test says so, and then the watch looks."""

    def __init__(self) -> None:
        self.now, self.looks = 100.0, 0

    def monotonic(self) -> float:
        return self.now

    def note_look(self) -> None:
        self.looks += 1

    def advance(self, seconds: float) -> None:
        self.now += seconds
        seen = self.looks
        wait_until(lambda: self.looks >= seen + 2, "the watch has looked since", 20.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("collectives.watchdog.time", clock)
    return clock


def test_the_operation_that_stands_still_is_named(clock: Clock) -> None:
    failures = Failures()
    watch = Watchdog(0.3, failures.note, clock.note_look)
    watch.add("all_gather", Event(done=True))
    watch.add("reduce_scatter", Event())
    watch.add("all_gather", Event())
    clock.advance(0.0)
    clock.advance(0.29)
    assert not failures.all
    clock.now += 0.02
    assert failures.told.wait(20)
    time.sleep(0.2)
    assert len(failures.all) == 1
    assert isinstance(failures.all[0], CollectiveTimeout)
    assert "reduce_scatter: the device did not get past it within 0.3 s" in str(failures.all)
    watch.close()


def test_a_host_far_ahead_of_its_device_is_no_stall(clock: Clock) -> None:
    """Every operation ends within the timeout after the one before, all of them much later."""
    failures = Failures()
    watch = Watchdog(0.6, failures.note, clock.note_look)
    events = [Event() for _ in range(6)]
    for event in events:
        watch.add("all_gather", event)
    for event in events:
        clock.advance(0.5)
        event.done = True
        clock.advance(0.0)
    clock.advance(5.0)
    assert not failures.all
    watch.close()


def test_an_idle_device_is_no_stall(clock: Clock) -> None:
    failures = Failures()
    watch = Watchdog(0.2, failures.note, clock.note_look)
    clock.advance(5.0)
    assert not failures.all
    watch.add("all_gather", Event())  # counts from here
    clock.advance(0.19)
    assert not failures.all
    watch.close()
    clock.now += 5.0
    assert not failures.told.wait(0.2)


def test_a_device_that_has_failed_is_reported_at_once() -> None:
    failures = Failures()
    Watchdog(60.0, failures.note).add("all_gather", Event(error="illegal address"))
    assert failures.told.wait(20)
    assert isinstance(failures.all[0], CollectiveAborted)
    assert "illegal address" in str(failures.all[0])


def test_drain_waits_for_the_device_and_no_longer() -> None:
    watch, event = Watchdog(60.0, Failures().note), Event()
    watch.add("all_gather", event)
    start = time.monotonic()
    watch.drain(0.3)
    assert time.monotonic() - start >= 0.3
    threading.Timer(0.2, lambda: setattr(event, "done", True)).start()
    watch.drain(30.0)
    assert time.monotonic() - start < 10
    watch.add("all_gather", Event())
    threading.Timer(0.2, watch.close).start()
    watch.drain(30.0)
    assert time.monotonic() - start < 10

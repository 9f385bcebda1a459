"""The watch over a device, with events that are only pretended."""

from __future__ import annotations

import threading
import time

from collectives.watchdog import Watchdog
from dp_runtime.errors import CollectiveAborted, CollectiveTimeout


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


def test_the_operation_that_stands_still_is_named() -> None:
    failures, start = Failures(), time.monotonic()
    watch = Watchdog(0.3, failures.note)
    watch.add("all_gather", Event(done=True))
    watch.add("reduce_scatter", Event())
    watch.add("all_gather", Event())
    assert failures.told.wait(5)
    assert time.monotonic() - start > 0.3
    time.sleep(0.2)
    assert len(failures.all) == 1
    assert isinstance(failures.all[0], CollectiveTimeout)
    assert "reduce_scatter: the device did not get past it within 0.3 s" in str(failures.all)
    watch.close()


def test_a_host_far_ahead_of_its_device_is_no_stall() -> None:
    """Every operation ends within the timeout after the one before, all of them much later."""
    failures = Failures()
    watch = Watchdog(0.6, failures.note)
    events = [Event() for _ in range(6)]
    for event in events:
        watch.add("all_gather", event)
    for event in events:
        time.sleep(0.25)
        event.done = True
    assert not failures.told.wait(0.8)
    watch.close()


def test_an_idle_device_is_no_stall() -> None:
    failures = Failures()
    watch = Watchdog(0.2, failures.note)
    assert not failures.told.wait(0.5)
    watch.add("all_gather", Event())  # counts from here
    assert not failures.told.wait(0.1)
    watch.close()
    assert not failures.told.wait(0.4)


def test_a_device_that_has_failed_is_reported_at_once() -> None:
    failures = Failures()
    Watchdog(60.0, failures.note).add("all_gather", Event(error="illegal address"))
    assert failures.told.wait(5)
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

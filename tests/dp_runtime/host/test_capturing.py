"""Whose turn it is: a thread's that captures a graph, or another's that waits for the device."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from dp_runtime.host.capturing import capturing, not_capturing
from dp_runtime.runner.graphs.cuda_graph import GraphMemory, capture_graph

LONG_S = 20.0


def waits_for_turn(events: list[str]) -> threading.Thread:
    def wait() -> None:
        with not_capturing(LONG_S):
            events.append("the device is waited for")

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_the_device_is_waited_for_once_a_capture_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    threads: list[threading.Thread] = []

    class Graph:
        def capture_begin(self, **kwargs: Any) -> None: ...

        def capture_end(self) -> None:
            events.append("captured")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())

    def run() -> None:
        events.append("run")
        if events.count("run") == 2:  # the first is the warm-up
            threads.append(waits_for_turn(events))
            threads[0].join(0.2)

    capture_graph(run, GraphMemory(None, None))
    threads[0].join(LONG_S)
    assert events == ["run", "run", "captured", "the device is waited for"]


def test_a_wait_for_a_capture_is_bounded() -> None:
    done: list[bool] = []

    def wait() -> None:
        with not_capturing(0.05):
            done.append(True)

    with capturing():
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(LONG_S)
    assert done == [True]


def test_a_capture_that_aborts_its_own_rank_does_not_wait_for_itself() -> None:
    with capturing(), not_capturing(0.0):
        pass
    events: list[str] = []
    waits_for_turn(events).join(LONG_S)
    assert events, "the turn is free again"

"""What must hold of a server that was asked for bad things."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any

import httpx
import psutil

from tests.dp_runtime.server.served import WAIT_S, Served

LOGGERS = ("dp_runtime", "workers", "collectives", "uvicorn.error", "asyncio")
GOOD: dict[str, Any] = {"prompt": "A class", "max_tokens": 4, "temperature": 0}


@contextmanager
def unharmed(served: Served) -> Iterator[None]:
    """Assert that others were served meanwhile, and that nothing is logged and left of it."""
    expected = served.post("/v1/completions", **GOOD).json()["choices"]
    served.post("/tokenize", prompt="a")
    served.post("/v1/completions", **GOOD, response_format={"type": "json_object"})
    with nothing_logged():
        before = held(served)
        with bystander(served, expected):
            yield
        served.check_idle()
        soon(lambda: all(now <= then for now, then in zip(held(served), before)), served, before)


def held(served: Served) -> tuple[int, ...]:
    """Connections, tasks, open files and threads, but for those of pools, which stay."""
    server = served.listener._server.server_state
    pools = ("requests", "asyncio", "uvloop")
    threads = [each for each in threading.enumerate() if not each.name.startswith(pools)]
    tasks = asyncio.all_tasks(served.listener._loop)
    return len(server.connections), len(tasks), psutil.Process().num_fds(), len(threads)


def soon(holds: Callable[[], bool], served: Served, before: object = None) -> None:
    deadline = monotonic() + WAIT_S
    while not holds():
        assert monotonic() < deadline, f"{held(served)}, before: {before}, {threading.enumerate()}"
        sleep(0.01)


@contextmanager
def bystander(served: Served, expected: Any) -> Iterator[None]:
    """Someone who asks for good things all the while, and gets them."""
    done, seen = threading.Event(), []

    def ask() -> None:
        with httpx.Client(base_url=served.url, timeout=WAIT_S) as client:
            while not done.wait(0.05):
                answer = client.post("/v1/completions", json=GOOD)
                seen.append((answer.status_code, answer.json().get("choices")))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(WAIT_S)
    assert seen
    assert {status for status, _ in seen} == {200}
    assert all(choices == expected for _, choices in seen if not aborted(choices))


def aborted(choices: Any) -> bool:  # as by {"abort_all": true} of somebody else
    return bool(choices[0]["finish_reason"] == "abort")


@contextmanager
def nothing_logged() -> Iterator[None]:
    with logged() as records:
        yield
    assert [record.getMessage() for record in records] == []


@contextmanager
def logged() -> Iterator[list[logging.LogRecord]]:
    """Warnings and worse, of the runtime and of the libraries beneath the server."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign, assignment]
    for name in LOGGERS:
        logging.getLogger(name).addHandler(handler)
    try:
        yield records
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(handler)

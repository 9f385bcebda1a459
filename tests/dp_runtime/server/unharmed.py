"""What must hold of a server that was asked for bad things."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from time import monotonic, sleep
from typing import Any

import httpx
import psutil

from tests.dp_runtime.server.served import WAIT_S, Served
from tests.serving import bystander

LOGGERS = ("dp_runtime", "workers", "collectives", "uvicorn.error", "asyncio")
GOOD: dict[str, Any] = {"prompt": "A class", "max_tokens": 4, "temperature": 0}


@contextmanager
def unharmed(served: Served) -> Iterator[None]:
    """Assert that others were served meanwhile, and that nothing is logged and left of it."""
    served.post("/v1/completions", **GOOD)
    served.post("/tokenize", prompt="a")
    served.post("/v1/completions", **GOOD, response_format={"type": "json_object"})
    with nothing_logged():
        before = held(served)
        with served.client() as client, bystander(partial(good_answer, client)):
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


def good_answer(client: httpx.Client) -> list[Any] | None:
    """Ask for a good thing; None if somebody's {"abort_all": true} has ended it."""
    answer = client.post("/v1/completions", json=GOOD).raise_for_status()
    choices: list[Any] = answer.json()["choices"]
    return None if choices[0]["finish_reason"] == "abort" else choices


@contextmanager
def nothing_logged() -> Iterator[None]:
    with logged() as records:
        yield
    assert [f"{each.threadName}: {each.getMessage()}" for each in records] == []


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

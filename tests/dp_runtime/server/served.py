"""A server of the tiny model whose ranks are threads, for the tests of a module to share."""

from __future__ import annotations

import asyncio
import json
import threading
from base64 import b64decode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from time import monotonic, sleep
from typing import Any

import httpx
import numpy as np

from dp_runtime import AsyncEngine, EngineConfig, RequestOutput, SamplingParams
from dp_runtime.cli.model_choice import TINY_MODEL
from dp_runtime.core.request import Prompt, RoutedExperts
from dp_runtime.server.config import ServerConfig
from dp_runtime.server.http.listener import Listener
from dp_runtime.server.state import ServerState
from tests.serving import check_pages_free

WAIT_S = 60.0
MODEL = "tiny_model"


@dataclass(frozen=True, eq=False)
class Served:
    url: str
    state: ServerState
    engine: AsyncEngine
    listener: Listener

    def client(self, **how: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=WAIT_S, **how)

    def post(self, path: str, **body: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body)

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        """What the Python API says."""
        return asyncio.run(self.engine.generate(prompts, params))

    def check_idle(self) -> None:
        """Assert that soon no job, request or page is left."""
        deadline = monotonic() + WAIT_S
        while len(self.state.jobs) or self.engine.num_unfinished:
            assert monotonic() < deadline, "requests are still unfinished"
            sleep(0.01)
        check_pages_free(self.engine)


def experts_of(served: Served, path: str, stream: bool, **body: Any) -> list[RoutedExperts]:
    """The experts of every choice that has some, in order."""
    answer = served.post(path, **{"return_routed_experts": True, "stream": stream} | body)
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.strip()]
    found: dict[int, RoutedExperts] = {}
    for chunk in [json.loads(line) for line in lines if line != "[DONE]"]:
        for choice in chunk["choices"]:
            if "routed_experts" in choice:
                assert choice["finish_reason"] is not None
                assert choice["index"] not in found
                found[choice["index"]] = np.load(BytesIO(b64decode(choice["routed_experts"])))
    return [found[index] for index in sorted(found)]


@contextmanager
def serving(server: dict[str, Any] | None = None, **engine: Any) -> Iterator[Served]:
    fields: dict[str, Any] = {"dp_size": 2, "launcher": "thread", "num_pages": 800} | engine
    config = EngineConfig(fields.pop("model", str(TINY_MODEL)), **fields)
    state = ServerState(ServerConfig(port=0, **(server or {})), config)
    listener = Listener(state)
    try:
        running = AsyncEngine(config)
        state.serve(running)
        try:
            yield Served(listener.url, state, running, listener)
        finally:
            running.close_now()
            state.let_go()
    finally:
        listener.close(threading.Event())

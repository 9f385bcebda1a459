"""An engine that is served over HTTP too, and the way to ask it so."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dp_runtime import AsyncEngine, EngineConfig
from dp_runtime.server.config import ServerConfig
from dp_runtime.server.http.listener import Listener
from dp_runtime.server.state import ServerState
from examples.benchmarks.harness.api_load import Way
from examples.benchmarks.harness.http_load import run_client


@contextmanager
def serving(config: EngineConfig, show_progress: bool = False) -> Iterator[tuple[AsyncEngine, str]]:
    """Serve as `launch.py serve` does; this process may use the engine too."""
    state = ServerState(ServerConfig(port=0), config)
    listener = Listener(state)
    try:
        engine = AsyncEngine(config, show_progress)
        try:
            gc.collect()
            gc.freeze()
            state.serve(engine)
            yield engine, listener.url
        finally:
            engine.close_now()
            state.let_go()
    finally:
        listener.close(threading.Event())


def through_http(url: str, stream: bool, at_most: int, timeout_s: float) -> Way:
    return lambda load: run_client(url, load, stream, at_most, timeout_s)

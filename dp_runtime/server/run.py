"""Serving from start to stop: signals, the engine's start beside a listening server, the drain."""

from __future__ import annotations

import gc
import logging
import resource
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType

from dp_runtime.config import EngineConfig
from dp_runtime.engine.async_engine import AsyncEngine
from dp_runtime.server.config import LOOPBACK, ServerConfig
from dp_runtime.server.listener import Listener
from dp_runtime.server.ports import Port, by_process, listening_ports
from dp_runtime.server.state import ServerState

logger = logging.getLogger(__name__)

STOPPING = (signal.SIGINT, signal.SIGTERM)
LOOK_EVERY_S = 0.5
FILES_BESIDE = 1024  # open files of a server that are no connections, and more


class Signals:
    """SIGTERM and Ctrl-C: while the engine starts they end the start, later they are counted."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.hurry = threading.Event()  # the second one
        self._starting = True

    def listen(self) -> None:
        for number in STOPPING:
            signal.signal(number, self._take)

    def started(self) -> None:
        """Take the signals again: Ray, where it starts the ranks, takes SIGTERM for itself."""
        self._starting = False
        self.listen()

    def _take(self, number: int, frame: FrameType | None) -> None:
        (self.hurry if self.stop.is_set() else self.stop).set()
        if self._starting:
            raise KeyboardInterrupt


def serve(
    engine_config: EngineConfig,
    config: ServerConfig,
    on_drained: Callable[[AsyncEngine], None] = lambda engine: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; KeyboardInterrupt if that came before the engine was ready.

    `on_drained` is called before the engine closes.
    """
    _allow_files(config.max_connections + FILES_BESIDE)
    signals = Signals()
    signals.listen()
    state = ServerState(config, engine_config)
    listener = Listener(state)
    _announce(listener, config)
    try:
        engine = AsyncEngine(engine_config, show_progress=True)
        signals.started()
        try:
            gc.collect()
            gc.freeze()  # what has started stays: walking over it would hold up all streams
            state.serve(engine)
            _say_ready(state, engine_config.dp_size)
            while not signals.stop.wait(LOOK_EVERY_S):
                if listener.failed:
                    raise RuntimeError("the thread that serves HTTP has ended")
            listener.drain(signals.hurry)
            on_drained(engine)
        finally:
            engine.close_now()
            state.let_go()
    finally:
        listener.close(signals.hurry)


def _allow_files(count: int) -> None:
    """Raise this process's limit of open files, for each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < count:
        fits = max(allowed - FILES_BESIDE, 1)
        logger.warning("%d open files are allowed (ulimit -Hn): set --max-connections %d",
                       allowed, fits)  # fmt: skip


def _say_ready(state: ServerState, dp_size: int) -> None:
    if state.sampling_defaults:
        values = ", ".join(f"{name} {value}" for name, value in state.sampling_defaults.items())
        print(f"requests that leave it out get {values}: generation_config.json says so")
    _tell_ports(listening_ports())
    print(f"ready: {state.model_name} on {dp_size} ranks", flush=True)


def _tell_ports(ports: Sequence[Port]) -> None:
    print(f"all ports, by process: {by_process(ports)}")
    if opened := [port for port in ports if not port.is_local]:
        logger.warning("reached from other hosts: %s; docs/security.md", by_process(opened))


def _announce(listener: Listener, config: ServerConfig) -> None:
    key = "clients bring an API key" if config.api_key else "no API key is asked for"
    print(f"listening on {listener.url}: HTTP, {key}", flush=True)
    if config.host not in (LOOPBACK, "localhost", "::1") and config.api_key is None:
        logger.warning("whoever reaches %s may use this server: set --api-key", listener.url)

"""Serving from start to stop: signals, the engine's start beside a listening server, the drain."""

from __future__ import annotations

import gc
import logging
import resource
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from types import FrameType
from typing import TYPE_CHECKING

from dp_runtime.config import EngineConfig
from dp_runtime.engine.async_engine import AsyncEngine
from dp_runtime.errors import Terminated, require
from dp_runtime.server.config import LOOPBACK, ServerConfig
from dp_runtime.server.http.listener import Listener
from dp_runtime.server.http.ports import Port, by_process, listening_ports
from dp_runtime.server.state import ServerState

if TYPE_CHECKING:
    from dp_runtime.server.kv_publisher import KvEventPublisher

logger = logging.getLogger(__name__)

STOPPING = (signal.SIGINT, signal.SIGTERM)
CHECK_EVERY_S = 0.5
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
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def serve(
    engine_config: EngineConfig,
    config: ServerConfig,
    on_drained: Callable[[AsyncEngine], None] = lambda engine: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; before the engine is ready, Terminated or KeyboardInterrupt.

    `on_drained` is called before the engine closes.
    """
    _allow_files(config.max_connections + FILES_BESIDE)
    signals = Signals()
    signals.listen()
    state = ServerState(config, engine_config)
    publisher = _publisher(config)
    if publisher is not None:
        engine_config = replace(engine_config, kv_events=True)
    listener = Listener(state)
    _announce(listener, config)
    try:
        engine = _started(engine_config)
        signals.started()
        try:
            gc.collect()
            gc.freeze()  # what has started stays: walking over it would hold up all streams
            state.serve(engine)
            if publisher is not None:
                publisher.start(engine.kv_events_now)
            _say_ready(state, listener, engine_config.dp_size)
            while not signals.stop.wait(CHECK_EVERY_S):
                if listener.failed:
                    raise RuntimeError("the thread that serves HTTP has ended")
            listener.drain(signals.hurry)
            on_drained(engine)
        finally:
            engine.close_now()
            state.let_go()
    finally:
        listener.close(signals.hurry)
        if publisher is not None:
            publisher.close()


def _publisher(config: ServerConfig) -> KvEventPublisher | None:
    """Bind where KV events are published, if anywhere, before the engine takes its time."""
    if config.kv_events_endpoint is None:
        return None
    missing = [name for name in ("zmq", "msgpack") if find_spec(name) is None]
    extra = "None without the extra 'kv-events': pip install 'dp-runtime[kv-events]'"
    require(not missing, "kv_events_endpoint", config.kv_events_endpoint, extra)
    from dp_runtime.server.kv_publisher import KvEventPublisher

    return KvEventPublisher(config)


def _started(config: EngineConfig) -> AsyncEngine:
    try:
        return AsyncEngine(config, show_progress=True)
    except SystemExit as end:  # as SIGTERM unwinds a program where Ray has taken it
        if end.code == signal.SIGTERM:
            raise Terminated from None
        raise


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


def _say_ready(state: ServerState, listener: Listener, dp_size: int) -> None:
    """Print what was chosen: what a user would ask for first where an answer surprises."""
    ports = listening_ports()
    print(*start_report(state, listener.url, ports), sep="\n")
    if opened := [port for port in ports if not port.is_local]:
        logger.warning("reached from other hosts: %s; docs/security.md", by_process(opened))
    print(f"ready: {state.model_name} on {dp_size} ranks", flush=True)


def start_report(state: ServerState, url: str, ports: Sequence[Port]) -> list[str]:
    """One line for each kind of choice."""
    engine, config = state.engine, state.config
    defaults = ", ".join(f"{name} {value}" for name, value in state.sampling_defaults.items())
    chats = "none: the model's directory has no tokenizer.json"
    if engine.tokenizer is not None:
        chats = state.chats.description
    lines = {
        "HTTP": f"{url}, {_key(config)}",
        "all ports, by process": by_process(ports),
        "ranks": f"{engine.config.dp_size} ({engine.config.launcher}), "
        f"{engine.config.standby_ranks} standbys; /admin/ {_admin(config)}",
        "model": f"{engine.config.model}, prompt and answer of {engine.model.max_model_len} tokens",
        "chats": chats,
        "sampling": f"who leaves it out gets {defaults or 'the defaults of docs/settings.md'}",
        "limits": f"{engine.config.max_queued_requests} unfinished requests, "
        f"{config.max_in_flight} in flight, {config.max_connections} connections, "
        f"{config.max_body_bytes} bytes of a body",
    }
    return [f"{name}: {value}" for name, value in lines.items()]


def _key(config: ServerConfig) -> str:
    return "clients bring an API key" if config.api_key else "no API key is asked for"


def _admin(config: ServerConfig) -> str:
    return "wants the admin key" if config.admin_key else "is closed: there is no admin key"


def _announce(listener: Listener, config: ServerConfig) -> None:
    print(f"listening on {listener.url}: HTTP, {_key(config)}", flush=True)
    if config.host not in (LOOPBACK, "localhost", "::1") and config.api_key is None:
        logger.warning("whoever reaches %s may use this server: set --api-key", listener.url)

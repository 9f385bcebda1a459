"""Listener: the HTTP server in a thread of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
from time import monotonic

import uvicorn
import uvloop

from dp_runtime.errors import StartError
from dp_runtime.server.app import make_app
from dp_runtime.server.config import ServerConfig
from dp_runtime.server.http.connection import connection_class
from dp_runtime.server.state import ServerState

BACKLOG = 4096
HURRY_EVERY_S = 0.05
MAX_HEAD_BYTES = 1 << 16  # in however many pieces it comes; one that comes whole may have more
END_S = 5.0  # for clients to take the last of what they were sent


class Listener:
    """Listens from its making on; StartError if the address can not be had."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._socket = _listening(state.config)
        config = uvicorn.Config(
            make_app(state), http=connection_class(state.config), ws="none", lifespan="off",
            log_config=None, log_level="error", access_log=False, server_header=False,
            backlog=BACKLOG, timeout_keep_alive=state.config.keep_alive_s,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def failed(self) -> bool:
        return not self._thread.is_alive()

    def drain(self, hurry: threading.Event) -> None:
        """Refuse new requests, and wait for the running ones as long as the config allows."""
        self._state.draining = True
        deadline = monotonic() + self._state.config.drain_timeout_s
        while len(self._state.jobs) and monotonic() < deadline and not self.failed:
            if hurry.wait(HURRY_EVERY_S):
                return

    def close(self, hurry: threading.Event) -> None:
        """Stop listening; connections that are still busy after END_S are cut off."""
        self._server.should_exit = True
        deadline = monotonic() + END_S
        while not self.failed and monotonic() < deadline and not hurry.is_set():
            self._thread.join(HURRY_EVERY_S)
        if not self.failed:
            self._loop.call_soon_threadsafe(self._cut_off)
            self._thread.join(END_S)
        self._socket.close()

    def _cut_off(self) -> None:
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._server.serve([self._socket]))


def _listening(config: ServerConfig) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, proto)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # The kernel hangs up on a client that takes nothing, whoever waits for it or not;
            # connections have this option from the socket that accepts them.
            milliseconds = round(config.write_timeout_s * 1000)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
            listening.bind(address)
            listening.listen(BACKLOG)
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        where = f"{config.host} port {config.port}"
        raise StartError(f"can not listen on {where}: {error}") from None
    return listening

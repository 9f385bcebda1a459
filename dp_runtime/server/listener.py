"""Listener: the HTTP server in a thread of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
from time import monotonic

import uvicorn

from dp_runtime.errors import StartError
from dp_runtime.server.app import make_app
from dp_runtime.server.state import ServerState

BACKLOG = 4096
LOOK_EVERY_S = 0.05
KEEP_ALIVE_S = 65
END_S = 5.0


class Listener:
    """Listens from its making on; StartError if the address can not be had."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._socket = _bound(state.config.host, state.config.port)
        config = uvicorn.Config(
            make_app(state), log_config=None, access_log=False, lifespan="off", backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S, ws="none",
        )  # fmt: skip
        self._server = uvicorn.Server(config)
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
            if hurry.wait(LOOK_EVERY_S):
                return

    def close(self) -> None:
        """Stop listening; what is still running is cut off."""
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(END_S)
        self._socket.close()

    def _run(self) -> None:
        asyncio.run(self._server.serve([self._socket]))


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, proto)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise StartError(f"can not listen on {host} port {port}: {error}") from None
    return bound

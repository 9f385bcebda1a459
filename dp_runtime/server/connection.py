"""One client's connection: uvicorn's HTTP/1.1, with bounds where uvicorn has none."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dp_runtime.server.answers import as_json
from dp_runtime.server.config import ServerConfig
from dp_runtime.server.errors import ApiError


def connection_class(config: ServerConfig) -> type[H11Protocol]:
    """Make the class of a server's connections, which bring nothing but requests with a head."""
    too_many = ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        f"{config.max_connections} connections are open (max_connections)",
    )

    class Connection(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > config.max_connections:
                transport.write(_response(too_many))
                transport.close()
            self._wait_for_head()

        def data_received(self, data: bytes) -> None:
            # NOTE: the timer runs until a head is complete; uvicorn's ends with any byte, also of
            # a body that nobody reads.
            self.conn.receive_data(data)
            self.handle_events()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unset_keepalive_if_required()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            """Answer what is no HTTP, unless an answer is under way, and hang up."""
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.write(_response(ApiError(HTTPStatus.BAD_REQUEST, msg)))
            self.transport.close()

        def _wait_for_head(self) -> None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    return Connection


def _response(error: ApiError) -> bytes:
    body = as_json(error.body)
    fields = error.headers | {
        "Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close",
    }  # fmt: skip
    lines = [f"{name}: {value}\r\n" for name, value in fields.items()]
    head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n{''.join(lines)}\r\n"
    return head.encode() + body

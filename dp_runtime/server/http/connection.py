"""One client's connection: uvicorn's HTTP/1.1, with bounds where uvicorn has none."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dp_runtime.server.answers import as_json
from dp_runtime.server.config import ServerConfig
from dp_runtime.server.errors import ApiError


class IdleConnections:
    """Those that wait for the head of a request, by the address of their clients."""

    def __init__(self) -> None:
        self._by_address: dict[str, dict[H11Protocol, None]] = {}  # in order of their last answers

    def add(self, connection: H11Protocol) -> None:
        self._by_address.setdefault(_address(connection), {})[connection] = None

    def discard(self, connection: H11Protocol) -> None:
        of_address = self._by_address.get(_address(connection), {})
        of_address.pop(connection, None)
        if not of_address:
            self._by_address.pop(_address(connection), None)

    def take_oldest(self) -> H11Protocol | None:
        """Take out the oldest of the address that has most, which is nobody's loss but its own."""
        if not self._by_address:
            return None
        most = max(self._by_address, key=lambda address: len(self._by_address[address]))
        oldest = next(iter(self._by_address[most]))
        self.discard(oldest)
        return oldest


def connection_class(config: ServerConfig) -> type[Connection]:
    """Make the class of a server's connections."""

    class OfServer(Connection):
        limits, idle = config, IdleConnections()

    return OfServer


class Connection(H11Protocol):
    """A connection that brings nothing but requests with a head."""

    limits: ServerConfig  # of its server, as is `idle`
    idle: IdleConnections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            oldest = self.idle.take_oldest()
            if oldest is None:
                transport.write(_response(self._too_many))
                transport.close()
                return
            oldest.transport.abort()  # what nobody reads would keep it open
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        # NOTE: the timer runs until a head is complete; uvicorn's ends with any byte, also of
        # a body that nobody reads.
        if self.timeout_keep_alive_task is not None and not self._head_begun:
            self._wait_for_head()
        self.conn.receive_data(data)
        self.handle_events()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._head_begun = False
        super().on_response_complete()  # which begins to wait, and then may read a next head
        if self.timeout_keep_alive_task is not None:
            self.idle.add(self)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, unless an answer is under way, and hang up."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_response(ApiError(HTTPStatus.BAD_REQUEST, msg)))
        self.transport.close()

    @property
    def _too_many(self) -> ApiError:
        limit = self.limits.max_connections
        message = f"{limit} connections are busy (max_connections)"
        return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, message)

    def _wait_for_head(self) -> None:
        self._unset_keepalive_if_required()
        self._head_begun = True
        self.timeout_keep_alive_task = self.loop.call_later(
            self.limits.head_timeout_s, self.timeout_keep_alive_handler
        )
        self.idle.add(self)

    def _unset_keepalive_if_required(self) -> None:
        super()._unset_keepalive_if_required()
        self.idle.discard(self)


def _address(connection: H11Protocol) -> str:
    return connection.client[0] if connection.client else ""


def _response(error: ApiError) -> bytes:
    body = as_json(error.body)
    fields = error.headers | {
        "Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close",
    }  # fmt: skip
    lines = [f"{name}: {value}\r\n" for name, value in fields.items()]
    head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n{''.join(lines)}\r\n"
    return head.encode() + body

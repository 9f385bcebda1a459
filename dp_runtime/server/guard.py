"""Guard: what every request meets before an endpoint, and bounds on what it may take."""

from __future__ import annotations

import asyncio
import hmac
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dp_runtime.server.config import ServerConfig
from dp_runtime.server.errors import ApiError

OPEN_PATHS = frozenset({"/health", "/metrics"})  # for probes and scrapers, which bring no key


class Guard:
    """ASGI middleware: the key, the number of requests in flight, and the size of their bodies."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app, self._config = app, config
        self._num_in_flight = 0
        self._key = None if config.api_key is None else f"Bearer {config.api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            self._check_key(Headers(scope=scope))
            self._check_place()
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        self._num_in_flight += 1
        try:
            await self._serve(scope, receive, send)
        finally:
            self._num_in_flight -= 1

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await self._body(Headers(scope=scope), receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is not None:  # else the client has gone
            await self._app(scope, _Replayed(body, receive), send)

    def _check_key(self, headers: Headers) -> None:
        given = headers.get("authorization", "").encode()
        if self._key is not None and not hmac.compare_digest(given, self._key):
            message = "the request brings no API key that this server has"
            raise ApiError(HTTPStatus.UNAUTHORIZED, message, None, "invalid_api_key")

    def _check_place(self) -> None:
        limit = self._config.max_in_flight
        if self._num_in_flight >= limit:
            message = f"{limit} requests are in flight (max_in_flight)"
            raise ApiError(HTTPStatus.TOO_MANY_REQUESTS, message, None, "too_many_requests")

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        limit = self._config.max_body_bytes
        announced = headers.get("content-length", "0")
        too_large = ApiError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body has more than {limit} bytes", None
        )
        if announced.isdecimal() and int(announced) > limit:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._config.read_timeout_s):
                while (message := await receive())["type"] == "http.request":
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            seconds = self._config.read_timeout_s
            late = f"the body did not come within {seconds:g} s"
            raise ApiError(HTTPStatus.REQUEST_TIMEOUT, late) from None
        return None


class _Replayed:
    """Hands out a body that was read already, and then what comes after it."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._message: Message | None = {"type": "http.request", "body": body, "more_body": False}
        self._receive = receive

    async def __call__(self) -> Message:
        message, self._message = self._message, None
        return message if message is not None else await self._receive()

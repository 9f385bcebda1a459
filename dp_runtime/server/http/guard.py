"""Guard: what every request meets before an endpoint, and bounds on what it may take."""

from __future__ import annotations

import asyncio
import hmac
import os
from hashlib import sha256
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dp_runtime.server.errors import ApiError, as_api_error
from dp_runtime.server.state import ServerState

OPEN_PATHS = frozenset(
    {"/health", "/ready", "/metrics"}
)  # for probes and scrapers, which bring no key
GENERATING_PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})
ADMIN_PATHS = "/admin/"
NO_ADMIN = "this server takes no admin calls: it was started without an admin_key"
SMUGGLED = {b"content-length", b"transfer-encoding"}
TOO_LARGE = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
TOO_MANY = HTTPStatus.TOO_MANY_REQUESTS


class Guard:
    """ASGI middleware: the key, places for requests and their bodies, and faults of our own."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app, self._state, self._config = app, state, state.config
        self._num_in_flight = 0
        self._num_bytes = 0  # of the bodies of those in flight
        self._key, self._admin_key = _digest(state.config.api_key), _digest(state.config.admin_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        try:
            if headers.keys() >= SMUGGLED:
                raise ApiError(HTTPStatus.BAD_REQUEST, "the body's length is told in two ways")
            if scope["path"] in OPEN_PATHS:
                await self._app(scope, receive, send)
            else:
                await self._serve(headers, scope, receive, send)
        except Exception as error:
            response = as_api_error(error).response()
            if headers.keys() >= SMUGGLED:  # a proxy may see another request in what follows
                response.headers["connection"] = "close"
            await response(scope, receive, send)

    async def _serve(
        self, headers: dict[bytes, bytes], scope: Scope, receive: Receive, send: Send
    ) -> None:
        if scope["path"].startswith(ADMIN_PATHS):
            if self._admin_key is None:
                raise ApiError(HTTPStatus.FORBIDDEN, NO_ADMIN, None, "admin_disabled")
            self._check_key(headers.get(b"authorization", b""), self._admin_key)
        else:
            self._check_key(headers.get(b"authorization", b""), self._key)
        if scope["path"] in GENERATING_PATHS:
            self._state.check_place()
        num_bytes = self._place(headers.get(b"content-length"))
        self._num_in_flight += 1
        self._num_bytes += num_bytes
        try:
            if (body := await self._body(receive)) is None:
                return  # the client has gone
            self._num_bytes += len(body) - num_bytes
            num_bytes = len(body)
            self._check_values(body)
            await self._app(scope, _Replayed(body, receive), send)
        finally:
            self._num_in_flight -= 1
            self._num_bytes -= num_bytes

    def _check_key(self, given: bytes, wanted: bytes | None) -> None:
        scheme, _, key = given.partition(b" ")
        ok = scheme.lower() == b"bearer"
        if wanted and not (hmac.compare_digest(sha256(key).digest(), wanted) and ok):
            message = "the request brings no API key that this server has"
            raise ApiError(HTTPStatus.UNAUTHORIZED, message, None, "invalid_api_key")

    def _place(self, announced: bytes | None) -> int:
        """Return the bytes that the body of one more request may have."""
        limit, most = self._config.max_in_flight, self._config.max_bytes_in_flight
        num_bytes = self._config.max_body_bytes if announced is None else int(announced)
        if num_bytes > self._config.max_body_bytes:
            raise self._too_large
        if self._num_in_flight >= limit:
            message = f"{limit} requests are in flight (max_in_flight)"
            raise ApiError(TOO_MANY, message, None, "too_many_requests")
        if self._num_bytes + num_bytes > most:
            message = f"requests of {most} bytes are in flight (max_bytes_in_flight)"
            raise ApiError(TOO_MANY, message, None, "too_many_requests")
        return num_bytes

    async def _body(self, receive: Receive) -> bytes | None:
        parts, size, seconds = [], 0, self._config.read_timeout_s
        try:
            async with asyncio.timeout(seconds):
                while (message := await receive())["type"] == "http.request":
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._config.max_body_bytes:
                        raise self._too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            late = f"the body did not come within {seconds:g} s (read_timeout_s)"
            raise ApiError(HTTPStatus.REQUEST_TIMEOUT, late) from None
        return None

    @property
    def _too_large(self) -> ApiError:
        limit = self._config.max_body_bytes
        return ApiError(TOO_LARGE, f"the body has more than {limit} bytes (max_body_bytes)")

    def _check_values(self, body: bytes) -> None:
        limit = self._config.max_body_values
        if sum(map(body.count, (b",", b"[", b"{"))) > limit:
            message = f"the body has more than {limit} commas and brackets (max_body_values)"
            raise ApiError(TOO_LARGE, message)


def _digest(key: str | None) -> bytes | None:
    return None if key is None else sha256(os.fsencode(key)).digest()


class _Replayed:
    """Hands out a body that was read already, and then what comes after it."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._message: Message | None = {"type": "http.request", "body": body, "more_body": False}
        self._receive = receive

    async def __call__(self) -> Message:
        message, self._message = self._message, None
        return message if message is not None else await self._receive()

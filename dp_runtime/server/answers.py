"""Answers that end when their client goes: whole ones, and event streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi.responses import Response
from pydantic_core import PydanticSerializationError, to_json
from starlette.types import Receive, Scope, Send

from dp_runtime.server.errors import as_api_error

DONE = b"data: [DONE]\n\n"
Content = Mapping[str, Any]
MANY_ENTRIES = 100_000
ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def as_json(content: Content, num_entries: int = 0) -> bytes:
    """Encode a body; half of a surrogate pair, which no JSON text may have, becomes `?`."""
    if num_entries <= MANY_ENTRIES:  # of more, it would hold Python's lock for long
        with suppress(PydanticSerializationError):
            return to_json(content, inf_nan_mode="null")
    return "".join(ENCODER.iterencode(content)).encode(errors="replace")


@dataclass(frozen=True)
class Client:
    """Who waits for an answer: `on_end` is called however that ends."""

    on_end: Callable[[], None]


class Answer(Response):
    """A response that is worked on as it is sent, as long as the client is there."""

    def __init__(self, client: Client) -> None:
        super().__init__(media_type=self.media_type)
        del self.headers["content-length"]
        self._client = client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self.send_to(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            self._client.on_end()
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def send_to(self, send: Send) -> None:
        raise NotImplementedError


class JsonAnswer(Answer):
    """A body that takes a while to come."""

    media_type = "application/json"

    def __init__(self, body: Callable[[], Coroutine[Any, Any, bytes]], client: Client) -> None:
        super().__init__(client)
        self._body = body

    async def send_to(self, send: Send) -> None:
        status, headers = 200, self.raw_headers
        try:
            body = await self._body()
        except Exception as error:
            response = as_api_error(error).response()
            status, headers = response.status_code, response.raw_headers
            body = bytes(response.body)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class EventStream(Answer):
    """Server-sent events; an error after the first of them is an event too."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], client: Client) -> None:
        super().__init__(client)
        self.headers["cache-control"] = "no-cache"
        self._events = events

    async def send_to(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await send(_chunk(_event(event)))
        except Exception as error:
            await send(_chunk(_event(as_json(as_api_error(error).body))))
        await send(_chunk(DONE, more=False))


def _event(content: bytes) -> bytes:
    return b"data: " + content + b"\n\n"


def _chunk(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

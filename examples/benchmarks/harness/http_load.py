"""A cheap HTTP client for loads, as a process of its own.

    python -m examples.benchmarks.harness.http_load <load.json >answers.json

While the load runs it only notes which bytes came when, over kept connections; it reads them
once all have come.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from time import monotonic, process_time
from typing import Any
from urllib.parse import urlsplit

import h11

from examples.benchmarks.harness.load import Answer, LoadRequest, run_load

PATH = "/v1/completions"
CHUNKED = b"transfer-encoding: chunked"  # all answers but refusals
LAST_CHUNK = b"\r\n0\r\n\r\n"

Pieces = list[tuple[float, bytes]]
Content = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    answers: list[Answer]
    cpu_s: float = 0.0  # of a client process, while the load ran


@dataclass(eq=False)
class Response:
    """The bytes of one answer, and when they came; read only once all have come."""

    submitted: float = field(default_factory=monotonic)
    pieces: Pieces = field(default_factory=list)

    def read(self) -> tuple[int, Pieces]:
        """The status, and the pieces of the body."""
        http = h11.Connection(h11.CLIENT)
        http.send(h11.Request(method="GET", target="/", headers=[("host", "")]))
        http.send(h11.EndOfMessage())
        status, body = 0, []
        for moment, data in self.pieces:
            http.receive_data(data)
            while (event := http.next_event()) is not h11.NEED_DATA:
                match event:
                    case h11.Response():
                        status = event.status_code
                    case h11.Data():
                        body.append((moment, bytes(event.data)))
                    case h11.EndOfMessage():
                        return status, body
        raise ConnectionError("the answer has no end")


class Connection(asyncio.Protocol):
    """A kept connection, which carries one request at a time."""

    def __init__(self) -> None:
        self._response = Response()
        self._done: asyncio.Future[Response] | None = None

    async def ask(self, request: bytes) -> Response:
        """Send a request and wait until its answer has ended; ConnectionError if it does not."""
        self._done = asyncio.get_running_loop().create_future()
        self._response = Response()
        self._tail = b""
        self._transport.write(request)
        return await self._done

    @property
    def num_pieces(self) -> int:
        return len(self._response.pieces)

    def close(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), "of a TCP connection"
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        assert self._done is not None, "somebody asked"
        self._response.pieces.append((monotonic(), data))
        self._tail = (self._tail + data)[-len(LAST_CHUNK) :]
        refused = len(self._response.pieces) == 1 and CHUNKED not in data.lower()
        if (self._tail == LAST_CHUNK or refused) and not self._done.done():
            self._done.set_result(self._response)

    def connection_lost(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError(f"lost in mid-answer: {error}"))


class Client:
    """Keeps connections to one server, as many as are in use at a time."""

    def __init__(self, url: str) -> None:
        split = urlsplit(url)
        self._host, self._port = split.hostname or "", split.port or 80
        self._idle: list[Connection] = []

    def encoded(self, body: Content, path: str = PATH) -> bytes:
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: {self._host}:{self._port}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content

    async def ask(self, request: bytes) -> Response:
        connection = self._idle.pop() if self._idle else await self.connect()
        response = await connection.ask(request)
        self._idle.append(connection)
        return response

    async def connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self._host, self._port)
        return connection

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


def read_answer(response: Response, stream: bool) -> Answer:
    status, pieces = response.read()
    assert status == 200, f"status {status}: {pieces!r}"
    answer = Answer(response.submitted)
    for moment, content in events_of(pieces) if stream else [whole_of(pieces)]:
        token_ids = [each for choice in content["choices"] for each in choice["token_ids"]]
        answer.arrivals.append((moment, len(token_ids)))
        answer.token_ids.extend(token_ids)
    return answer


def whole_of(pieces: Pieces) -> tuple[float, Content]:
    return pieces[-1][0], json.loads(b"".join(data for _, data in pieces))


def events_of(pieces: Pieces) -> Iterator[tuple[float, Content]]:
    """When each event of a stream was there, and what it said."""
    text = b""
    for moment, data in pieces:
        *complete, text = (text + data).split(b"\n\n")
        for event in complete:
            if event != b"data: [DONE]":
                yield moment, json.loads(event.removeprefix(b"data: "))


def body_of(request: LoadRequest, stream: bool) -> Content:
    return {
        "prompt": request.prompt, "max_tokens": request.output_len, "temperature": 0.0,
        "ignore_eos": True, "stream": stream, "return_token_ids": True,
    }  # fmt: skip


async def ask_all(url: str, requests: list[LoadRequest], stream: bool, at_most: int) -> Outcome:
    client = Client(url)
    encoded = {id(request): client.encoded(body_of(request, stream)) for request in requests}
    responses: dict[int, Response] = {}

    async def ask(request: LoadRequest) -> Answer:
        response = responses[id(request)] = await client.ask(encoded[id(request)])
        return Answer(response.submitted)

    before = process_time()
    await run_load(requests, ask, at_most)
    cpu_s = process_time() - before
    client.close()
    return Outcome([read_answer(responses[id(each)], stream) for each in requests], cpu_s)


def run_client(
    url: str, requests: Sequence[LoadRequest], stream: bool, at_most: int, timeout_s: float
) -> Outcome:
    """Run a load in a client's process; subprocess.TimeoutExpired if it takes longer."""
    load = {
        "url": url, "requests": [asdict(each) for each in requests], "stream": stream,
        "at_most": at_most,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name], input=json.dumps(load), text=True,
        stdout=subprocess.PIPE, check=True, timeout=timeout_s,
    )  # fmt: skip
    said = json.loads(done.stdout)
    return Outcome([Answer(**each) for each in said["answers"]], said["cpu_s"])


def main() -> None:
    load = json.load(sys.stdin)
    load["requests"] = [LoadRequest(**each) for each in load["requests"]]
    json.dump(asdict(asyncio.run(ask_all(**load))), sys.stdout)


if __name__ == "__main__":
    main()

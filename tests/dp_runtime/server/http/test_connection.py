"""Bounds on connections and places; a server whose model still loads has them too."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from time import sleep
from typing import Any

import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol

from dp_runtime import EngineConfig
from dp_runtime.cli.model_choice import TINY_MODEL
from dp_runtime.errors import StartError
from dp_runtime.server.config import ServerConfig
from dp_runtime.server.http.connection import IdleConnections
from dp_runtime.server.http.listener import Listener
from dp_runtime.server.state import ServerState
from tests.dp_runtime.server.hostile import GOOD, KEEP_OPEN, ask, connected, get, post, read_reply
from tests.dp_runtime.server.unharmed import nothing_logged

ABORT = b'{"abort_all":true}'


@contextmanager
def listening(**limits: Any) -> Iterator[Listener]:
    state = ServerState(ServerConfig(**{"port": 0} | limits), EngineConfig(str(TINY_MODEL)))
    listener = Listener(state)
    try:
        with nothing_logged():
            yield listener
    finally:
        listener.close(threading.Event())


@pytest.fixture(scope="module")
def impatient() -> Iterator[Listener]:
    with listening(keep_alive_s=1, head_timeout_s=0.2, read_timeout_s=0.2) as listener:
        yield listener


def test_who_sends_no_whole_head_is_cut_off(impatient: Listener) -> None:
    sent = (
        b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: x\r\n", b"PRI * HT",
        b"GET /health HTTP/1.1\rHost: x\r\r",
    )  # fmt: skip
    with ExitStack() as stack:
        clients = [stack.enter_context(connected(impatient.url)) for _ in sent]
        for client, part in zip(clients, sent):
            client.sendall(part)
        assert [client.recv(1) for client in clients] == [b""] * len(sent)


def send_until_cut_off(client: socket.socket, part: bytes) -> None:
    while True:
        client.sendall(part)
        sleep(0.001)


def test_who_sends_a_head_bit_by_bit_is_cut_off(impatient: Listener) -> None:
    with connected(impatient.url) as client, pytest.raises(ConnectionError):
        send_until_cut_off(client, b"a")


def test_an_idle_connection_is_cut_off(impatient: Listener) -> None:
    with connected(impatient.url) as client:
        client.sendall(get(b"/health", KEEP_OPEN))
        assert read_reply(client).status == 503
        client.sendall(get(b"/health", KEEP_OPEN))  # again, on the same
        assert read_reply(client).status == 503
        assert client.recv(1) == b""


@pytest.mark.parametrize("length", [b"Content-Length: 100", b"Transfer-Encoding: chunked"])
def test_who_sends_no_whole_body_gets_408(impatient: Listener, length: bytes) -> None:
    reply = ask(impatient.url, post(b"5\r\n{", b"/v1/abort", length, length=False))
    assert reply.status == 408
    assert "read_timeout_s" in reply.error["message"]


def test_a_body_without_end_is_cut_off(impatient: Listener) -> None:
    chunked = (b"Transfer-Encoding: chunked", KEEP_OPEN)
    with connected(impatient.url) as client:
        client.sendall(post(b"", b"/v1/abort", *chunked, length=False))
        with pytest.raises(ConnectionError):
            send_until_cut_off(client, b"10000\r\n" + b" " * 0x10000 + b"\r\n")


def test_before_a_body_is_read_there_is_a_place_for_it() -> None:
    with listening(max_in_flight=1) as listener, connected(listener.url) as first:
        first.sendall(post(ABORT, b"/v1/abort", b"Expect: 100-continue")[: -len(ABORT)])
        assert first.recv(100).startswith(b"HTTP/1.1 100")  # it waits for the body
        with connected(listener.url) as second:
            second.sendall(post(ABORT, b"/v1/abort", b"Expect: 100-continue")[: -len(ABORT)])
            reply = read_reply(second)
        assert (reply.status, reply.error["code"]) == (429, "too_many_requests")
        assert b"\r\nretry-after: 1\r\n" in reply.head
        assert ask(listener.url, get(b"/health")).status == 503  # which is always told
        first.sendall(ABORT)
        assert read_reply(first).status == 200


def test_bodies_in_flight_are_bounded_together() -> None:
    with listening(max_bytes_in_flight=1000) as listener, connected(listener.url) as first:
        first.sendall(post(b"x" * 900, b"/v1/abort", b"Expect: 100-continue")[:-900])
        assert first.recv(100).startswith(b"HTTP/1.1 100")
        reply = ask(listener.url, post(b" " * 200 + ABORT, b"/v1/abort"))
        assert reply.status == 429
        assert "max_bytes_in_flight" in reply.error["message"]
        assert ask(listener.url, post(ABORT, b"/v1/abort")).status == 200
    with listening(max_bytes_in_flight=1000) as listener:
        for _ in range(3):  # they are given back
            assert ask(listener.url, post(b" " * 900 + ABORT, b"/v1/abort")).status == 200


def test_a_head_may_take_no_longer_on_a_connection_that_was_served() -> None:
    limits = {"keep_alive_s": 600, "head_timeout_s": 0.2}
    with listening(**limits) as listener, connected(listener.url) as client:
        client.sendall(get(b"/health", KEEP_OPEN))
        assert read_reply(client).status == 503
        client.sendall(b"GET /hea")
        assert client.recv(1) == b""


def begin_body(client: socket.socket) -> None:
    client.sendall(post(ABORT, b"/v1/abort", b"Expect: 100-continue", KEEP_OPEN)[: -len(ABORT)])
    assert client.recv(100).startswith(b"HTTP/1.1 100")


def test_more_connections_than_allowed_are_told_so() -> None:
    with listening(max_connections=2) as listener:
        with connected(listener.url) as first, connected(listener.url) as second:
            begin_body(first)
            begin_body(second)
            with connected(listener.url) as third:
                reply = read_reply(third)
                assert third.recv(1) == b""
        assert reply.status == 503
        assert "max_connections" in reply.error["message"]
        assert b"\r\nRetry-After: 1\r\n" in reply.head
        assert "max_connections" not in ask(listener.url, post(GOOD)).error["message"]


def test_idle_connections_give_their_places_to_others() -> None:
    """Whatever they hold: nothing, a part of a head, or an answered request."""
    limits = {"max_connections": 8, "keep_alive_s": 600, "head_timeout_s": 600}
    with listening(**limits) as listener, ExitStack() as stack:
        busy = stack.enter_context(connected(listener.url))
        begin_body(busy)
        for number in range(30):
            idle = stack.enter_context(connected(listener.url))
            idle.sendall((b"", b"GET /hea", get(b"/health", KEEP_OPEN))[number % 3])
            assert ask(listener.url, get(b"/health")).status == 503  # the model still loads
        busy.sendall(ABORT)
        assert read_reply(busy).status == 200


class At(H11Protocol):
    """A connection from an address."""

    def __init__(self, address: str) -> None:
        self.client = (address, 1)


def test_the_oldest_of_the_address_that_has_most_is_taken() -> None:
    one, many = [At("1"), At("1")], [At("2"), At("2"), At("2")]
    idle = IdleConnections()
    for connection in (*one, *many, many[0]):
        idle.add(connection)
    idle.discard(At("3"))
    assert idle.take_oldest() is many[0]
    assert idle.take_oldest() is one[0]
    assert [idle.take_oldest() for _ in range(4)] == [many[1], one[1], many[2], None]


def test_a_port_that_is_taken_is_a_start_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = rf"can not listen on 127\.0\.0\.1 port {port}: \[Errno 98\]"
        with pytest.raises(StartError, match=text), listening(port=port):
            pass


def test_while_the_model_loads_requests_are_refused_before_their_body() -> None:
    with listening() as listener, connected(listener.url) as client:
        client.sendall(post(GOOD, b"/v1/completions", b"Expect: 100-continue")[: -len(GOOD)])
        reply = read_reply(client)
        assert (reply.status, reply.error["message"]) == (503, "the model is loading")
        assert json.loads(ask(listener.url, get(b"/health")).body)["status"] == "starting"

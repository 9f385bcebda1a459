"""Hand-made requests that nobody should send: each gets its answer, and nobody else notices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from time import sleep
from typing import Any

import pytest

from tests.dp_runtime.server.hostile import (
    FIELDS,
    HEADS,
    NO_BODIES,
    SERVED,
    ask,
    connected,
    get,
    post,
    prompt,
    read_reply,
)
from tests.dp_runtime.server.served import Served, serving
from tests.dp_runtime.server.unharmed import soon, unharmed

ENDLESS = '"prompt":"a","stream":true,"ignore_eos":true,"max_tokens":1900'


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving({"write_timeout_s": 1.0}, dp_size=1) as running, unharmed(running):
        yield running


@pytest.mark.parametrize("name", NO_BODIES)
def test_what_is_no_request_is_refused(served: Served, name: str) -> None:
    reply = ask(served.url, post(NO_BODIES[name]))
    assert (reply.status, reply.error["param"]) == (400, None)


@pytest.mark.parametrize("name", FIELDS)
def test_what_a_field_must_not_be_is_refused(served: Served, name: str) -> None:
    given, param = FIELDS[name]
    reply = ask(served.url, post(prompt(given)))
    assert reply.status in (400, 404)
    assert reply.error["param"] == param


@pytest.mark.parametrize("name", SERVED)
def test_what_is_odd_but_right_is_served(served: Served, name: str) -> None:
    assert ask(served.url, SERVED[name]).status == 200


def test_a_long_head_is_served_in_whatever_pieces_it_comes(served: Served) -> None:
    request = SERVED["long query"]
    with connected(served.url) as client:
        for start in range(0, len(request), 20_000):
            client.sendall(request[start : start + 20_000])
            sleep(0.02)  # for the server to take it
        assert read_reply(client).status == 200


@pytest.mark.parametrize("name", HEADS)
def test_what_is_no_http_is_refused(served: Served, name: str) -> None:
    request, status = HEADS[name]
    reply = ask(served.url, request)
    assert reply.status == status
    assert reply.error["param"] is None


def test_a_wrong_method_is_told_the_right_one(served: Served) -> None:
    assert b"\r\nallow: POST\r\n" in ask(served.url, get(b"/v1/completions")).head


def test_no_page_of_another_site_may_read_an_answer(served: Served) -> None:
    reply = ask(served.url, get(b"/v1/models", b"Origin: http://other"))
    assert reply.status == 200
    assert b"access-control" not in reply.head.lower()


@pytest.mark.parametrize("num_read", [0, 1, 5000])
def test_clients_that_leave_in_a_stream_leave_nothing(served: Served, num_read: int) -> None:
    for _ in range(8):
        with connected(served.url) as client:
            client.sendall(post(prompt(ENDLESS, '"n":3')))
            client.recv(num_read) if num_read else None
    served.check_idle()


def test_who_reads_nothing_of_a_long_answer_is_cut_off(served: Served) -> None:
    tokenizer = served.state.needed_tokenizer
    longest = max(range(3072), key=lambda token: len(tokenizer.decode([token])))
    streams = [
        post(json.dumps({"tokens": [longest] * 250_000}).encode(), b"/detokenize"),
        post(prompt('"prompt":[5' + ",5" * 1500 + "]", '"prompt_logprobs":64,"n":3,"stream":true')),
    ]
    clients = [connected(served.url, receive_buffer=4096) for _ in streams]
    for client, request in zip(clients, streams):
        client.sendall(request)
    connections: Any = served.listener._server.server_state.connections
    soon(lambda: any(each.flow.write_paused for each in connections), served)
    soon(lambda: len(connections) <= 1, served)  # that of the bystander
    for client in clients:
        client.close()


def test_a_storm_of_aborts_ends_what_it_names(served: Served) -> None:
    clients = [connected(served.url) for _ in range(8)]
    for index, client in enumerate(clients):
        client.sendall(post(prompt(ENDLESS, f'"request_id":"storm-{index}"', '"n":4')))
        assert b"200 OK" in client.recv(100)
    names = json.dumps({"request_ids": [f"cmpl-storm-{n % 16}" for n in range(5000)]}).encode()
    aborted = [json.loads(ask(served.url, post(names, b"/v1/abort")).body) for _ in range(20)]
    assert aborted[0] == {"aborted": [f"cmpl-storm-{n}" for n in range(8)]}
    for client in clients:
        received = client.makefile("rb").read()
        assert received.count(b'"finish_reason":"abort"') == 4
        assert received.endswith(b"0\r\n\r\n")
        client.close()

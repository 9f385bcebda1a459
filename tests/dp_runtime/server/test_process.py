"""A server's life as a process: its start, its ports, its end, and what may come between."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import zmq

from tests.dp_runtime.server.launched import Launched, launched
from tests.dp_runtime.server.served import WAIT_S

LOCAL = ("--launcher", "local", "--dp-size", "2")
ENDLESS = {"prompt": "a", "max_tokens": 1900, "ignore_eos": True, "stream": True}
LONG = ENDLESS | {"max_tokens": 80}
KEY = {b"Authorization": "Bearer sésame".encode()}


def listening(processes: list[psutil.Process]) -> set[int]:
    """Ports by what the kernel says."""
    return {
        each.laddr.port
        for process in processes
        for each in process.net_connections("inet")
        if each.status == psutil.CONN_LISTEN or each.type == socket.SOCK_DGRAM
    }


def told(server: Launched) -> set[int]:
    """Ports by what the server says."""
    line = server.wait_for("all ports, by process: (.*)")[1]
    return {int(port) for port in re.findall(r":(\d+)(?=[,;]|$)", line)}


def events_of(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line[6:])


def check_report(lines: list[str]) -> None:
    *_, http, _, ranks, model, chats, sampling, limits, ready = lines
    assert re.fullmatch(r"HTTP: http://127.0.0.1:\d+, clients bring an API key", http)
    assert ranks == "ranks: 2 (local), 0 standbys; /admin/ is closed: there is no admin key"
    assert re.fullmatch(r"model: \S+/tiny_model, prompt and answer of 2048 tokens", model)
    due = "tool calls are read as hermes, thoughts as none"
    assert chats == f"chats: the checkpoint's template (default); {due}"
    assert sampling.startswith("sampling: who leaves it out gets ")
    assert "4096 in flight, 8192 connections" in limits
    assert ready.startswith("ready: ")


def test_from_start_to_drain(tmp_path: Path) -> None:
    environment, kv_events = {"DP_RUNTIME_API_KEY": "sésame"}, f"ipc://{tmp_path}/kv"
    flags = ("--collective", "torch_distributed", "--drain-timeout-s", "600", "--page-size", "4")
    with (
        launched(*LOCAL, *flags, "--kv-events-endpoint", kv_events, **environment) as server,
        zmq.Context() as context,
        context.socket(zmq.SUB) as subscriber,
    ):
        with server.client() as client:
            client.headers = httpx.Headers(KEY)
            health = client.get("/health", headers={"Authorization": ""})
            assert (health.status_code, health.json()["status"]) == (503, "starting")
            server.wait_for("ready: tiny_model on 2 ranks")
            assert client.get("/health").json()["status"] == "ok"
            assert told(server) == listening(server.look())
            check_report(server.lines)
            subscriber.subscribe(b"")
            subscriber.connect(kv_events)
            with client.stream("POST", "/v1/completions", json=LONG) as answer:
                events = events_of(answer)
                next(events)
                assert subscriber.poll(int(WAIT_S * 1000)), "full pages of the answer are published"
                server.signal(signal.SIGTERM)
                refused = client.post("/v1/completions", json=LONG | {"max_tokens": 1})
                while refused.status_code == 200:  # the signal was not there yet
                    refused = client.post("/v1/completions", json=LONG | {"max_tokens": 1})
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
                assert client.get("/health").json()["status"] == "draining"
                *_, last = events
            assert last["choices"][0]["finish_reason"] == "length"
        others = [one for one in server.look() if one.pid != server.process.pid]
        environments = [process.environ() for process in others]
        assert server.end() == 0
    assert "sésame" not in server.text
    assert all("DP_RUNTIME_API_KEY" not in each for each in environments)
    assert "reached from other hosts" not in server.text


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with launched(*LOCAL, "--port", str(port)) as server:
            assert server.process.wait(WAIT_S) == 1
            server.end()
    assert server.lines == [
        f"error: can not listen on 127.0.0.1 port {port}: [Errno 98] Address already in use"
    ]


@pytest.mark.parametrize(
    ("launcher", "begun", "number"),
    [
        pytest.param("local", "dp-rank-", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("local", "dp-rank-", signal.SIGINT, marks=pytest.mark.slow),
        *(
            pytest.param("ray", *how, marks=[pytest.mark.slow, pytest.mark.ray])
            for how in (("raylet", signal.SIGTERM), ("ray::Rank", signal.SIGTERM))
        ),
    ],
)
def test_a_start_that_is_interrupted_leaves_nothing(
    launcher: str, begun: str, number: signal.Signals
) -> None:
    with launched("--launcher", launcher, "--dp-size", "2") as server:
        server.url  # noqa: B018
        while not any(process.name().startswith(begun) for process in server.look()):
            assert server.process.poll() is None
        server.signal(number)
        assert server.end() == 128 + number
    assert "error" not in server.text.lower()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_does_not_drain_in_time_is_cut_off(number: signal.Signals) -> None:
    with launched(*LOCAL, "--drain-timeout-s", "0.1") as server, server.client() as client:
        server.wait_for("ready")
        with client.stream("POST", "/v1/completions", json=ENDLESS) as answer:
            events = events_of(answer)
            next(events)
            server.signal(number)
            *_, last = events
        assert last["error"]["type"] == "server_error"
        assert server.end() == 0


@pytest.mark.slow
@pytest.mark.ray
def test_a_server_drains_though_ray_takes_sigterm() -> None:
    flags = ("--launcher", "ray", "--dp-size", "2", "--drain-timeout-s", "600")
    with launched(*flags) as server, server.client() as client:
        server.wait_for("ready")
        with client.stream("POST", "/v1/completions", json=LONG) as answer:
            events = events_of(answer)
            next(events)
            server.signal(signal.SIGTERM)
            *_, last = events
        assert last["choices"][0]["finish_reason"] == "length"
        assert server.end() == 0


@pytest.mark.slow
def test_twice_ends_the_drain() -> None:
    with launched(*LOCAL, "--drain-timeout-s", "600") as server, server.client() as client:
        server.wait_for("ready")
        with client.stream("POST", "/v1/completions", json=ENDLESS) as answer:
            next(events_of(answer))
            server.signal(signal.SIGINT)
            while client.get("/health").json()["status"] != "draining":
                pass
            server.signal(signal.SIGINT)
            assert server.end() == 0


@pytest.mark.slow
def test_a_client_that_reads_nothing_holds_up_no_end() -> None:
    with launched(*LOCAL, "--drain-timeout-s", "0.1") as server, server.client() as client:
        server.wait_for("ready")
        body = {"prompt": [5] * 1500, "prompt_logprobs": 64, "n": 3, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            server.signal(signal.SIGTERM)
            assert server.end() == 0


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["thread", pytest.param("ray", marks=pytest.mark.ray)])
def test_every_port_is_told(launcher: str) -> None:
    with launched("--launcher", launcher, "--dp-size", "2", "--host", "0.0.0.0") as server:
        server.wait_for("ready")
        assert told(server) == listening(server.look())
        port = server.url.rsplit(":", 1)[1]
        opened = server.wait_for("reached from other hosts: (.*); docs/security.md")[1]
        assert opened == f"python 0.0.0.0:{port}"  # and none of the others
        assert "set --api-key" in server.text
        server.signal(signal.SIGTERM)
        assert server.end() == 0


@pytest.mark.slow
def test_signals_in_a_hurry_are_all_taken() -> None:
    with launched(*LOCAL) as server:
        server.wait_for("ready")
        for number in (signal.SIGTERM, signal.SIGINT) * 20:
            threading.Event().wait(0.001)
            server.signal(number)
        assert server.end() == 0

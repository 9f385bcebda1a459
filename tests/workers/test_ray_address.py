"""Which addresses of a cluster are taken, and that none that does not answer is waited for."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from dp_runtime import EngineConfig
from dp_runtime.errors import StartError
from workers.ray_cluster import address as module
from workers.ray_cluster.address import ClusterAddress

LONG_S = 250.0  # within start_timeout_s, and what a probe is far below


def address_of(named: str | None, inherited: str = "") -> ClusterAddress:
    return ClusterAddress.from_config(
        EngineConfig("x", ray_address=named), {"RAY_ADDRESS": inherited}
    )


@pytest.mark.parametrize(
    "text",
    [
        "http://a:1", "redis://a:1", "a b:6379", "a", "a:", ":6379", "a:0", "a:65536", "a:-1",
        "a:6379/", "a:1:2", "ray://a", "ray://", "a\n:1", "a:1\n", "a:٣", "x" * 5000 + ":1",
        "[::1]", "[a]:1", "user@a:1",
    ],
)  # fmt: skip
def test_junk_is_one_line_that_names_the_field(text: str) -> None:
    with pytest.raises(ValueError, match=r"^ray_address: .* is not allowed; auto, host:port or"):
        address_of(text)
    with pytest.raises(ValueError, match=r"^ray_address: .*RAY_ADDRESS\)$") as caught:
        address_of(None, inherited=text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("10.0.0.1:6379", "10.0.0.1", 6379), ("ray://head_1.svc:10001", "head_1.svc", 10001),
        ("[::1]:6379", "::1", 6379), ("auto", "", 0), ("local", "", 0),
    ],
)  # fmt: skip
def test_addresses(text: str, host: str, port: int) -> None:
    assert address_of(text) == ClusterAddress(text, host, port)
    assert address_of(None, inherited=text) == ClusterAddress(text, host, port)


def test_the_environment_is_for_configs_that_name_none() -> None:
    assert address_of(None).text == "local"
    assert address_of("auto", inherited="a:1").text == "a:1"
    assert address_of("b:2", inherited="a:1").text == "b:2"
    assert address_of("b:2", inherited="junk").text == "b:2"


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def refused(address: ClusterAddress) -> str:
    with pytest.raises(StartError, match=r"^ray_address: no cluster answers at ") as caught:
        address.probe(time.monotonic() + LONG_S)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_nobody_listens(scheme: str, server: socket.socket) -> None:
    port = server.getsockname()[1]
    server.close()
    assert refused(address_of(f"{scheme}127.0.0.1:{port}")).endswith("Connection refused")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_server_that_never_answers(
    scheme: str, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen cluster looks like this: the kernel takes the connection."""
    monkeypatch.setattr(module, "PROBE_S", 0.3)
    port = server.getsockname()[1]
    assert refused(address_of(f"{scheme}127.0.0.1:{port}")).endswith("no answer in time")


def test_a_server_that_is_not_ray(server: socket.socket) -> None:
    def answer() -> None:
        while True:
            try:
                stream, _ = server.accept()
            except OSError:
                return
            stream.recv(100)
            stream.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            stream.close()

    threading.Thread(target=answer, daemon=True).start()
    address = address_of(f"127.0.0.1:{server.getsockname()[1]}")
    assert refused(address).endswith("is no Ray server")


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*arguments: object, **options: object) -> object:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert refused(address_of("nowhere:1")).endswith("Name or service not known")
    monkeypatch.setattr(module, "PROBE_S", 0.2)
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: release.wait(60) or [])
    assert refused(address_of("slow:1")).endswith("look-up of its name had no answer in time")
    release.set()

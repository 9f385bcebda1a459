"""One connection to Ray for all engines of a process, without a cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import ray

from dp_runtime import EngineConfig
from dp_runtime.errors import StartError
from tests.workers.leftovers import wait_until
from workers.ray_cluster import connection as module
from workers.ray_cluster.address import ClusterAddress
from workers.ray_cluster.connection import LOST, RayConnection

LOCAL = EngineConfig("x", start_timeout_s=20.0)


class FakeRay:
    """What ray.init and ray.shutdown do to a process; `gate` holds an init back."""

    def __init__(self) -> None:
        self.identity: str | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.inits: list[str] = []
        self.num_shutdowns = 0

    def init(self, address: ClusterAddress) -> None:
        self.gate.wait(60)
        if self.error is not None:
            raise self.error
        self.inits.append(address.text)
        self.identity = f"job {len(self.inits)}"

    def shutdown(self) -> None:
        self.num_shutdowns += 1
        self.identity = None


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    made = FakeRay()
    monkeypatch.setattr(module, "_current", None)
    monkeypatch.setattr(module, "_init", made.init)
    monkeypatch.setattr(module, "_identity", lambda: made.identity)
    monkeypatch.setattr(ClusterAddress, "probe", lambda self, deadline: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: made.identity is not None)
    monkeypatch.setattr(ray, "shutdown", made.shutdown)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield made
    made.identity = None  # ends the thread of a connection that a test has left


def connect(config: EngineConfig = LOCAL, timeout_s: float = 20.0) -> RayConnection:
    return module.connect(config, time.monotonic() + timeout_s)


def test_the_last_user_ends_the_connection(fake: FakeRay) -> None:
    one, other = connect(), connect()
    assert one is other
    assert one.starts_cluster
    one.release()
    assert (one.connected, fake.num_shutdowns) == (True, 0)
    other.release()
    assert (one.connected, fake.num_shutdowns) == (False, 1)
    again = connect()
    assert again.connected
    assert fake.inits == ["local", "local"]
    again.release()


def test_the_users_connection_is_never_ended(fake: FakeRay) -> None:
    fake.identity = "the user's"
    one = connect()
    assert one.connected
    assert not one.starts_cluster
    one.release()
    assert (fake.identity, fake.num_shutdowns, fake.inits) == ("the user's", 0, [])


@pytest.mark.parametrize("later", [None, "job of a later ray.init"])
@pytest.mark.parametrize("own", [True, False])
def test_a_shutdown_by_the_user_is_told(fake: FakeRay, own: bool, later: str | None) -> None:
    fake.identity = None if own else "the user's"
    one = connect()
    told: list[str] = []
    one.on_loss(told.append)
    fake.identity = later
    wait_until(lambda: told == [LOST], "the loss is told")
    assert not one.connected
    one.release()
    assert fake.num_shutdowns == 0
    another = connect()
    assert another is not one
    assert another.connected
    another.release()


def test_an_init_that_does_not_end(fake: FakeRay) -> None:
    fake.gate.clear()
    with pytest.raises(StartError, match=r"^connect to Ray \(local\) did not end in start_time"):
        connect(timeout_s=0.2)
    with pytest.raises(StartError, match=r"^connect to Ray: an earlier attempt"):
        connect(timeout_s=0.2)
    fake.gate.set()
    wait_until(lambda: fake.num_shutdowns == 1, "what came too late is undone")
    one = connect()
    assert one.connected
    one.release()


def test_an_init_that_fails(fake: FakeRay) -> None:
    fake.error = RuntimeError("\x1b[31mVersion mismatch:\n  Ray: 2.1\x1b[0m")
    config = EngineConfig("x", ray_address="10.0.0.1:6379")
    with pytest.raises(StartError, match=r"^ray_address: no .*'10.0.0.1:6379': Version mis"):
        connect(config)
    fake.error = None
    one = connect(config)
    assert fake.inits == ["10.0.0.1:6379"]
    one.release()


def test_a_process_has_one_cluster(fake: FakeRay) -> None:
    one = connect(EngineConfig("x", ray_address="10.0.0.1:6379"))
    for named in ("10.0.0.2:6379", "ray://10.0.0.1:10001"):
        with pytest.raises(
            ValueError, match=r"^ray_address: .*connected to '10.0.0.1:6379' already"
        ):
            connect(EngineConfig("x", ray_address=named))
    for fitting in (LOCAL, EngineConfig("x", ray_address="10.0.0.1:6379")):
        connect(fitting).release()
    one.release()
    assert fake.num_shutdowns == 1


def test_the_address_of_the_users_cluster_is_compared(
    fake: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Context:
        gcs_address = "10.0.0.1:6379"

    fake.identity = "the user's"
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    with pytest.raises(ValueError, match=r"^ray_address: .*'10.0.0.1:6379' already"):
        connect(EngineConfig("x", ray_address="10.0.0.1:7777"))
    connect(EngineConfig("x", ray_address="localhost:6379")).release()
    connect(EngineConfig("x", ray_address="auto")).release()

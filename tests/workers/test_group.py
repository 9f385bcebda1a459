"""The group of ranks over handles that are only pretended: errors, deadlines, meeting points."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dp_runtime import EngineConfig
from dp_runtime.errors import RankFailed, StartError
from dp_runtime.metrics.status import RankHealth, RankState
from workers.devices import resolve_device
from workers.group import WorkerGroup, _meeting_point
from workers.messages import HostInfo, MeetingPoint, Polled

HUNG = "never answers"


@dataclass
class FakeRank:
    """Answers each method with a value, an exception to raise, or not at all."""

    dp_rank: int
    answers: dict[str, Any] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    killed: int = 0
    on_serve: Callable[[MeetingPoint], Any] = lambda point: None

    def call(self, method: str, *args: Any) -> Future[Any]:
        self.calls.append(method)
        if method == "serve":
            self.on_serve(*args)
        future: Future[Any] = Future()
        match self.answers.get(method):
            case "never answers":
                pass
            case Exception() as error:
                future.set_exception(error)
            case answer:
                future.set_result(answer)
        return future

    def kill(self) -> None:
        self.killed += 1


def group_of(*answers: dict[str, Any], **fields: Any) -> tuple[WorkerGroup, list[FakeRank]]:
    host = HostInfo(0, "a", "10.0.0.1", 5000, "/dev/shm")
    ranks = [
        FakeRank(rank, {"prepare": host, "health": RankHealth(rank, RankState.LOADING)} | one)
        for rank, one in enumerate(answers)
    ]
    config = EngineConfig("x", dp_size=len(ranks), **fields)
    return WorkerGroup(config, ranks, lambda: released.append(True)), ranks


released: list[bool] = []


@pytest.mark.parametrize(
    ("answers", "kind", "message"),
    [
        ([ValueError("page_size: 3")] * 4, ValueError, "page_size: 3"),
        ([None, ValueError("w: 1"), None], ValueError, "rank 1: w: 1"),
        ([None, ValueError("w: 1"), OSError("disk"), None], ValueError, "rank 1: w: 1"),
        ([OSError("full")] * 3 + [None], StartError, "rank 0, 1, 2: OSError: full"),
        ([OSError("full")] * 3, StartError, "OSError: full"),
        (
            [OSError("full"), None, KeyError("x")], StartError,
            "rank 0: OSError: full; rank 2: KeyError: 'x'",
        ),
        ([None, RankFailed("rank 1 ended")], StartError, "rank 1 ended"),
        ([None, HUNG, OSError("full")], StartError, "rank 2: OSError: full"),
        ([None, HUNG, HUNG], StartError, "ranks [1, 2] did not finish 'load' in time"),
    ],
)  # fmt: skip
def test_errors_of_a_start_are_one_message(answers: Any, kind: Any, message: str) -> None:
    released.clear()
    group, ranks = group_of(*({"load": answer} for answer in answers), start_timeout_s=0.5)
    started = time.monotonic()
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        group.start(show_progress=False)
    assert time.monotonic() - started < 2.5
    assert [rank.killed for rank in ranks] == [1] * len(ranks)
    assert released == [True]
    assert all("serve" not in rank.calls for rank in ranks)


def test_the_first_failure_counts_and_the_others_are_told() -> None:
    group, ranks = group_of({"poll": HUNG}, {"poll": Polled([], "rank 1: KeyError: 'x'")}, {})
    ranks[2].answers["poll"] = Polled([])
    failures: list[BaseException] = []
    told = threading.Event()

    def on_failure(error: BaseException) -> None:
        failures.append(error)
        told.set()

    group.listen(lambda rank, progress: None, on_failure)
    assert told.wait(2)
    deadline = time.monotonic() + 2
    while not all("abandon" in rank.calls for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.01)
    group.close()
    group.close()
    assert [str(error) for error in failures] == ["rank 1: KeyError: 'x'"]
    assert all(rank.calls.count("abandon") == 1 for rank in ranks)
    assert all("stop" not in rank.calls for rank in ranks)
    assert [rank.killed for rank in ranks] == [1, 1, 1]


def test_health_of_ranks_that_do_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.group.STATUS_S", 0.2)
    group, _ = group_of({"health": HUNG}, {"health": RankFailed("rank 1 ended")})
    hung, dead = group.health()
    assert (hung.state, hung.error) == (RankState.UNREACHABLE, "does not answer")
    assert (dead.state, dead.error) == (RankState.UNREACHABLE, "rank 1 ended")
    with pytest.raises(StartError, match=r"ranks \[0\] did not finish"):
        group_of({"totals": HUNG})[0].totals()


def host(rank: int, name: str) -> HostInfo:
    return HostInfo(rank, name, f"10.0.0.{rank}", 5000 + rank, "/dev/shm")


@pytest.mark.parametrize("fields", [{"device": "cpu"}, {"device": "cuda", "ranks_per_gpu": 2}])
def test_ranks_of_one_host_meet_in_shared_memory(fields: dict[str, Any]) -> None:
    config = EngineConfig("x", dp_size=2, **fields)
    point = _meeting_point(config, [host(0, "a"), host(1, "a")], None)
    assert point.kind == "shared_memory"
    assert point.address.startswith("/dev/shm/dp-runtime-")
    again = _meeting_point(config, [host(0, "a"), host(1, "a")], None)
    assert again.address != point.address


@pytest.mark.parametrize(
    ("hosts", "fields"),
    [
        ("ab", {"device": "cpu"}),  # several hosts
        ("ab", {"device": "cuda"}),
        ("aa", {"device": "cuda", "collective": "torch_distributed"}),
        ("aa", {"device": "cpu", "collective": "torch_distributed"}),
    ],
)
def test_other_ranks_meet_at_the_first_one(hosts: str, fields: dict[str, Any]) -> None:
    config = EngineConfig("x", dp_size=2, **fields)
    point = _meeting_point(config, [host(rank, name) for rank, name in enumerate(hosts)], None)
    assert point == MeetingPoint("torch_distributed", "tcp://10.0.0.0:5000")


def test_a_rendezvous_that_was_not_left_is_removed(tmp_path: Path) -> None:
    """Ranks that are killed while they attach leave names behind."""
    host = HostInfo(0, "a", "10.0.0.1", 5000, str(tmp_path))
    group, ranks = group_of({"prepare": host, "serve": HUNG}, device="cpu", start_timeout_s=0.3)
    ranks[0].on_serve = lambda point: Path(point.address).mkdir()
    with pytest.raises(StartError):
        group.start(show_progress=False)
    assert list(tmp_path.iterdir()) == []


def test_gpu_ranks_of_one_host_meet_there_too() -> None:
    config = EngineConfig("x", dp_size=2, device="cuda")
    point = _meeting_point(config, [host(0, "a"), host(1, "a")], None)
    assert point.kind == "peer_to_peer"
    assert point.in_host_memory


def test_shared_memory_of_several_hosts_is_refused() -> None:
    config = EngineConfig("x", dp_size=2, collective="shared_memory")
    with pytest.raises(ValueError, match=r"collective: 'shared_memory' .* on \['a', 'b'\]"):
        _meeting_point(config, [host(0, "a"), host(1, "b")], None)


@pytest.mark.parametrize(
    ("device", "num_gpus", "expected"),
    [("auto", 0, "cpu"), ("auto", 4, "cuda"), ("auto", 9, "cuda"), ("cpu", 8, "cpu")],
)
def test_device(device: str, num_gpus: int, expected: str) -> None:
    config = EngineConfig("x", dp_size=4, device=device)
    assert resolve_device(config, num_gpus, "this host").device == expected


def test_ranks_may_share_gpus() -> None:
    for ranks_per_gpu, num_gpus in ((4, 1), (2, 2), (3, 2)):
        config = EngineConfig("x", dp_size=4, ranks_per_gpu=ranks_per_gpu)
        assert resolve_device(config, num_gpus, "this host").device == "cuda"
    nccl = EngineConfig("x", dp_size=4, ranks_per_gpu=2, collective="torch_distributed")
    assert resolve_device(nccl, 0, "this host").device == "cpu"
    with pytest.raises(ValueError, match=r"collective: 'torch_distributed' .* ranks_per_gpu 2"):
        resolve_device(nccl, 2, "this host")


@pytest.mark.parametrize(
    ("device", "num_gpus", "message"),
    [
        ("auto", 3, "dp_size: 4 is not allowed; this host has 3 GPUs"),
        ("cuda", 3, "dp_size: 4 is not allowed; this host has 3 GPUs"),
        ("cuda", 0, "device: 'cuda' is not allowed; this host has no GPU"),
        ("auto", 1, r"has 1 GPUs .*ranks_per_gpu=2\); .* set ranks_per_gpu=4 or"),
    ],
)
def test_too_few_devices(device: str, num_gpus: int, message: str) -> None:
    ranks_per_gpu = 2 if num_gpus == 1 else 1
    config = EngineConfig("x", dp_size=4, device=device, ranks_per_gpu=ranks_per_gpu)
    with pytest.raises(ValueError, match=message):
        resolve_device(config, num_gpus, "this host")

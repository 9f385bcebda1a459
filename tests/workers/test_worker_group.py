"""The group of ranks over handles that are only pretended: errors, deadlines, meeting points."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from collectives.session import session_token
from dp_runtime import EngineConfig
from dp_runtime.core.membership import Membership
from dp_runtime.errors import RankFailed, StartError
from dp_runtime.metrics.status import RankHealth, RankState
from dp_runtime.startup.devices import resolve_device
from workers.communicators import cluster_address, open_rendezvous, transport_of
from workers.messages import HostInfo, Join, Message, OpenRendezvous, Polled, Rendezvous
from workers.supervision.supervisor import NOBODY
from workers.worker_group import WorkerGroup

HUNG = "never answers"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for ranks that never answer here."""
    monkeypatch.setattr("workers.ranks.TOGETHER_S", 0.1)
    monkeypatch.setattr("workers.supervision.poller.POLL_S", 0.1)
    monkeypatch.setattr("workers.supervision.recovery.SUSPEND_S", 0.1)
    monkeypatch.setattr("workers.supervision.recovery.ASK_S", 0.1)
    monkeypatch.setattr("workers.supervision.watch.ASK_S", 0.1)


@dataclass
class FakeRank:
    """Answers each method with a value, an exception to raise, or not at all."""

    dp_rank: int
    answers: dict[str, Any] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    messages: list[Message[Any]] = field(default_factory=list)
    killed: int = 0
    on_join: Callable[[Any], Any] = lambda point: None

    def call(self, message: Message[Any]) -> Future[Any]:
        method = message.name
        self.calls.append(method)
        self.messages.append(message)
        if isinstance(message, Join):
            self.on_join(message.rendezvous)
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
    usual = {"prepare": HostInfo(0, "a"), "readflight": HUNG}
    ranks = [
        FakeRank(rank, usual | {"readhealth": RankHealth(rank, RankState.LOADING)} | one)
        for rank, one in enumerate(answers)
    ]
    config = EngineConfig("x", dp_size=len(ranks), **{"max_recoveries": 0} | fields)
    return WorkerGroup(config, FakeLauncher(), ranks), ranks


class FakeLauncher:
    def launch(self, dp_rank: int) -> FakeRank:
        raise AssertionError("nobody is replaced")

    def meeting(self, members: Membership) -> None: ...

    def make_room(self, dp_ranks: Any, timeout_s: float) -> None: ...

    def give_room(self, dp_ranks: Any) -> None: ...

    def release(self) -> None:
        released.append(True)


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
        group.start(False, 0.5)
    assert time.monotonic() - started < 20
    assert [rank.killed for rank in ranks] == [1] * len(ranks)
    assert released == [True]
    assert all("join" not in rank.calls for rank in ranks)


def test_the_first_failure_counts_and_the_others_are_told() -> None:
    group, ranks = group_of({"poll": HUNG}, {"poll": Polled([], "rank 1: KeyError: 'x'")}, {})
    ranks[2].answers["poll"] = Polled([])
    failures: list[BaseException] = []
    told = threading.Event()

    def on_failure(error: BaseException) -> None:
        failures.append(error)
        told.set()

    met = Rendezvous("torch_distributed", "tcp://10.0.0.0:5000", "secret")
    ranks[0].answers["openrendezvous"] = met
    group.start(False, 5.0)
    group.listen(replace(NOBODY, on_failure=on_failure))
    assert told.wait(20)
    deadline = time.monotonic() + 20
    while not all("abandon" in rank.calls for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.01)
    group.close()
    group.close()
    assert [str(error) for error in failures] == ["rank 1: KeyError: 'x'"]
    assert all("abandon" in rank.calls for rank in ranks)
    assert all("stop" not in rank.calls for rank in ranks)
    assert [rank.killed for rank in ranks] == [1, 1, 1]


def test_nobody_waits_for_a_rank_that_does_not_answer_and_will_not_be_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even for as long as it may take to leave a step."""
    monkeypatch.setattr("workers.supervision.recovery.SUSPEND_S", 1000.0)
    late = Polled([], "rank 0: CollectiveTimeout: waited for ranks 1")
    hung = dict.fromkeys(("poll", "suspend", "readhealth"), HUNG)
    group, ranks = group_of({"poll": late}, hung, max_recoveries=0)
    ranks[0].answers["openrendezvous"] = Rendezvous("torch_distributed", "tcp://a:5000", "secret")
    failures: list[BaseException] = []
    told = threading.Event()

    def on_failure(error: BaseException) -> None:
        failures.append(error)
        told.set()

    group.start(False, 5.0)
    group.listen(replace(NOBODY, on_failure=on_failure))
    assert told.wait(20)
    group.close()
    assert "rank 0: CollectiveTimeout: waited for ranks 1" in str(failures[0])


def test_health_of_ranks_that_do_not_answer() -> None:
    group, _ = group_of({"readhealth": HUNG}, {"readhealth": RankFailed("rank 1 ended")})
    hung, dead = group.health(0.2)
    assert (hung.state, hung.error) == (RankState.UNREACHABLE, "does not answer")
    assert (dead.state, dead.error) == (RankState.UNREACHABLE, "rank 1 ended")


def hosts_of(names: str) -> list[HostInfo]:
    return [HostInfo(rank, name) for rank, name in enumerate(names)]


@pytest.mark.parametrize("fields", [{"device": "cpu"}, {"device": "cuda", "ranks_per_gpu": 2}])
def test_ranks_of_one_host_meet_in_shared_memory(fields: dict[str, Any]) -> None:
    config = EngineConfig("x", dp_size=2, **fields)
    assert transport_of(config, hosts_of("aa")).name == "shared_memory"


@pytest.mark.parametrize(
    ("hosts", "fields"),
    [
        ("ab", {"device": "cpu"}),  # several hosts
        ("ab", {"device": "cuda"}),
        ("aa", {"device": "cuda", "collective": "torch_distributed"}),
        ("aa", {"device": "cpu", "collective": "torch_distributed"}),
    ],
)
def test_other_ranks_meet_at_the_first_one(
    hosts: str, fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 0 opens the rendezvous, and on one host nobody else's can reach it."""
    config = EngineConfig("x", dp_size=2, **fields)
    assert transport_of(config, hosts_of(hosts)).name == "torch_distributed"
    group, ranks = group_of({}, {}, start_timeout_s=5.0, **fields)
    met = Rendezvous("torch_distributed", "tcp://10.0.0.0:5000", "secret")
    for rank, name in zip(ranks, hosts):
        rank.answers |= {"prepare": HostInfo(rank.dp_rank, name), "openrendezvous": met}
    with caplog.at_level("INFO", "workers"):
        group.start(False, 5.0)
    names = ", ".join(sorted(set(hosts)))
    said = f"epoch 0: ranks on {names} meet over torch_distributed at tcp://10.0.0.0:5000"
    assert caplog.messages == [said]
    opened = [call for rank in ranks for call in rank.messages if isinstance(call, OpenRendezvous)]
    assert opened == [OpenRendezvous("torch_distributed", one_host=hosts == "aa")]
    joined = [call for rank in ranks for call in rank.messages if isinstance(call, Join)]
    assert joined == [Join(met, epoch=0, timeout_s=5.0)] * 2
    assert "secret" not in repr(joined)


def test_shared_memory_is_a_new_directory_each_time() -> None:
    first, second = (open_rendezvous("shared_memory", True).rendezvous for _ in range(2))
    assert first.address.startswith(f"/dev/shm/dp-runtime-{session_token()}-")
    assert first.address != second.address


@pytest.mark.parametrize("one_host", [True, False])
def test_a_store_is_reachable_from_where_the_ranks_are(one_host: bool) -> None:
    opened = open_rendezvous("torch_distributed", one_host)
    assert opened.listener is not None
    with opened.listener as listener:
        host, port = listener.getsockname()
    assert opened.rendezvous.address == f"tcp://{host}:{port}"
    assert host == ("127.0.0.1" if one_host else cluster_address())
    assert len(opened.rendezvous.secret) == 32


def test_a_rendezvous_that_was_not_left_is_removed(tmp_path: Path) -> None:
    """Ranks that are killed while they attach leave names behind."""
    met = Rendezvous("shared_memory", str(tmp_path / "meet"))
    answers = {"openrendezvous": met, "join": HUNG}
    group, ranks = group_of(answers, device="cpu", start_timeout_s=0.3)
    ranks[0].on_join = lambda point: Path(point.address).mkdir()
    with pytest.raises(StartError):
        group.start(False, 0.3)
    assert list(tmp_path.iterdir()) == []


def test_gpu_ranks_of_one_host_meet_there_too() -> None:
    config = EngineConfig("x", dp_size=2, device="cuda")
    transport = transport_of(config, hosts_of("aa"))
    assert transport.name == "peer_to_peer"
    assert Rendezvous(transport.name, "").in_host_memory


def test_shared_memory_of_several_hosts_is_refused() -> None:
    config = EngineConfig("x", dp_size=2, collective="shared_memory")
    allowed = "auto or torch_distributed where ranks are on several hosts: a, b"
    with pytest.raises(ValueError, match=f"^collective: 'shared_memory' is not allowed; {allowed}"):
        transport_of(config, hosts_of("ab"))


def test_ranks_that_share_gpus_of_several_hosts_are_refused_by_what_was_set() -> None:
    config = EngineConfig("x", dp_size=4, device="cuda", ranks_per_gpu=2)
    with pytest.raises(ValueError, match=r"^ranks_per_gpu: 2 is not allowed; 1 where .*: a, b$"):
        transport_of(config, hosts_of("aabb"))


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

"""The NCCL rows without NCCL: Gloo stands in for it, and CUDA's part is only pretended.

Real rows move through the very calls that NCCL would get; tests/gpu has the real thing.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from collectives.torch_distributed import nccl
from collectives.torch_distributed.group import TorchDistributedGroup
from dp_runtime.errors import CollectiveAborted, CollectiveTimeout, StartError
from dp_runtime.host.capturing import capturing
from tests.collectives import cases
from tests.collectives.ranks import RankThread, outcome
from tests.collectives.test_rows import patterns

DEVICE = torch.device("cpu")


@dataclass
class Machine:
    """What the pretended devices do, and what was done to them."""

    done: bool = True  # whether events have happened
    connects: bool = True
    aborts: list[int] = field(default_factory=list)  # ranks
    graphs: threading.Event = field(default_factory=threading.Event)  # set once they are gone


class Event:
    machine: Machine

    def record(self, stream: object) -> None:
        pass

    def query(self) -> bool:
        return self.machine.done


class StandIn:
    """Gloo behind the calls of NCCL's backend; it returns once a collective is done."""

    machine: Machine

    class Options:
        _timeout = timedelta(seconds=1)

    def __init__(self, store: Any, rank: int, size: int, options: Options) -> None:
        self._rank = rank
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=10))

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            assert arguments[-1].asyncOp is False
            while not self.machine.connects:
                time.sleep(0.01)
            getattr(self._gloo, name)(*arguments).wait()

        return call

    def abort(self) -> None:
        self.machine.aborts.append(self._rank)
        self.machine.graphs.wait(30.0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    machine.graphs.set()
    monkeypatch.setattr(Event, "machine", machine, raising=False)
    monkeypatch.setattr(StandIn, "machine", machine, raising=False)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", StandIn, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("set_device", "synchronize", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    for name in nccl.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    return machine


def run(path: Path, dp_size: int, case: Callable[..., Any], timeout_s: float = 20.0) -> list[Any]:
    """Run a case on the ranks of a group, each a thread, and close the group."""

    def rank(dp_rank: int) -> Any:
        address = f"file://{path / 'store'}"
        group = TorchDistributedGroup(address, dp_rank, dp_size, timeout_s, "nccl", DEVICE, 2.0)
        try:
            return case(group)
        finally:
            group.close()

    threads = [RankThread(partial(rank, each)) for each in range(dp_size)]
    return [thread.result() for thread in threads]


@pytest.mark.parametrize("dp_size", [1, 3])
def test_rows(machine: Machine, tmp_path: Path, dp_size: int) -> None:
    dtypes = (torch.float32, torch.int64)

    def case(group: TorchDistributedGroup) -> None:
        c = group.collective
        cases.gather_case(c, group.board, patterns(dp_size), (1, 7), dtypes)
        cases.reduce_scatter_case(c, group.board, patterns(dp_size), (1, 7), dtypes, False)
        cases.strided_case(c, group.board, False)
        cases.nobody_waits_case(c, group.board)

    run(tmp_path, dp_size, case)
    assert sorted(machine.aborts) == list(range(dp_size))  # each frees its device, once


def test_an_abort_waits_for_the_end_of_a_capture(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nccl, "_GRACE_S", 20.0)

    def case(group: TorchDistributedGroup) -> list[int]:
        with capturing():
            thread = threading.Thread(target=group.abort, args=("an epoch ends",))
            thread.start()
            thread.join(0.2)
            aborted_meanwhile = list(machine.aborts)
        thread.join()
        return aborted_meanwhile

    assert run(tmp_path, 1, case) == [[]]
    assert machine.aborts == [0]


def test_ranks_leave_together(machine: Machine, tmp_path: Path) -> None:
    """No rank frees what it lent to its peers before the last one is done."""

    def case(group: TorchDistributedGroup) -> tuple[float, float]:
        if group.collective.dp_rank == 1:
            time.sleep(0.5)
        done = time.monotonic()
        group.close()
        return done, time.monotonic()

    times = run(tmp_path, 2, case)
    assert min(closed for _, closed in times) >= max(done for done, _ in times)


def test_a_device_that_stands_still_is_aborted(machine: Machine, tmp_path: Path) -> None:
    def case(group: TorchDistributedGroup) -> list[Any]:
        c = group.collective
        machine.done = False
        c.all_gather(torch.ones(2, 3), (2, 2))
        while not machine.aborts:
            time.sleep(0.01)
        time.sleep(0.2)
        rows = torch.ones(2, 3)
        calls = (c.raise_if_failed, c.barrier, lambda: c.all_gather(rows, (2, 2)))
        return [outcome(call) for call in calls]

    started = time.monotonic()
    for ended in run(tmp_path, 2, case, timeout_s=0.4):
        assert {each.error for each in ended} == {CollectiveTimeout.__name__}
        assert all("all_gather: the device did not get past it" in e.message for e in ended)
    assert time.monotonic() - started < 10
    assert sorted(machine.aborts) == [0, 1]


def test_an_abort_reaches_the_devices_of_all_ranks(machine: Machine, tmp_path: Path) -> None:
    def case(group: TorchDistributedGroup) -> str:
        c = group.collective
        c.barrier()
        if c.dp_rank == 0:
            c.abort("for a test")
        while len(machine.aborts) < 2:
            time.sleep(0.01)
        ended = outcome(c.raise_if_failed)
        assert ended.error == CollectiveAborted.__name__
        return ended.message

    assert run(tmp_path, 2, case) == ["aborted by rank 0: for a test"] * 2


def test_an_abort_does_not_wait_for_a_launch_for_ever(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nccl, "_GRACE_S", 0.2)

    def case(group: TorchDistributedGroup) -> None:
        machine.connects = False  # every launch blocks from here
        launch = threading.Thread(
            target=outcome, args=(lambda: group.collective.all_gather(torch.ones(2, 3), (2,)),)
        )
        launch.start()
        time.sleep(0.1)
        started = time.monotonic()
        group.close()
        assert time.monotonic() - started < 10
        assert machine.aborts == [0]
        machine.connects = True
        launch.join()

    run(tmp_path, 1, case)


def test_an_abort_does_not_wait_for_graphs_that_go_after_it(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nccl, "_GRACE_S", 0.2)

    def case(group: TorchDistributedGroup) -> None:
        machine.graphs.clear()
        group.abort("a peer is lost")
        group.close()
        assert machine.aborts == [0], "its kernels end"
        machine.graphs.set()

    started = time.monotonic()
    run(tmp_path, 1, case)
    assert time.monotonic() - started < 20.0, "NCCL would wait for 30 s"


def test_a_start_without_a_peer_ends(machine: Machine, tmp_path: Path) -> None:
    machine.connects = False
    address = f"file://{tmp_path / 'store'}"
    with pytest.raises(StartError, match=r"rank 0 of 1 could not connect .* NCCL within 0.3 s"):
        TorchDistributedGroup(address, 0, 1, 1.0, "nccl", DEVICE, 0.3)
    machine.connects = True


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "0")
    monkeypatch.delenv("TORCH_FR_BUFFER_SIZE", raising=False)
    nccl.set_environment()
    assert os.environ["TORCH_NCCL_BLOCKING_WAIT"] == "0"
    assert os.environ.pop("TORCH_FR_BUFFER_SIZE") == "0"

"""How ranks meet: rendezvous by path or address, what is checked, and what stays behind."""

from __future__ import annotations

import os
import socket
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import psutil
import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from collectives.in_process import InProcessGroup
from collectives.shared_memory import rendezvous
from collectives.shared_memory.group import SharedMemoryGroup, new_rendezvous_path
from collectives.torch_distributed.group import TorchDistributedGroup
from dp_runtime.errors import StartError
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.parallel.step_board import StepBoard
from tests.collectives import boards, cases
from tests.collectives.ranks import Ranks


def see_path_case(c: RowCollective, board: StepBoard, path: str) -> bool:
    """Whether anything is left at the rendezvous, once all ranks have attached."""
    c.barrier()
    return os.path.exists(path)


def test_nothing_is_left_once_all_have_attached(ranks: Ranks, tmp_path: Path) -> None:
    path = str(tmp_path / "meet")
    seen = ranks.run("shared_memory", 3, see_path_case, path, address=path)
    assert seen == [False] * 3


def test_what_lies_there_meanwhile_is_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, modes = tmp_path / "meet", {}

    def note(self: rendezvous.MeetingDirectory) -> None:
        modes[""] = stat.S_IMODE(path.stat().st_mode)
        modes.update({file.name: stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()})
        remove(self)

    remove = rendezvous.MeetingDirectory._remove_names
    monkeypatch.setattr(rendezvous.MeetingDirectory, "_remove_names", note)
    SharedMemoryGroup(str(path), 0, 1, 1.0).close()
    assert modes == {"": 0o700, "region": 0o600, "rows.0": 0o600, "board.0": 0o600}


def test_a_peer_that_never_attaches_is_named(tmp_path: Path) -> None:
    path = tmp_path / "meet"
    start = time.monotonic()
    with pytest.raises(StartError, match=r"rank 0 waited 0.3 s at .* for ranks 1, 2"):
        SharedMemoryGroup(str(path), 0, 3, 1.0, attach_timeout_s=0.3)
    assert time.monotonic() - start < 10
    assert not path.exists()


def test_a_late_rank_without_rank_0_names_it(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="for ranks 0"):
        SharedMemoryGroup(str(tmp_path / "meet"), 1, 2, 1.0, attach_timeout_s=0.2)


def test_files_of_the_caller_stay(tmp_path: Path) -> None:
    path = tmp_path / "meet"
    path.mkdir(mode=0o700)
    (path / "notes").write_text("mine")
    SharedMemoryGroup(str(path), 0, 1, 1.0).close()
    assert [file.name for file in path.iterdir()] == ["notes"]


def test_a_directory_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "meet"
    path.mkdir()
    path.chmod(0o755)
    with pytest.raises(ValueError, match="mode 0700"):
        SharedMemoryGroup(str(path), 0, 1, 1.0)


def test_a_path_that_is_in_use_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "meet"
    path.mkdir(mode=0o700)
    os.mkfifo(path / "rows.0", 0o600)
    with pytest.raises(ValueError, match="rank 0 is there already"):
        SharedMemoryGroup(str(path), 0, 1, 1.0)


def test_too_little_space_names_what_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "meet"
    with pytest.raises(StartError, match=r"2 ranks need \d{15,}"):
        SharedMemoryGroup(str(path), 0, 2, 1.0, area_bytes=1 << 50)
    assert not path.exists()


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("dp_rank", {"dp_rank": 2, "dp_size": 2}),
        ("dp_rank", {"dp_rank": -1, "dp_size": 2}),
        ("area_bytes", {"dp_rank": 0, "dp_size": 2, "area_bytes": 100}),
        ("area_bytes", {"dp_rank": 0, "dp_size": 2, "area_bytes": 64}),
    ],
)
def test_wrong_sizes_are_refused(tmp_path: Path, field: str, arguments: Any) -> None:
    with pytest.raises(ValueError, match=field):
        SharedMemoryGroup(str(tmp_path / "meet"), timeout_s=1.0, **arguments)
    assert not (tmp_path / "meet").exists()


def test_wrong_names_are_refused() -> None:
    with pytest.raises(ValueError, match="dp_size: 0"):
        InProcessGroup(0, 1.0)
    with pytest.raises(ValueError, match="backend: 'mpi'"):
        TorchDistributedGroup("file:///nowhere", 0, 1, 1.0, backend="mpi")
    with pytest.raises(ValueError, match="dp_rank: 3"):
        TorchDistributedGroup("file:///nowhere", 3, 2, 1.0)


@pytest.mark.parametrize("dp_size", [2, 4])
def test_small_areas_carry_any_rows(ranks: Ranks, dp_size: int) -> None:
    patterns = ((40,) * dp_size, (90,) + (1,) * (dp_size - 1), (0,) * (dp_size - 1) + (33,))
    dtypes = (torch.float32, torch.bfloat16, torch.int64)
    small: dict[str, Any] = {"area_bytes": 320}
    ranks.run("shared_memory", dp_size, cases.gather_case, patterns, (1, 9, 101), dtypes, **small)
    arguments = (patterns, (1, 9, 101), dtypes, True)
    ranks.run("shared_memory", dp_size, cases.reduce_scatter_case, *arguments, **small)


def test_an_observer_reads_the_newest_records() -> None:
    group = SharedMemoryGroup(new_rendezvous_path(), 0, 1, 1.0)
    assert group.board.newest() == (None,)
    for step in range(5):
        group.board.all_gather_records(boards.record_of(0, step))
        assert group.board.newest() == (boards.record_of(0, step),)
    group.close()


def test_ranks_meet_over_tcp(ranks: Ranks) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    ranks.run("torch_distributed", 3, boards.exchange_case, 5, address=address)


def store_case(c: RowCollective, board: StepBoard, address: str) -> tuple[list[str], list[str]]:
    """The keys in the ranks' store once all have met, and where this process listens."""
    c.barrier()
    url = urlparse(address)
    store = TCPStore(str(url.hostname), url.port or 0, None, False, timedelta(seconds=5))
    listening = psutil.Process().net_connections("tcp")
    hosts = {line.laddr.ip for line in listening if line.status == psutil.CONN_LISTEN}
    keys = [key for key in store.list_keys() if not key.startswith("init/")]
    c.barrier()
    return keys, sorted(hosts)


def test_the_store_of_one_host_is_local_and_left_empty(ranks: Ranks) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    told = ranks.run("torch_distributed", 3, store_case, address, address=address)
    assert [keys for keys, _ in told] == [[]] * 3
    assert told[0][1] == ["127.0.0.1"]
    assert all(set(hosts) <= {"127.0.0.1"} for _, hosts in told)


def test_torch_distributed_says_who_could_not_meet(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="rank 1 of 2 could not meet"):
        TorchDistributedGroup(f"file://{tmp_path / 'store'}", 1, 2, 1.0, attach_timeout_s=0.3)


def test_shared_memory_does_not_need_torch_distributed() -> None:
    """torch itself imports parts of it; these modules do not."""
    package = Path(rendezvous.__file__).parent
    files = [*package.glob("*.py"), *(package.parent / f"{n}.py" for n in ("in_process", "rows"))]
    assert len(files) >= 8
    assert not [path for path in files if "distributed" in path.read_text()]


def test_a_rank_gives_up_a_meeting_that_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """... whether it waits for the names of the others, or a while longer for them to attach."""
    monkeypatch.setattr(rendezvous, "LATE_S", 0.1)
    for others in ((), ("rows.1", "board.1")):
        path = tmp_path / f"meeting-{len(others)}"
        with ThreadPoolExecutor(1) as pool:
            alone = pool.submit(SharedMemoryGroup, str(path), 0, 2, 5.0, attach_timeout_s=200.0)
            while not (path / "board.0").exists():
                time.sleep(0.002)
            for name in others:
                os.mkfifo(path / name)
            time.sleep(0.1)
            rendezvous.remove_rendezvous(str(path))
            with pytest.raises(StartError, match=r"rank 0 met no ranks 1: .* was removed"):
                alone.result(100)

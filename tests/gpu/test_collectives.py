"""Collectives with rows on GPUs: NCCL with a GPU per rank, the others with any number."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from collectives.shared_memory.group import new_rendezvous_path
from dp_runtime.parallel.collective import Counts, RowCollective
from dp_runtime.parallel.step_board import StepBoard
from tests.collectives import boards, cases
from tests.collectives.ranks import Case, Ranks
from tests.collectives.test_rows import patterns
from tests.gpu import counted_rows, lost_peer

REPOSITORY = Path(__file__).parents[2]
FLOATS = (torch.float32, torch.bfloat16)
SUM_DTYPES = (*FLOATS, torch.float16, torch.int64)
TRANSPORTS = {"nccl": 2, "peer_to_peer": 2, "peer_to_peer shared": 3, "shared_memory": 4}
IN_ORDER = ("shared_memory", "peer_to_peer")  # sums have the bits of a sum rank after rank


class OnGpu:
    """A collective whose rows are moved to a GPU before each call, and its results back."""

    def __init__(self, collective: RowCollective) -> None:
        self._inner = collective
        self._device = torch.device("cuda", collective.dp_rank % torch.cuda.device_count())
        torch.cuda.set_device(self._device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def all_gather(self, rows: Tensor, counts: Counts) -> Tensor:
        return self._call(self._inner.all_gather, rows, counts)

    def reduce_scatter(self, rows: Tensor, counts: Counts) -> Tensor:
        return self._call(self._inner.reduce_scatter, rows, counts)

    def _call(self, move: Any, rows: Tensor, counts: Counts) -> Tensor:
        moved = rows.to(self._device)
        out = move(moved, counts)
        kept = moved.clone()
        moved.zero_()  # a caller may reuse its rows in the order of its stream
        assert out.device == self._device
        torch.testing.assert_close(kept.cpu(), rows, rtol=0, atol=0, equal_nan=True)
        return out.cpu()


def on_gpu(c: RowCollective, board: StepBoard, case: Case, *arguments: Any) -> Any:
    """Run a case of tests/collectives with rows on a GPU."""
    return case(OnGpu(c), board, *arguments)


def all_rows_case(c: RowCollective, board: StepBoard, exact: bool) -> None:
    """Even, uneven and zero counts; every type; narrow rows and those of a model."""
    every = patterns(c.dp_size)
    cases.gather_case(c, board, every, (1, 7, 2048), (*FLOATS, torch.int64))
    cases.reduce_scatter_case(c, board, every, (1, 7, 2048), SUM_DTYPES, exact)
    large = ((300,) * c.dp_size, (700,) + (1,) * (c.dp_size - 1))
    cases.gather_case(c, board, large, (2048,), FLOATS)
    cases.reduce_scatter_case(c, board, large, (2048,), FLOATS, exact)
    cases.strided_case(c, board, exact)
    cases.nobody_waits_case(c, board)


def poisoned_case(c: RowCollective, board: StepBoard) -> None:
    """A NaN row stays where it is, and every other row keeps its bits."""
    for counts in ((3,) * c.dp_size, tuple(range(2, c.dp_size + 2))):
        mine = torch.ones(counts[c.dp_rank], 2048, dtype=torch.bfloat16)
        mine[-1] = torch.nan
        got = c.all_gather(mine, counts).split(counts)
        assert all(part[-1].isnan().all() and (part[:-1] == 1).all() for part in got)
        partial = torch.cat([torch.ones(count, 2048, dtype=torch.bfloat16) for count in counts])
        for end in torch.tensor(counts).cumsum(0).tolist():
            partial[end - 1] = torch.nan
        total = c.reduce_scatter(partial, counts)
        assert total[-1].isnan().all()
        assert (total[:-1] == c.dp_size).all()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture(params=list(TRANSPORTS))
def place(request: pytest.FixtureRequest) -> tuple[str, int]:
    """A transport and its number of ranks; more than two share GPUs."""
    size = TRANSPORTS[request.param]
    if size == 2:
        need_two_gpus()
    return request.param.split()[0], size


def need_two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"2 GPUs are needed, {torch.cuda.device_count()} are here")


def test_rows(ranks: Ranks, place: tuple[str, int]) -> None:
    ranks.run(*place, on_gpu, all_rows_case, place[0] in IN_ORDER)


def test_poisoned_rows(ranks: Ranks, place: tuple[str, int]) -> None:
    ranks.run(*place, on_gpu, poisoned_case)


def test_many_mixed_operations(ranks: Ranks, place: tuple[str, int]) -> None:
    ranks.run(*place, on_gpu, cases.mixed_case, 200, place[0] in IN_ORDER)


def test_sums_have_the_same_bits_on_every_run(ranks: Ranks, place: tuple[str, int]) -> None:
    for sums in ranks.run(*place, on_gpu, cases.repeat_case):
        assert all(torch.equal(each, sums[0]) for each in sums)


def test_counts_barrier_and_board(ranks: Ranks, place: tuple[str, int]) -> None:
    ranks.run(*place, cases.all_gather_ints_case)
    ranks.run(*place, boards.exchange_case, 50)
    ranks.run(*place, boards.interleaved_case)
    times = ranks.run(*place, cases.barrier_case, place[1] - 1)
    assert all(left >= max(came for came, _ in times) for _, left in times)


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_replays_follow_the_counts_on_the_device(ranks: Ranks, size: int, poison: bool) -> None:
    if size == 2:
        need_two_gpus()
    sums = ranks.run("peer_to_peer", size, counted_rows.replay_case, poison)
    if size == 2:
        for ours, theirs in zip(sums, ranks.run("nccl", size, counted_rows.padded_case)):
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other, atol=0.06, rtol=0.02)


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize(("transport", "size"), [("peer_to_peer", 2), ("peer_to_peer", 3),
                                                 ("nccl", 2)])  # fmt: skip
def test_a_stage_in_a_graph_has_the_bits_of_an_eager_one(
    ranks: Ranks, transport: str, size: int, poison: bool
) -> None:
    if size == 2:
        need_two_gpus()
    ranks.run(transport, size, counted_rows.stage_case, poison)


NOISE = ("watchdog", "Exception", "Error", "Traceback", "TCPStore", "Warning")


def run_pair(
    transport: str, how: str, where: str, tmp_path: Path, survivors: int
) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of the ranks that end by themselves, rank 0 first."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        tcp = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    address = tcp if how == "orderly" else f"file://{tmp_path / 'store'}"
    if transport == "peer_to_peer":
        address = new_rendezvous_path()
    command = [sys.executable, "-m", "tests.gpu.lost_peer"]
    pair = [
        subprocess.Popen(
            [*command, str(rank), transport, address, how, where],
            cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        ended = []
        for process in pair[:survivors]:
            output, errors = process.communicate(timeout=100)
            ended.append((process.returncode, output, errors))
        return ended
    finally:
        for process in pair:
            process.kill()
            process.wait()


@pytest.mark.parametrize("transport", ["nccl", "peer_to_peer"])
@pytest.mark.parametrize("where", ["gather", "uneven reduce_scatter"])
def test_an_orderly_end_is_silent(tmp_path: Path, where: str, transport: str) -> None:
    need_two_gpus()
    for status, _, errors in run_pair(transport, "orderly", where, tmp_path, survivors=2):
        assert status == 0, errors
        assert not [word for word in NOISE if word in errors], errors


@pytest.mark.parametrize("how", ["killed", "stopped", "aborted"])
@pytest.mark.parametrize("where", ["gather", "uneven gather", "reduce_scatter"])
@pytest.mark.parametrize("transport", ["nccl", "peer_to_peer"])
def test_a_lost_peer_frees_the_survivor(
    tmp_path: Path, transport: str, where: str, how: str
) -> None:
    """The host waits for a kernel that waits for the peer: only an abort ends that."""
    need_two_gpus()
    [(status, output, errors)] = run_pair(transport, how, where, tmp_path, survivors=1)
    assert status == 0, errors
    told = json.loads(output.splitlines()[-1])
    ended = told["ended"]
    if how == "aborted":
        assert (ended["error"], ended["message"]) == (
            "CollectiveAborted", "aborted by rank 0: for a test",
        )  # fmt: skip
        assert ended["seconds"] < lost_peer.TIMEOUT_S
    else:
        assert ended["error"] == "CollectiveTimeout", ended
        assert where.split()[-1] in ended["message"]
        assert ended["seconds"] < lost_peer.TIMEOUT_S + 2
    assert set(told["after"]) == {ended["error"]}
    assert told["closed_s"] < 5
    assert told["alone"]

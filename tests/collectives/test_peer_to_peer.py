"""The peer kernels' rows in the interpreter: ranks one after the other, each in its own tensors.

Flags are raised beforehand, so nobody waits; the sums are right in a second turn, when all ranks
have written. The interpreter does not round to bfloat16 as a GPU does: sums are shown in float16
and float32. On a GPU tests/gpu/test_collectives.py runs the same kernels with real peers.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")
if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU", allow_module_level=True)

import triton.language as tl

from collectives.peer_to_peer.kernels import LINE, gather_kernel, reduce_scatter_kernel

PROGRAMS, COLS, FLAGS, RAISED = 4, 8, LINE.value, 1000
BUCKET, HIDDEN = 4, 20
SUM_OF = {torch.float32: tl.float32, torch.float16: tl.float32, torch.int64: tl.int64}


class Peers:
    """The ranks' buffers and flags, all in this process."""

    def __init__(self, size: int, num_items: int, dtype: torch.dtype) -> None:
        self.size = size
        self.ranks = 1 << (size - 1).bit_length()
        self.buffers = [torch.full((num_items,), 7, dtype=dtype) for _ in range(size)]
        self.flags = [torch.zeros(PROGRAMS, FLAGS, dtype=torch.int32) for _ in range(size)]
        self.heard = [torch.zeros(PROGRAMS, FLAGS, dtype=torch.int32) for _ in range(size)]
        self.stop = torch.zeros(1, dtype=torch.int32)

    def arguments_for(self, rank: int) -> tuple[Tensor | int, ...]:
        """A kernel's arguments from `buffers` to `rank`."""
        for flags in self.flags:
            flags.fill_(RAISED)
        return (
            addresses(self.buffers), addresses(self.flags), self.flags[rank], self.heard[rank],
            self.stop, rank,
        )  # fmt: skip

    def check_flags(self, rank: int, call: int, sent: Sequence[int], comes: Sequence[int]) -> None:
        """Of every rank so many tiles were sent to, or come from: their programs meet, and 0."""
        heard = torch.zeros(PROGRAMS, FLAGS, dtype=torch.int32)
        for peer in range(self.size):
            raised = torch.full((PROGRAMS, FLAGS), RAISED, dtype=torch.int32)
            if peer != rank:
                raised[: max(sent[peer], 1), rank] += 1
                heard[: max(comes[peer], 1), peer] = call
            assert torch.equal(self.flags[peer], raised)
        assert torch.equal(self.heard[rank], heard)


def addresses(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)


def layout_of(starts: Sequence[int], real: Sequence[int]) -> Tensor:
    return torch.tensor([starts, real], dtype=torch.int32)


def bucket_starts(size: int) -> list[int]:
    return [rank * BUCKET for rank in range(size)]


REAL = [(3,), (4, 2), (0, 3), (0, 0), (1, 4, 0)]


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("real", REAL, ids=str)
def test_real_rows_come_to_every_rank_and_nothing_else_moves(
    real: tuple[int, ...], poison: bool
) -> None:
    size = len(real)
    words, width = HIDDEN // 2, 2  # words of two bf16 values
    peers = Peers(size, size * BUCKET * words, torch.int32)
    layout = layout_of(bucket_starts(size), real)
    own = [torch.randn(BUCKET, HIDDEN).bfloat16() for _ in range(size)]
    for rank in range(size):
        gather_kernel[(PROGRAMS,)](
            own[rank].view(-1).view(torch.int32), layout, size * BUCKET, words,
            *peers.arguments_for(rank),
            SIZE=size, RANKS=peers.ranks, COLS=COLS, WIDTH=width, POISON=poison, PDL=False,
        )  # fmt: skip
        tiles = [count * width for count in real]
        peers.check_flags(rank, 1, [tiles[rank]] * size, tiles)
    for buffer in peers.buffers:
        slots = buffer.view(torch.bfloat16).view(size, BUCKET, HIDDEN)
        for rank, count in enumerate(real):
            assert torch.equal(slots[rank, :count], own[rank][:count])
            rest = slots[rank, count:]
            assert rest.isnan().all() if poison else (rest.view(torch.int32) == 7).all()


@pytest.mark.parametrize("real", REAL, ids=str)
def test_packed_rows_have_their_padding_behind_them(real: tuple[int, ...]) -> None:
    size, words = len(real), HIDDEN // 2
    peers = Peers(size, size * BUCKET * words, torch.int32)
    starts = [sum(real[:rank]) for rank in range(size)]
    own = [torch.randn(BUCKET, HIDDEN).bfloat16() for _ in range(size)]
    for rank in range(size):
        gather_kernel[(PROGRAMS,)](
            own[rank].view(-1).view(torch.int32), layout_of(starts, real), size * BUCKET, words,
            *peers.arguments_for(rank),
            SIZE=size, RANKS=peers.ranks, COLS=COLS, WIDTH=2, POISON=True, PDL=False,
        )  # fmt: skip
    for buffer in peers.buffers:
        rows = buffer.view(torch.bfloat16).view(-1, HIDDEN)
        due = torch.cat([mine[:count] for mine, count in zip(own, real)])
        assert torch.equal(rows[: sum(real)], due)
        assert rows[sum(real) :].isnan().all()


@pytest.mark.parametrize("counts", [(2, 0, 5), (0, 0, 3)], ids=str)
def test_rows_one_after_the_other_are_gathered_as_they_are(counts: tuple[int, ...]) -> None:
    """The layout of eager calls; rows of an odd number of bytes."""
    peers = Peers(3, sum(counts) * HIDDEN, torch.uint8)
    starts = [sum(counts[:rank]) for rank in range(3)]
    own = [torch.randint(0, 255, (n, HIDDEN), dtype=torch.uint8) for n in counts]
    for rank in range(3):
        gather_kernel[(PROGRAMS,)](
            own[rank].view(-1), layout_of(starts, counts), sum(counts), HIDDEN,
            *peers.arguments_for(rank),
            SIZE=3, RANKS=4, COLS=COLS, WIDTH=3, POISON=False, PDL=False,
        )  # fmt: skip
    for buffer in peers.buffers:
        assert torch.equal(buffer.view(-1, HIDDEN), torch.cat(own))


def scatter(
    partial: Sequence[Tensor], layout: Tensor, rows_per_rank: int, own_rows: Sequence[int]
) -> list[Tensor]:
    """Every rank's result, of a second call."""
    size, dtype, width = len(partial), partial[0].dtype, 3
    tiles = (layout[1] * width).tolist()
    peers = Peers(size, size * rows_per_rank * HIDDEN, dtype)
    outs = [partial[0].new_full((rows, HIDDEN), 9) for rows in own_rows]
    for call in (1, 2):
        for rank in range(size):
            reduce_scatter_kernel[(PROGRAMS,)](
                partial[rank], outs[rank], layout, own_rows[rank], rows_per_rank, HIDDEN,
                *peers.arguments_for(rank), SIZE=size, RANKS=peers.ranks, COLS=COLS, WIDTH=width,
                SUM=SUM_OF[dtype], PDL=False,
            )  # fmt: skip
            peers.check_flags(rank, call, tiles, [tiles[rank]] * size)
    return outs


def summed(rows: Sequence[Tensor]) -> Tensor:
    """Rank after rank, in float32 for half types."""
    dtype = torch.float32 if rows[0].dtype == torch.float16 else rows[0].dtype
    total = torch.zeros_like(rows[0], dtype=dtype)
    for part in rows:
        total += part.to(dtype)
    return total.to(rows[0].dtype)


@pytest.mark.parametrize("real", REAL, ids=str)
def test_only_real_rows_are_summed_and_null_rows_are_0(real: tuple[int, ...]) -> None:
    """Rows that are not real hold NaN."""
    size, own_rows = len(real), [min(BUCKET, count + 1) for count in real]
    partial = [torch.randn(size, BUCKET, HIDDEN).half() for _ in real]
    for rows in partial:
        for rank, count in enumerate(real):
            rows[rank, count:] = torch.nan
    outs = scatter(partial, layout_of(bucket_starts(size), real), BUCKET, own_rows)
    for rank, (out, count) in enumerate(zip(outs, real)):
        assert torch.equal(out[:count], summed([rows[rank, :count] for rows in partial]))
        assert (out[count:] == 0).all(), "null rows are 0"


@pytest.mark.parametrize("dtype", list(SUM_OF), ids=str)
def test_rows_are_scattered_one_after_the_other(dtype: torch.dtype) -> None:
    """The layout of eager calls."""
    counts, starts = (2, 0, 4), (0, 2, 2)
    rows = [(torch.randn(6, HIDDEN) * 99).to(dtype) for _ in counts]
    outs = scatter(rows, layout_of(starts, counts), 4, counts)
    for out, due in zip(outs, summed(rows).split(counts)):
        assert torch.equal(out, due)


def test_a_wait_ends_once_the_host_says_stop() -> None:
    peers = Peers(2, BUCKET * HIDDEN, torch.int32)
    peers.stop.fill_(1)
    arguments = peers.arguments_for(0)
    peers.flags[0].zero_()  # the peer has not come
    gather_kernel[(PROGRAMS,)](
        torch.zeros(0, dtype=torch.int32), layout_of((0, 0), (0, 0)), BUCKET, HIDDEN, *arguments,
        SIZE=2, RANKS=2, COLS=COLS, WIDTH=3, POISON=False, PDL=False,
    )  # fmt: skip
    assert peers.heard[0].flatten().tolist() == [0, 1] + [0] * (PROGRAMS * FLAGS - 2)


@pytest.mark.timeout(30)
def test_a_peer_that_is_a_call_ahead_is_seen_where_the_count_wraps_around() -> None:
    peers = Peers(2, BUCKET * HIDDEN, torch.int32)
    arguments = peers.arguments_for(0)
    peers.heard[0].fill_(2**31 - 2)
    peers.flags[0].fill_(-(2**31))
    gather_kernel[(PROGRAMS,)](
        torch.zeros(0, dtype=torch.int32), layout_of((0, 0), (0, 0)), BUCKET, HIDDEN, *arguments,
        SIZE=2, RANKS=2, COLS=COLS, WIDTH=3, POISON=False, PDL=False,
    )  # fmt: skip
    assert peers.heard[0][0, 1] == 2**31 - 1

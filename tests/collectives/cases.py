"""What ranks do in the tests of rows; each function runs on every rank of a group."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from dp_runtime.parallel.collective import Counts, RowCollective
from dp_runtime.parallel.step_board import StepBoard


def rows_of(dp_rank: int, count: int, hidden: int, dtype: torch.dtype, seed: int) -> Tensor:
    """The same rows in whichever process they are made."""
    generator = torch.Generator().manual_seed(1000 * seed + dp_rank)
    if dtype == torch.int64:
        return torch.randint(-(2**40), 2**40, (count, hidden), generator=generator)
    return torch.randn(count, hidden, generator=generator).to(dtype)


def check_gather(c: RowCollective, counts: Counts, hidden: int, dtype: torch.dtype) -> None:
    mine = rows_of(c.dp_rank, counts[c.dp_rank], hidden, dtype, 1)
    kept = mine.clone()
    got = c.all_gather(mine, counts)
    mine.zero_()  # a caller may reuse its rows as soon as the call returns
    want = torch.cat([rows_of(r, n, hidden, dtype, 1) for r, n in enumerate(counts)])
    assert got.shape == (sum(counts), hidden)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    mine.copy_(kept)


def check_reduce_scatter(
    c: RowCollective, counts: Counts, hidden: int, dtype: torch.dtype, exact: bool
) -> None:
    partials = [rows_of(r, sum(counts), hidden, dtype, 2) for r in range(c.dp_size)]
    got = c.reduce_scatter(partials[c.dp_rank].clone(), counts)
    half = dtype in (torch.bfloat16, torch.float16)
    total = partials[0].float() if half else partials[0].clone()
    for partial in partials[1:]:
        total = total + partial
    want = total.to(dtype).split(list(counts))[c.dp_rank]
    assert got.shape == (counts[c.dp_rank], hidden)
    assert got.dtype == dtype
    loose = 0.1 if half else 1e-5
    torch.testing.assert_close(got, want, rtol=0, atol=0 if exact else loose)


def all_gather_ints_case(c: RowCollective, board: StepBoard) -> None:
    values = c.all_gather_ints((c.dp_rank, 10 * c.dp_rank, -1))
    assert values == tuple((r, 10 * r, -1) for r in range(c.dp_size))
    assert c.all_gather_ints((2**60 + c.dp_rank,)) == tuple((2**60 + r,) for r in range(c.dp_size))


def gather_case(
    c: RowCollective, board: StepBoard, patterns: Sequence[Counts], hiddens: Sequence[int],
    dtypes: Sequence[torch.dtype],
) -> None:  # fmt: skip
    for counts in patterns:
        for hidden in hiddens:
            for dtype in dtypes:
                check_gather(c, counts, hidden, dtype)


def reduce_scatter_case(
    c: RowCollective, board: StepBoard, patterns: Sequence[Counts], hiddens: Sequence[int],
    dtypes: Sequence[torch.dtype], exact: bool,
) -> None:  # fmt: skip
    for counts in patterns:
        for hidden in hiddens:
            for dtype in dtypes:
                check_reduce_scatter(c, counts, hidden, dtype, exact)


def strided_case(c: RowCollective, board: StepBoard, exact: bool) -> None:
    """Rows that are a transposed view, and rows of more than two dimensions."""
    counts = tuple(range(1, c.dp_size + 1))
    wide = [rows_of(r, 6, counts[r], torch.float32, 3) for r in range(c.dp_size)]
    got = c.all_gather(wide[c.dp_rank].t(), counts)
    assert torch.equal(got, torch.cat([each.t() for each in wide]))
    cube = torch.arange(2 * c.dp_size * 12.0).view(2 * c.dp_size, 3, 4)
    scattered = c.reduce_scatter(cube, (2,) * c.dp_size)
    assert torch.equal(scattered, c.dp_size * cube[2 * c.dp_rank : 2 * c.dp_rank + 2])


def mixed_case(c: RowCollective, board: StepBoard, operations: int, exact: bool) -> float:
    """Many random operations in a row; all ranks draw the same ones."""
    draw = random.Random(7)
    for _ in range(operations):
        top = draw.choice((0, 1, 5, 40))
        counts = tuple(draw.randint(0, top) for _ in range(c.dp_size))
        hidden = draw.choice((1, 7, 64))
        dtype = draw.choice((torch.float32, torch.bfloat16, torch.int64))
        match draw.randrange(4):
            case 0:
                check_gather(c, counts, hidden, dtype)
            case 1:
                check_reduce_scatter(c, counts, hidden, dtype, exact)
            case 2:
                all_gather_ints_case(c, board)
            case _:
                c.barrier()
        c.raise_if_failed()
    return c.waited_s


def repeat_case(c: RowCollective, board: StepBoard) -> list[Tensor]:
    """The same sum several times, with ranks arriving in different orders."""
    partial = rows_of(c.dp_rank, 8 * c.dp_size, 33, torch.float32, 5)
    sums = []
    for turn in range(4):
        time.sleep(0.01 * ((c.dp_rank + turn) % c.dp_size))
        sums.append(c.reduce_scatter(partial, (8,) * c.dp_size))
    return sums


def barrier_case(c: RowCollective, board: StepBoard, late: int) -> tuple[float, float]:
    """When this rank came, and when it left."""
    c.barrier()
    if c.dp_rank == late and c.dp_size > 1:
        time.sleep(0.3)
    came = time.monotonic()
    c.barrier()
    return came, time.monotonic()


def waited_case(c: RowCollective, board: StepBoard, late: int) -> tuple[float, float, float]:
    """When this rank came and left while one was late, and the seconds it counted as waiting."""
    c.barrier()
    before = c.waited_s
    if c.dp_rank == late and c.dp_size > 1:
        time.sleep(0.4)
    came = time.monotonic()
    c.all_gather(torch.ones(2, 3), (2,) * c.dp_size)
    return came, time.monotonic(), c.waited_s - before


def nobody_waits_case(c: RowCollective, board: StepBoard) -> None:
    """Only rank 0 calls: with no rows anywhere nothing moves."""
    if c.dp_rank == 0:
        zero = (0,) * c.dp_size
        assert c.all_gather(torch.empty(0, 5), zero).shape == (0, 5)
        assert c.reduce_scatter(torch.empty(0, 5), zero).shape == (0, 5)
    c.barrier()

"""The same assertions on moving rows, over all implementations."""

from __future__ import annotations

import pytest
import torch

from tests.collectives import cases
from tests.collectives.ranks import KINDS, Ranks

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 4)

pytestmark = [
    pytest.mark.parametrize("kind", KINDS),
    pytest.mark.parametrize("dp_size", SIZES),
]


def patterns(dp_size: int) -> tuple[tuple[int, ...], ...]:
    """Counts: even, uneven, zero on one, on all but one, on all."""
    last = dp_size - 1
    return (
        (3,) * dp_size,
        tuple(range(1, dp_size + 1)),
        (0,) + (2,) * last,
        (0,) * last + (5,),
        (0,) * dp_size,
    )


def is_exact(kind: str) -> bool:
    """Whether sums are promised in rank order, in float32."""
    return kind != "torch_distributed"


def test_counts(ranks: Ranks, kind: str, dp_size: int) -> None:
    ranks.run(kind, dp_size, cases.all_gather_ints_case)


def test_gather(ranks: Ranks, kind: str, dp_size: int) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.int64)
    ranks.run(kind, dp_size, cases.gather_case, patterns(dp_size), (1, 7, 64), dtypes)


def test_reduce_scatter(ranks: Ranks, kind: str, dp_size: int) -> None:
    arguments = (patterns(dp_size), (1, 7, 64), (*FLOATS, torch.int64), is_exact(kind))
    ranks.run(kind, dp_size, cases.reduce_scatter_case, *arguments)


def test_strided_rows_and_more_dimensions(ranks: Ranks, kind: str, dp_size: int) -> None:
    ranks.run(kind, dp_size, cases.strided_case, is_exact(kind))


def test_large_rows(ranks: Ranks, kind: str, dp_size: int) -> None:
    large = ((300,) * dp_size, (700,) + (1,) * (dp_size - 1), (0,) * (dp_size - 1) + (900,))
    ranks.run(kind, dp_size, cases.gather_case, large, (501,), (torch.float32,))
    arguments = (large, (501,), (torch.float32, torch.bfloat16), is_exact(kind))
    ranks.run(kind, dp_size, cases.reduce_scatter_case, *arguments)


def test_many_mixed_operations(ranks: Ranks, kind: str, dp_size: int) -> None:
    operations = 100 if kind == "torch_distributed" else 400
    ranks.run(kind, dp_size, cases.mixed_case, operations, is_exact(kind))


def test_no_rows_anywhere_waits_for_nobody(ranks: Ranks, kind: str, dp_size: int) -> None:
    ranks.run(kind, dp_size, cases.nobody_waits_case)


def test_sums_have_the_same_bits_on_every_run(ranks: Ranks, kind: str, dp_size: int) -> None:
    for sums in ranks.run(kind, dp_size, cases.repeat_case):
        assert all(torch.equal(each, sums[0]) for each in sums)


def test_barrier_holds_everyone_until_the_last(ranks: Ranks, kind: str, dp_size: int) -> None:
    times = ranks.run(kind, dp_size, cases.barrier_case, dp_size - 1)
    last_came = max(came for came, _ in times)
    assert all(left >= last_came for _, left in times)


def test_waited_s_grows_on_the_ranks_that_wait(ranks: Ranks, kind: str, dp_size: int) -> None:
    *others, late = ranks.run(kind, dp_size, cases.waited_case, dp_size - 1)
    for came, left, waited in others:
        assert 0.75 * (late[0] - came) < waited <= left - came
        assert late[2] < waited
    assert late[2] <= late[1] - late[0]

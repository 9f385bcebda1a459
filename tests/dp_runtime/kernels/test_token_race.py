"""The race of tokens in Triton's interpreter, on CPU tensors, against plain torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from dp_runtime.kernels.argmax import BLOCK, BLOCKS_AT_ONCE
from dp_runtime.kernels.token_race import exponential, row_races
from dp_runtime.kernels.token_race import token_bits as kernel_bits
from dp_runtime.sampling.token_race import exponentials, race, token_bits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INF, NAN = float("inf"), float("nan")
KEYS = torch.tensor([0, 1, 2**32, 2**63 - 1, -1, -(2**63), 0x0123456789ABCDEF])


@triton.jit
def _write_noise(keys, bits, times, BLOCK: tl.constexpr):
    row, token = tl.program_id(0), tl.arange(0, BLOCK)
    key = tl.load(keys + row)
    tl.store(bits + row * BLOCK + token, kernel_bits(key, token))
    tl.store(times + row * BLOCK + token, exponential(key, token))


def test_the_noise_has_the_bits_of_plain_torch() -> None:
    size = 16_384
    bits = torch.empty(len(KEYS), size, dtype=torch.int32, device=DEVICE)
    times = torch.empty(len(KEYS), size, dtype=torch.float32, device=DEVICE)
    _write_noise[(len(KEYS),)](KEYS.to(DEVICE), bits, times, BLOCK=size)
    assert torch.equal(bits.cpu(), token_bits(KEYS, size))
    due = exponentials(KEYS, size)
    assert due.min() < 1e-4, "small times are among them"
    torch.testing.assert_close(times.cpu(), due, rtol=2e-6, atol=0)


@pytest.mark.parametrize("size", [1, 130, BLOCK * BLOCKS_AT_ONCE, 2 * BLOCK * BLOCKS_AT_ONCE + 7])
def test_the_same_token_wins_as_in_plain_torch(size: int) -> None:
    torch.manual_seed(6)
    rows = (3 * torch.randn(60, size + 3))[:, :size]  # strided
    rows[1], rows[2], rows[3, size // 2] = -INF, 0.0, NAN
    rows[4, size - 1] = INF
    rows[5, 1:] = -INF
    rows[6, : size - 1] = -INF
    keys = torch.randint(-(2**63), 2**63 - 1, (60,))
    tokens, valid = (found.cpu() for found in row_races(rows.to(DEVICE), keys.to(DEVICE)))
    due, due_valid = race(rows, keys)
    assert torch.equal(valid, due_valid)
    assert valid.tolist()[:7] == [True, False, True, False, False, True, True]
    assert torch.equal(tokens[valid], due[valid])
    assert tokens.dtype == torch.int64
    assert tokens[5:7].tolist() == [0, size - 1]
    assert ((tokens >= 0) & (tokens < size)).all(), "also a NaN's token is looked up later"


def test_no_rows_have_no_winners() -> None:
    tokens, valid = row_races(torch.zeros(0, 50, device=DEVICE), KEYS[:0].to(DEVICE))
    assert (tokens.shape, tokens.dtype, valid.dtype) == ((0,), torch.int64, torch.bool)

"""Attention in shares of keys, in the interpreter on CPU tensors, against plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from dp_runtime.attention.torch_ref import TorchRefBackend
from dp_runtime.kernels.split_attention import split_attention
from dp_runtime.kernels.split_tile import MAX_REQUESTS, SplitTile
from tests.dp_runtime.paged import attend, metadata_of, paged_batch, random_page_table, spec_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAGE, DIM = 32, 32
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3}
LENGTHS = {
    "shorter and longer than a share": (1, 70, 16, 17, 32, 33),
    "one": (130,),
    "fewer blocks than programs": (3, 5),
    "null sequences among others": (4, 4, 64, 5, 4),
}


SLOW = [(8, 2, 1, torch.float32), (8, 2, 4, torch.float32), (3, 3, 2, torch.float32),
        (3, 3, 2, torch.float16)]  # fmt: skip


@pytest.mark.parametrize(
    ("heads", "kv_heads", "query_len", "dtype"),
    [(8, 2, 4, torch.float16), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
@pytest.mark.parametrize("parts", [2, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("lengths", list(LENGTHS.values()), ids=list(LENGTHS))
def test_rows_see_what_they_see_in_plain_torch(
    lengths: tuple[int, ...],
    parts: int,
    heads: int,
    kv_heads: int,
    query_len: int,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(len(lengths))
    lengths = tuple(max(length, query_len) for length in lengths)
    table, num_pages = random_page_table(lengths, PAGE, np.random.default_rng(0))
    batch = paged_batch([(query_len, length) for length in lengths], table, PAGE)
    pool = torch.randn(num_pages, 2, kv_heads, PAGE, DIM).to(dtype)
    rows = batch.num_tokens
    q, k, v = (torch.randn(rows, n, DIM).to(dtype) for n in (heads, kv_heads, kv_heads))
    metadata = metadata_of(batch, num_pages, PAGE)
    wide = pool.float()
    backend = TorchRefBackend(spec_of(wide, heads), [wide])
    due = attend(backend, q.float(), k.float(), v.float(), metadata)
    out = torch.full((rows, heads, DIM), torch.nan, dtype=dtype)
    tensors = [q, wide.to(dtype), metadata.page_table, metadata.seq_lens, out]
    q, pool, page_table, seq_lens, out = (tensor.to(DEVICE) for tensor in tensors)
    run(q, pool, page_table, seq_lens, out, parts)
    error = (out.cpu().float() - due).norm() / due.norm()
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "query_len", [3, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 6, 7, 8))]
)
def test_any_number_of_drafts_is_verified(query_len: int) -> None:
    """Rows of a program are more than a request has, for they are a power of 2."""
    lengths = LENGTHS["shorter and longer than a share"]
    test_rows_see_what_they_see_in_plain_torch(lengths, 2, 8, 2, query_len, torch.float16)


def run(
    q: Tensor, pool: Tensor, page_table: Tensor, seq_lens: Tensor, out: Tensor, parts: int = 1
) -> None:
    tile = SplitTile(block=16, num_stages=2, per_multiprocessor=3, parts=parts)
    split_attention(q, pool, page_table, seq_lens, DIM**-0.5, out, tile)


def test_no_request_is_no_launch_and_too_many_are_refused() -> None:
    q, pool = torch.zeros(0, 4, DIM, device=DEVICE), torch.zeros(2, 2, 2, PAGE, DIM, device=DEVICE)
    table = torch.zeros(0, 1, dtype=torch.int32, device=DEVICE)
    lengths = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    run(q, pool, table, lengths, torch.empty_like(q))
    many = MAX_REQUESTS + 1
    q, table, lengths = q.new_zeros(many, 4, DIM), table.new_zeros(many, 1), lengths.new_ones(many)
    with pytest.raises(AssertionError, match=f"{many} requests, more than {MAX_REQUESTS}"):
        run(q, pool, table, lengths, torch.empty_like(q))

"""Attention in chunks of keys, in the interpreter on CPU tensors, against plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from dp_runtime.attention.torch_ref import TorchRefBackend
from dp_runtime.kernels.split_attention import SplitTile, split_attention
from tests.dp_runtime.paged import attend, metadata_of, paged_batch, random_page_table, spec_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAGE, DIM = 16, 32
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3}
LENGTHS = {
    "shorter and longer than a chunk": (1, 70, 16, 17, 32, 33),
    "one": (130,),
    "null sequences among others": (4, 4, 64, 5, 4),
}


SLOW = [(8, 2, 1, torch.float32), (8, 2, 4, torch.float32), (3, 3, 2, torch.float32),
        (3, 3, 2, torch.float16)]  # fmt: skip


@pytest.mark.parametrize(
    ("heads", "kv_heads", "query_len", "dtype"),
    [(8, 2, 4, torch.float16), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
@pytest.mark.parametrize("lengths", list(LENGTHS.values()), ids=list(LENGTHS))
def test_rows_see_what_they_see_in_plain_torch(
    lengths: tuple[int, ...], heads: int, kv_heads: int, query_len: int, dtype: torch.dtype
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
    longest = max(lengths) + 3 * PAGE  # a graph's bound is more than what there is
    run(q, pool, page_table, seq_lens, longest, out)
    error = (out.cpu().float() - due).norm() / due.norm()
    assert error < TOLERANCE[dtype]


def run(
    q: Tensor, pool: Tensor, page_table: Tensor, seq_lens: Tensor, longest: int, out: Tensor
) -> None:
    tile = SplitTile(chunk=2 * PAGE, num_stages=2, per_multiprocessor=3)
    split_attention(q, pool, page_table, seq_lens, longest, DIM**-0.5, out, tile)


def test_no_request_is_no_launch_and_chunks_are_whole_pages() -> None:
    q, pool = torch.zeros(0, 4, DIM, device=DEVICE), torch.zeros(2, 2, 2, PAGE, DIM, device=DEVICE)
    table = torch.zeros(0, 1, dtype=torch.int32, device=DEVICE)
    lengths = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    run(q, pool, table, lengths, PAGE, torch.empty_like(q))
    with pytest.raises(AssertionError, match="whole pages of 16"):
        split_attention(q, pool, table, lengths, PAGE, 1.0, q, SplitTile(chunk=24))

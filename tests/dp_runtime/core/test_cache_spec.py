"""The caches of layers as they are allocated."""

from __future__ import annotations

import psutil
import pytest
import torch

from dp_runtime.core.attention_metadata import PageGeometry
from dp_runtime.core.cache_spec import PagedKv

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pool_is_zeroed(dtype: torch.dtype) -> None:
    spec = PagedKv(num_kv_heads=2, head_dim=8, page_size=4, dtype=dtype)
    pool = spec.allocate(PageGeometry(3, 4), torch.device("cpu"))
    assert (pool.shape, pool.dtype, pool.nbytes) == ((3, 2, 2, 4, 8), dtype, 3 * spec.page_bytes)
    assert not pool.view(torch.uint8).any()
    pool[1] = 1
    assert pool.float().sum() == pool[0].numel()


def test_pages_take_memory_of_the_host_once_they_are_used() -> None:
    spec, used = PagedKv(8, 128, 64, torch.bfloat16), psutil.Process().memory_info
    num_pages, before = 2**30 // spec.page_bytes, used().rss
    pool = spec.allocate(PageGeometry(num_pages, 64), torch.device("cpu"))
    assert used().rss - before < 2**28
    assert pool.nbytes == 2**30

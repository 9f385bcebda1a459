"""The caches of layers as they are allocated."""

from __future__ import annotations

import psutil
import pytest
import torch

from dp_runtime.core.attention_metadata import PageGeometry
from dp_runtime.core.cache_spec import (
    LayerCaches,
    LayerState,
    PagedKv,
    RecurrentState,
    page_bytes,
    slot_bytes,
)

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


CPU = torch.device("cpu")
STATE = RecurrentState(((2, 3, 3), (5, 3)), (torch.float32, torch.bfloat16))


def test_a_state_is_a_tensor_of_each_shape_with_a_place_per_slot() -> None:
    state = STATE.allocate(4, CPU)
    assert isinstance(state, LayerState)
    matrix, history = state
    assert (matrix.shape, matrix.dtype) == ((4, 2, 3, 3), torch.float32)
    assert (history.shape, history.dtype) == ((4, 5, 3), torch.bfloat16)
    assert not any(tensor.any() for tensor in state)
    assert sum(tensor.nbytes for tensor in state) == 4 * STATE.slot_bytes == 4 * (18 * 4 + 15 * 2)
    matrix[1] = 1
    assert matrix.sum() == matrix[0].numel()


def test_states_take_memory_of_the_host_once_they_are_used() -> None:
    spec, used = RecurrentState(((64, 128, 128),), (torch.float32,)), psutil.Process().memory_info
    before = used().rss
    (tensor,) = spec.allocate(256, CPU)
    assert used().rss - before < 2**28
    assert tensor.nbytes == 2**30


def test_a_model_s_list_says_which_layers_have_pages_and_which_a_state() -> None:
    paged = PagedKv(num_kv_heads=2, head_dim=8, page_size=4, dtype=torch.float32)
    specs = (STATE, STATE, paged)
    caches = LayerCaches.allocate(specs, PageGeometry(3, 4), 5, CPU)
    assert [pool is None for pool in caches.pools] == [True, True, False]
    assert [len(state) for state in caches.states] == [2, 2, 0]
    assert caches.states[0][0].data_ptr() != caches.states[1][0].data_ptr()
    assert (page_bytes(specs), slot_bytes(specs)) == (paged.page_bytes, 2 * STATE.slot_bytes)

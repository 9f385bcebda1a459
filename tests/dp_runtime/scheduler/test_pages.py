"""The page allocator and its integrity check."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dp_runtime.core.attention_metadata import PageGeometry
from dp_runtime.core.cache_spec import PagedKv
from dp_runtime.scheduler.pages import PageAllocator


@given(st.integers(2, 30), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=60))
def test_random_use_never_leaks_or_shares_a_page(
    num_pages: int, todo: list[tuple[int, int]]
) -> None:
    allocator = PageAllocator(num_pages)
    owned: dict[int, list[int]] = {}
    for request_id, count in todo:
        held = owned.setdefault(request_id, [])
        if count == 0:
            allocator.release(request_id, held)
            owned[request_id] = []
        elif count <= allocator.num_free:
            held += allocator.allocate(request_id, count)
        allocator.check(owned)
    assert allocator.num_free + sum(map(len, owned.values())) == num_pages - 1


def test_the_null_page_is_never_given_out() -> None:
    allocator = PageAllocator(5)
    assert sorted(allocator.allocate(1, 4)) == [1, 2, 3, 4]
    with pytest.raises(AssertionError, match="1 pages asked for, 0 free"):
        allocator.allocate(2, 1)


def test_a_page_is_released_once_and_by_its_owner() -> None:
    allocator = PageAllocator(5)
    pages = allocator.allocate(1, 2)
    with pytest.raises(AssertionError, match="owned by 1, not 2"):
        allocator.release(2, pages)
    allocator = PageAllocator(5)
    pages = allocator.allocate(1, 2)
    allocator.release(1, pages)
    with pytest.raises(AssertionError, match="owned by None"):
        allocator.release(1, pages)


def test_the_check_finds_lost_and_shared_pages() -> None:
    allocator = PageAllocator(5)
    pages = allocator.allocate(1, 2)
    with pytest.raises(AssertionError, match="lost"):
        allocator.check({})
    with pytest.raises(AssertionError, match="held twice"):
        allocator.check({1: pages, 2: pages[:1]})
    with pytest.raises(AssertionError, match="not owned by request 2"):
        allocator.check({2: pages})


def test_pools_are_zero_in_hnd_layout() -> None:
    spec = PagedKv(num_kv_heads=2, head_dim=8, page_size=4, dtype=torch.bfloat16)
    pool = spec.allocate(PageGeometry(3, 4), torch.device("cpu"))
    assert pool.shape == (3, 2, 2, 4, 8)
    assert not pool.any()
    assert 3 * spec.page_bytes == pool.nbytes

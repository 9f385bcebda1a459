"""The page allocator, what of it the prefix cache keeps, and its integrity check."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dp_runtime.core.attention_metadata import PageGeometry
from dp_runtime.core.batch import NULL_PAGE
from dp_runtime.core.cache_spec import PagedKv
from dp_runtime.scheduler.pages import PageAllocator


def caching(allocator: PageAllocator, pages: list[int], name: str = "") -> None:
    """Put a sequence's pages into the cache."""
    for at, page in enumerate(pages):
        parent = pages[at - 1] if at else NULL_PAGE
        content = f"{name}{at}".encode()
        assert allocator.cache.insert(page, content, content, parent) == page


@given(
    st.integers(2, 30),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.booleans()), max_size=60),
)
def test_random_use_never_leaks_a_page(num_pages: int, todo: list[tuple[int, int, bool]]) -> None:
    allocator = PageAllocator(num_pages)
    held: dict[int, list[int]] = {}
    for number, (request_id, count, cached) in enumerate(todo):
        pages = held.setdefault(request_id, [])
        if count == 0:
            if cached and not any(page in allocator.cache for page in pages):
                caching(allocator, pages, f"{number} ")
            allocator.release(pages)
            held[request_id] = []
        elif count <= allocator.num_free:
            pages += allocator.allocate(count)
        allocator.check(held.values())
    assert allocator.num_free + sum(map(len, held.values())) == num_pages - 1


def test_the_null_page_is_never_given_out() -> None:
    allocator = PageAllocator(5)
    assert sorted(allocator.allocate(4)) == [1, 2, 3, 4]
    with pytest.raises(AssertionError, match="1 pages asked for, 0 free"):
        allocator.allocate(1)


def test_a_page_is_released_as_often_as_it_is_held() -> None:
    allocator = PageAllocator(5)
    pages = allocator.allocate(2)
    caching(allocator, pages)
    allocator.share(pages)
    allocator.release(pages)
    assert allocator.num_free == 2, "another holds them"
    allocator.release(pages)
    assert (allocator.num_free, allocator.num_evictable(pages)) == (4, 2)
    with pytest.raises(AssertionError, match="is released, and nobody holds it"):
        allocator.release(pages)


def test_only_cached_pages_are_shared() -> None:
    allocator = PageAllocator(5)
    pages = allocator.allocate(1)
    with pytest.raises(AssertionError, match="is not in the cache"):
        allocator.share(pages)


def test_cached_pages_are_given_out_last_held_longest_ago_and_from_their_tail() -> None:
    allocator = PageAllocator(8)
    first, second = allocator.allocate(3), allocator.allocate(2)
    caching(allocator, first, "first ")
    caching(allocator, second, "second ")
    allocator.release(first)
    allocator.release(second)
    assert allocator.num_free == 7
    allocator.share(first[:1])  # a hit, and its end
    allocator.release(first[:1])
    given_out = [page for _ in range(7) for page in allocator.allocate(1)]
    assert given_out[2:] == [first[2], first[1], second[1], second[0], first[0]]
    assert (allocator.num_evictions, len(allocator.cache)) == (5, 0)


def test_pages_come_free_once_all_who_claim_them_are_gone() -> None:
    allocator = PageAllocator(8)
    shared, own = allocator.allocate(2), allocator.allocate(1)
    caching(allocator, shared)
    allocator.share(shared)
    counted = allocator.num_held_only
    assert counted(Counter(shared + own)) == 1
    assert counted(Counter(shared * 2 + own)) == 3


def test_the_check_finds_lost_and_shared_pages() -> None:
    allocator = PageAllocator(5)
    pages = allocator.allocate(2)
    with pytest.raises(AssertionError, match="pages are held"):
        allocator.check([])
    with pytest.raises(AssertionError, match="twice"):
        allocator.check([pages + pages[:1]])
    caching(allocator, pages)
    allocator.share(pages)
    allocator.check([pages, pages])
    allocator.cache.remove(pages[0])
    with pytest.raises(AssertionError, match="are shared and not in the cache"):
        allocator.check([pages, pages])


def test_the_check_finds_a_page_without_the_one_before_it() -> None:
    allocator = PageAllocator(5)
    pages = allocator.allocate(2)
    caching(allocator, pages)
    allocator.cache.remove(pages[0])
    with pytest.raises(AssertionError, match="outlives its parent"):
        allocator.check([pages])


def test_pools_are_zero_in_hnd_layout() -> None:
    spec = PagedKv(num_kv_heads=2, head_dim=8, page_size=4, dtype=torch.bfloat16)
    pool = spec.allocate(PageGeometry(3, 4), torch.device("cpu"))
    assert pool.shape == (3, 2, 2, 4, 8)
    assert not pool.any()
    assert 3 * spec.page_bytes == pool.nbytes

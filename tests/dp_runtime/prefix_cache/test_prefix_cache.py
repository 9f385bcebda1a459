"""A page is found by its digest, its tokens and the page before it, all three."""

from dp_runtime.core.batch import NULL_PAGE
from dp_runtime.prefix_cache.prefix_cache import PrefixCache


def test_a_digest_alone_finds_nothing() -> None:
    cache = PrefixCache()
    assert cache.insert(3, b"digest", b"tokens", NULL_PAGE) == 3
    assert cache.find(b"digest", b"tokens", NULL_PAGE) == 3
    assert cache.find(b"digest", b"others", NULL_PAGE) is None
    assert cache.find(b"digest", b"tokens", 2) is None, "it follows another page"
    assert cache.find(b"other", b"tokens", NULL_PAGE) is None


def test_the_first_page_of_a_content_stays_and_no_other_takes_its_digest() -> None:
    cache = PrefixCache()
    cache.insert(3, b"digest", b"tokens", NULL_PAGE)
    assert cache.insert(4, b"digest", b"tokens", NULL_PAGE) == 3
    assert cache.insert(4, b"digest", b"others", NULL_PAGE) is None
    assert (len(cache), 3 in cache, 4 in cache) == (1, True, False)
    cache.remove(3)
    assert cache.insert(4, b"digest", b"others", NULL_PAGE) == 4

"""Digests of pages: alike for alike prefixes in any process, and different for all else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_runtime.core.request import PromptEmbeds, PromptImage
from dp_runtime.prefix_cache.page_hash import DIGEST_BYTES, PageHasher
from tests.dp_runtime.prompt_images import prompt_image

HASHER = PageHasher(4, "a model")


def tokens_of(*ids: int) -> np.ndarray:
    return np.array(ids, np.int64)


def embeds_at(*positions: int, value: float = 1.0) -> PromptEmbeds:
    values = np.array([[at + value, 2.0] for at in positions], np.float32)
    return PromptEmbeds(tokens_of(*positions), values)


tokens = st.lists(st.integers(0, 2), max_size=20)


@settings(deadline=None, max_examples=200)
@given(tokens, tokens, st.integers(1, 5), st.booleans())
def test_pages_are_alike_exactly_as_far_as_their_tokens_are(
    one: list[int], other: list[int], page_size: int, covers_next: bool
) -> None:
    hasher = PageHasher(page_size, "a model", covers_next)
    left, right = (hasher.digests(tokens_of(*each)) for each in (one, other))
    assert len(left) == max(0, len(one) - covers_next) // page_size
    assert all(len(digest) == DIGEST_BYTES for digest in left)
    for page, (mine, yours) in enumerate(zip(left, right)):
        end = (page + 1) * page_size + covers_next
        assert (mine == yours) == (one[:end] == other[:end])


@settings(deadline=None, max_examples=50)
@given(tokens, st.integers(0, 20), st.booleans())
def test_a_chain_goes_on_from_the_pages_that_are_known(
    ids: list[int], first: int, covers_next: bool
) -> None:
    hasher = PageHasher(4, "a model", covers_next)
    embeds, whole = embeds_at(1, 9), tokens_of(*ids)
    known = hasher.digests(whole[:first], embeds)
    assert hasher.digests(whole, embeds, known=known) == hasher.digests(whole, embeds)
    assert hasher.digests(whole[:first], embeds, known=hasher.digests(whole, embeds)) == known


def test_model_page_size_and_salt_decide_every_page() -> None:
    ids = tokens_of(*range(9))
    all_digests = [
        *HASHER.digests(ids),
        *HASHER.digests(ids, cache_salt="mine"),
        *HASHER.digests(ids, cache_salt="None"),
        *PageHasher(4, "another model").digests(ids),
        *PageHasher(4, "a model", covers_next=True).digests(ids),
        *PageHasher(3, "a model").digests(ids),
    ]
    assert len({*all_digests}) == len(all_digests)


@pytest.mark.parametrize(
    ("embeds", "changed"),
    [
        (embeds_at(2), [True, True]),
        (embeds_at(5), [False, True]),
        (embeds_at(8), [False, False]),
        (embeds_at(5, value=2.0), [False, True]),
    ],
)
def test_an_embedding_names_its_page_and_those_after_it(
    embeds: PromptEmbeds, changed: list[bool]
) -> None:
    ids = tokens_of(*range(9))
    pairs = zip(HASHER.digests(ids), HASHER.digests(ids, embeds), strict=True)
    assert [plain != embedded for plain, embedded in pairs] == changed


def test_embeddings_count_by_value_and_place_in_any_order() -> None:
    ids, embeds = tokens_of(*range(9)), embeds_at(1, 2)
    turned = PromptEmbeds(embeds.positions[::-1], embeds.values[::-1])
    swapped = PromptEmbeds(embeds.positions, embeds.values[::-1])
    assert HASHER.digests(ids, turned) == HASHER.digests(ids, embeds)
    assert HASHER.digests(ids, swapped) != HASHER.digests(ids, embeds)


def test_what_follows_a_page_counts_for_a_draft_model_embeddings_too() -> None:
    """A draft's row of position 3 reads the token, or the embedding, of position 4."""
    hasher, ids = PageHasher(4, "a model", covers_next=True), tokens_of(*range(5))
    (page,) = hasher.digests(ids)
    assert hasher.digests(tokens_of(0, 1, 2, 3, 9)) != [page]
    assert hasher.digests(ids, embeds_at(4)) != [page]
    assert HASHER.digests(ids, embeds_at(4)) == HASHER.digests(ids)


@pytest.mark.parametrize(
    ("image", "changed"),
    [
        (prompt_image(1, 2, 0), [True, True]),
        (prompt_image(2, 2, 3), [True, True]),
        (prompt_image(1, 3, 5), [False, True]),
        (prompt_image(1, 1, 8), [False, False]),
    ],
)
def test_an_image_names_its_pages_and_those_after_them_36(
    image: PromptImage, changed: list[bool]
) -> None:
    ids = tokens_of(*range(9))
    plain, found = HASHER.digests(ids), HASHER.digests(ids, images=[image])
    assert [one != other for one, other in zip(plain, found, strict=True)] == changed
    others = [
        replace(image, digest=b"another"), replace(image, start=image.start + 1),
        prompt_image(image.rows, image.columns, image.start, seed=9),
    ]  # fmt: skip
    for other in others:
        assert (HASHER.digests(ids, images=[other]) != found) == any(changed)


def test_digests_are_the_same_in_every_process_and_version() -> None:
    (_, last) = HASHER.digests(tokens_of(*range(9)), cache_salt="x")
    assert last.hex() == "834fdaa81644aaa0a8a79f609e4d4ca9"

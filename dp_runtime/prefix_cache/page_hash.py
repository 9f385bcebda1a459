"""PageHasher: names the full pages of a sequence by what they hold and all that precedes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from dp_runtime.core.batch import Int64
from dp_runtime.core.request import PromptEmbeds, PromptImage

DIGEST_BYTES = 16


@dataclass(frozen=True)
class PageHasher:
    """A pure function from tokens to digests, the same in every process.

    A digest is that of the one before it and of the page's tokens, and of embeddings and images
    given for them.
    """

    page_size: int
    model: str  # identity of what computes the pages
    covers_next: bool = False  # a draft model keeps what depends on the token after the page, too

    def num_pages(self, num_tokens: int) -> int:
        return max(0, num_tokens - self.covers_next) // self.page_size

    def span(self, page: int) -> tuple[int, int]:
        """Return the positions [start, end) whose tokens a page depends on itself."""
        start = page * self.page_size
        return start, start + self.page_size + self.covers_next

    def digests(
        self,
        tokens: Int64,
        embeds: PromptEmbeds | None = None,
        cache_salt: str | None = None,
        known: Sequence[bytes] = (),
        images: Sequence[PromptImage] = (),
    ) -> list[bytes]:
        """Name the full pages of these tokens; `known` are the digests of the first ones."""
        digests = list(known[: self.num_pages(len(tokens))])
        for content in self.contents(tokens[len(digests) * self.page_size :]):
            self.append(digests, content, embeds, cache_salt, images)
        return digests

    def append(
        self,
        digests: list[bytes],
        content: bytes,
        embeds: PromptEmbeds | None,
        cache_salt: str | None,
        images: Sequence[PromptImage] = (),
    ) -> None:
        parent = digests[-1] if digests else self.root(cache_salt)
        given = self._embeds(embeds, len(digests)) + self._images(images, len(digests))
        digests.append(self.link(parent, content, given))

    def root(self, cache_salt: str | None) -> bytes:
        names = self.model, self.page_size, self.covers_next, cache_salt
        return blake2b(repr(names).encode(), digest_size=DIGEST_BYTES).digest()

    def link(self, parent: bytes, content: bytes, given: bytes) -> bytes:
        return blake2b(parent + content + given, digest_size=DIGEST_BYTES).digest()

    def contents(self, tokens: Int64) -> list[bytes]:
        """Return the token ids that each full page depends on itself, as little-endian int32."""
        ids, size = tokens.astype("<i4").tobytes(), 4 * self.page_size
        width, num_pages = size + 4 * self.covers_next, self.num_pages(len(tokens))
        return [ids[at : at + width] for at in range(0, num_pages * size, size)]

    def _embeds(self, embeds: PromptEmbeds | None, page: int) -> bytes:
        if embeds is None:
            return b""
        (start, end), positions = self.span(page), embeds.positions
        rows = ((positions >= start) & (positions < end)).nonzero()[0]
        rows = rows[np.argsort(positions[rows])]
        within, values = positions[rows] - start, embeds.values[rows]
        return within.astype("<i4").tobytes() + values.astype("<f4").tobytes()

    def _images(self, images: Sequence[PromptImage], page: int) -> bytes:
        start, end = self.span(page)
        if not images:
            return b""
        inside = (image for image in images if image.start < end and image.end > start)
        return b"".join(np.int32(one.start - start).tobytes() + one.digest for one in inside)

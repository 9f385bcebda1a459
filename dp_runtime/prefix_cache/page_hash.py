"""PageHasher: names the full pages of a sequence by what they hold and all that precedes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from dp_runtime.core.batch import Int64
from dp_runtime.core.request import PromptEmbeds

DIGEST_BYTES = 16


@dataclass(frozen=True)
class PageHasher:
    """A pure function from tokens to digests, the same in every process.

    Each digest is that of its page's tokens, of embeddings given for them, and of the digest before
    it; the first follows from the model, the page size and the request's salt.

    covers_next: a draft model computes what it keeps of a position from the token after it too, so
    the page's last position, and with it the page, depends on one token more than the page has.
    """

    page_size: int
    model: str  # identity of what computes the pages
    covers_next: bool = False

    def num_pages(self, num_tokens: int) -> int:
        """Count the pages that so many known tokens name."""
        return max(0, num_tokens - self.covers_next) // self.page_size

    def digests(
        self,
        tokens: Int64,
        embeds: PromptEmbeds | None = None,
        cache_salt: str | None = None,
        known: Sequence[bytes] = (),
    ) -> list[bytes]:
        """Name the full pages of these tokens; `known` are the digests of the first ones."""
        digests = list(known[: self.num_pages(len(tokens))])
        parent = digests[-1] if digests else self.root(cache_salt)
        for page in range(len(digests), self.num_pages(len(tokens))):
            parent = self.link(parent, self.content(tokens, page), self._embeds(embeds, page))
            digests.append(parent)
        return digests

    def root(self, cache_salt: str | None) -> bytes:
        names = self.model, self.page_size, self.covers_next, cache_salt
        return blake2b(repr(names).encode(), digest_size=DIGEST_BYTES).digest()

    def link(self, parent: bytes, content: bytes, embeds: bytes = b"") -> bytes:
        return blake2b(parent + content + embeds, digest_size=DIGEST_BYTES).digest()

    def content(self, tokens: Int64, page: int) -> bytes:
        """Return the token ids that a page depends on itself, as little-endian int32."""
        first = page * self.page_size
        return tokens[first : self._end(page)].astype("<i4").tobytes()

    def _end(self, page: int) -> int:
        return (page + 1) * self.page_size + self.covers_next

    def _embeds(self, embeds: PromptEmbeds | None, page: int) -> bytes:
        if embeds is None:
            return b""
        first, positions = page * self.page_size, embeds.positions
        rows = ((positions >= first) & (positions < self._end(page))).nonzero()[0]
        rows = rows[np.argsort(positions[rows])]
        within, values = positions[rows] - first, embeds.values[rows]
        return within.astype("<i4").tobytes() + values.astype("<f4").tobytes()

"""What a rank's cache of pages must come to: whole prefixes as plain values, least recent first."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence

Prefix = tuple[Hashable, tuple[int, ...]]  # salt, all tokens that a page depends on


class ReferencePrefixes:
    """tokens: a request's salt, the tokens that are known of it, and how many it may reuse.

    What is neither held nor idle is not cached.
    """

    def __init__(
        self,
        page_size: int,
        tokens: Callable[[int], tuple[Hashable, Sequence[int], int]],
        covers_next: bool = False,
    ) -> None:
        self.page_size = page_size
        self.covers_next = covers_next
        self.tokens = tokens
        self.held: set[Prefix] = set()
        self.idle: list[Prefix] = []  # left longest ago first
        self.num_queries = self.num_hits = self.num_evictions = 0

    @property
    def cached(self) -> set[Prefix]:
        return self.held.union(self.idle)

    def named(self, request_id: int) -> list[Prefix]:
        """A request's full pages."""
        salt, tokens, _ = self.tokens(request_id)
        ends = range(self.page_size, len(tokens) + 1 - self.covers_next, self.page_size)
        return [(salt, tuple(tokens[: end + self.covers_next])) for end in ends]

    def usable(self, request_id: int) -> list[Prefix]:
        """Those that it could begin with: they leave a token to compute."""
        _, tokens, reusable = self.tokens(request_id)
        return self.named(request_id)[: min(len(tokens) - 1, reusable) // self.page_size]

    def found(self, request_id: int) -> list[Prefix]:
        """The longest cached beginning of a request that leaves a token to compute."""
        found: list[Prefix] = []
        for prefix in self.usable(request_id):
            if prefix not in self.cached:
                break
            found.append(prefix)
        return found

    def hold(self, prefixes: Collection[Prefix]) -> None:
        self.held.update(prefixes)
        self.idle = [prefix for prefix in self.idle if prefix not in self.held]

    def leave(self, prefixes: Sequence[Prefix]) -> None:
        """Nobody holds these pages of one request any more; it began with the first."""
        self.held.difference_update(prefixes)
        self.idle += reversed(prefixes)

    def shrink_to(self, num_free: int) -> None:
        """No more pages are cached than nobody holds."""
        while len(self.idle) > num_free:
            del self.idle[0]
            self.num_evictions += 1

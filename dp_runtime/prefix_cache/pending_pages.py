"""PendingPages: which pages will enter a prefix cache soon, for they are being computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


class PendingPages:
    """Counts who computes each page, by its digest."""

    def __init__(self) -> None:
        self._by_owner: dict[int, Sequence[bytes]] = {}
        self._num_owners = Counter[bytes]()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._num_owners

    def __bool__(self) -> bool:
        return bool(self._by_owner)

    @property
    def owners(self) -> set[int]:
        return {*self._by_owner}

    def begin(self, owner: int, digests: Sequence[bytes]) -> None:
        assert owner not in self._by_owner, f"row {owner} computes other pages"
        if digests:
            self._by_owner[owner] = digests
            self._num_owners.update(digests)

    def end(self, owner: int) -> None:
        """An owner's pages are in the cache, or will never be."""
        for digest in self._by_owner.pop(owner, ()):
            self._num_owners[digest] -= 1
            if not self._num_owners[digest]:
                del self._num_owners[digest]

"""StateCheckpoints: copies of recurrent states, each behind a page of a prefix cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Checkpoint:
    """A recurrent state at the end of a page, which nobody writes while the page has it."""

    slot: int
    num_accepted: int  # of the drafts behind the state in its slot: those before the page's end


class StateCheckpoints:
    """Slots for the states behind cached pages, one of a page; the one read longest ago goes."""

    def __init__(self, slots: range) -> None:
        self.num_evictions = 0
        self.slots = slots
        self._free = list(reversed(slots))
        self._by_page = OrderedDict[int, Checkpoint]()  # read longest ago first
        self._num_readers: dict[int, int] = {}  # by page
        self._were_read = set[int]()  # pages
        self.on_change: Callable[[int, bool], None] | None = None  # a page; it has a state now

    def __len__(self) -> int:
        return len(self._by_page)

    def __contains__(self, page: int) -> bool:
        return page in self._by_page

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def pages(self) -> list[int]:
        return [*self._by_page]

    def take(self) -> int | None:
        """Take a slot to write a state into; None if all are written or read."""
        if not self._free:
            unread = (page for page in self._by_page if page not in self._num_readers)
            page = next(unread, None)
            if page is None:
                return None
            self.drop(page)
            self.num_evictions += 1
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        assert slot in self.slots, f"slot {slot} is none of {self.slots}"
        self._free.append(slot)

    def attach(self, page: int, checkpoint: Checkpoint) -> None:
        """Keep a state behind a page; one that is there already is as good."""
        if page in self._by_page:
            self.give_back(checkpoint.slot)
        else:
            self._by_page[page] = checkpoint
            if self.on_change is not None:
                self.on_change(page, True)
        self._by_page.move_to_end(page)

    def find(self, page: int) -> Checkpoint:
        return self._by_page[page]

    def lock(self, page: int) -> None:
        """Keep a state that a step reads where it is, until `unlock`."""
        self._num_readers[page] = self._num_readers.get(page, 0) + 1
        self._were_read.add(page)
        self._by_page.move_to_end(page)

    def unlock(self, page: int) -> None:
        self._num_readers[page] -= 1
        if not self._num_readers[page]:
            del self._num_readers[page]

    def demote(self, page: int) -> None:
        """Have a state that nobody has read given up before all others."""
        if page in self._by_page and page not in self._were_read:
            self._by_page.move_to_end(page, last=False)

    def drop(self, page: int) -> None:
        """Give up the state behind a page, if there is one: the page leaves the cache, say."""
        assert page not in self._num_readers, f"the state behind page {page} is being read"
        self._were_read.discard(page)
        checkpoint = self._by_page.pop(page, None)
        if checkpoint is not None:
            self.give_back(checkpoint.slot)
            if self.on_change is not None:
                self.on_change(page, False)

    def drop_slots(self, slots: Collection[int]) -> None:
        """Give up the states in these slots, which nobody reads."""
        pages = [page for page, kept in self._by_page.items() if kept.slot in slots]
        for page in pages:
            self.drop(page)

    def check(self, taken: Iterable[int]) -> None:
        """Assert that every slot is free, behind a page, or taken as these are."""
        kept = [checkpoint.slot for checkpoint in self._by_page.values()]
        every = sorted([*self._free, *kept, *taken])
        assert every == [*self.slots], f"of slots {self.slots} there are {every}"
        lost = [page for page in self._num_readers if page not in self._by_page]
        assert not lost, f"states behind pages {lost} are gone while they are read"

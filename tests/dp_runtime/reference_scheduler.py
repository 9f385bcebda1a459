"""The scheduler's policy, one request after the other: what its arrays must come to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from dp_runtime.core.attention_metadata import PageGeometry
from dp_runtime.scheduler.limits import Limits
from tests.dp_runtime.reference_prefixes import Prefix, ReferencePrefixes

Rows = list[tuple[int, int, int]]  # request id, [start, end) of its tokens


@dataclass(eq=False)
class Request:
    """One request; tokens are counted, those of steps in flight as if all drafts were right."""

    request_id: int
    prompt: int
    max_tokens: int  # prompt and outputs
    known: int
    priority: int = 0
    preempted: bool = False  # ever
    computed: int = 0
    pages: int = 0
    launched: int = 0
    running: bool = False
    ended: bool = False
    committed: int = 0  # tokens that committed steps have put into the cache
    prefixes: list[Prefix] = field(default_factory=list)  # of its first pages, which it shares
    coming: list[Prefix] = field(default_factory=list)  # and of those that its prefill shares
    prompt_end: int = 0  # where that ends: outputs of a request that begins again are in it

    @property
    def needed(self) -> int:
        return self.known - self.computed if self.known < self.max_tokens else 0

    @property
    def prefilling(self) -> bool:
        return self.needed > 1 or self.computed < self.prompt


class ReferenceScheduler:
    """Chooses rows as Scheduler says it does; holds page counts instead of pages."""

    def __init__(
        self, pages: PageGeometry, limits: Limits, prefixes: ReferencePrefixes | None = None
    ) -> None:
        self.page_size = pages.page_size
        self.limits = limits
        self.num_pages = pages.num_pages - 1
        self.prefixes = prefixes
        self.requests: dict[int, Request] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.leaving: list[Request] = []

    def add(self, request_id: int, prompt: int, outputs: int, priority: int = 0) -> None:
        max_tokens = min(prompt + outputs, self.limits.max_model_len)
        new = self.requests[request_id] = Request(request_id, prompt, max_tokens, prompt, priority)
        before = [other for other in self.waiting if other.preempted or other.priority <= priority]
        self.waiting.insert(len(before), new)
        assert self.waiting[: len(before)] == before

    @property
    def num_held(self) -> int:
        """Requests that run, or stopped while a step with them is in flight."""
        return sum(item.running or item.launched > 0 for item in self.requests.values())

    @property
    def num_free(self) -> int:
        """Pages that nobody holds, those of the cache included; a shared one counts once."""
        return self.num_pages - self.num_held_by(self.requests.values())

    def num_held_by(self, items: Iterable[Request]) -> int:
        items = list(items)
        own = sum(item.pages - len(item.prefixes) for item in items)
        return own + len({prefix for item in items for prefix in item.prefixes})

    def abandon(self, known: dict[int, int]) -> None:
        """Forget the steps in flight, and who was in one computes all of its known tokens again."""
        for item in self.requests.values():
            if item.launched:
                item.computed, item.launched, item.known = 0, 0, known[item.request_id]
        self.settle()

    def abandon_plain(self, known: dict[int, int], rows: Sequence[int]) -> None:
        """Forget the steps in flight, and go on where committed ones ended.

        rows: requests in the order of theirs. With drafts two tokens are fed again, and where these
        begin in a shared page all of that page.
        """
        num_again = 2 if self.limits.max_drafts else 1
        for request_id in rows:
            item = self.requests[request_id]
            if item.running or item.launched:
                item.known = known[request_id]
                cached = max(0, min(item.committed, item.known - num_again))
                first = cached // self.page_size
                if first < len(item.prefixes):
                    left, item.prefixes = item.prefixes[first:], item.prefixes[:first]
                    item.pages, cached = first, first * self.page_size
                    self.let_go(left)
                item.computed = item.committed = cached
                item.launched = 0
        self.settle()

    def schedule(self, prefill_budget: int | None = None, num_drafts: int = 0) -> Rows:
        """Choose a step's rows; num_drafts: of every decode."""
        running, query_len = list(self.running), 1 + num_drafts
        ready = [item for item in running if item.running and self.reserve(item, query_len)]
        budget = self.limits.max_num_tokens
        rows: Rows = []
        admitting = len(ready) == len(self.running)
        decodes = [item for item in ready if item.needed and not item.prefilling]
        chunks = [item for item in ready if item.prefilling]
        for item in decodes:
            budget -= self.launch(item, budget, rows, query_len)
        budget = budget if prefill_budget is None else min(budget, prefill_budget)
        for item in chunks:
            budget -= self.launch(item, budget, rows)
        passed = 0
        for item in [*self.waiting] if admitting else []:
            if (
                not budget
                or len(self.running) + passed >= self.limits.max_num_requests
                or self.num_held >= self.limits.num_table_rows
                or item.launched
            ):
                break
            if self.awaits(item):
                passed += 1
                continue
            if not self.fits(item):
                break
            self.waiting.remove(item)
            item.running = True
            self.running.append(item)
            self.begin(item)
            due = item.computed + min(item.needed, budget)
            self.grow(item, self.pages_for(due) - item.pages)
            budget -= self.launch(item, budget, rows)
        return rows

    def found(self, item: Request) -> list[Prefix]:
        return [] if self.prefixes is None else self.prefixes.found(item.request_id)

    def awaits(self, item: Request) -> bool:
        """Whether it lacks a page that is coming, with so many as pay beside it, there or not."""
        if self.prefixes is None:
            return False
        coming = {prefix for other in self.requests.values() for prefix in other.coming}
        usable, first = self.prefixes.usable(item.request_id), len(self.found(item))
        count = -(-self.limits.min_awaited_tokens // self.page_size)
        around = coming.intersection(usable[max(0, first + 1 - count) : first + count])
        return not coming.isdisjoint(usable[first : first + 1]) and len(around) >= count

    def fits(self, item: Request) -> bool:
        found = self.found(item)
        held = {prefix for other in self.requests.values() for prefix in other.prefixes}
        new = self.pages_for(item.known + 1) - len(held.intersection(found))
        return new <= self.num_free

    def begin(self, item: Request) -> None:
        item.prefixes = self.found(item)
        item.pages = len(item.prefixes)
        item.computed = item.committed = item.pages * self.page_size
        item.prompt_end = item.known
        if self.prefixes is not None:
            self.prefixes.hold(item.prefixes)
            item.coming = self.prefixes.named(item.request_id)[item.pages :]
            if not item.preempted:
                self.prefixes.num_queries += item.known
                self.prefixes.num_hits += item.computed

    def commit(
        self, rows: Rows, ended: Iterable[int], rejected: Mapping[int, int] = MappingProxyType({})
    ) -> None:
        """A launched step is done, and with it the requests that it brought to their end.

        rejected: drafts of each request that were wrong, which are in nothing that it has.
        """
        for request_id, start, end in rows:
            item, lost = self.requests[request_id], rejected.get(request_id, 0)
            item.launched -= 1
            item.known -= lost
            item.computed -= lost
            item.committed += end - start - lost
            if end >= item.prompt_end:
                item.coming = []
            if request_id in ended:
                self.leave(item)
        for request_id, _, _ in rows:
            self.cache(self.requests[request_id])
        self.settle()

    def cache(self, item: Request) -> None:
        """Share the full pages that committed steps have written."""
        if self.prefixes is not None:
            full = self.prefixes.named(item.request_id)[: item.committed // self.page_size]
            self.prefixes.hold(full[len(item.prefixes) :])
            item.prefixes = full

    def end(self, request_id: int) -> None:
        self.leave(self.requests[request_id])
        self.settle()

    def leave(self, item: Request) -> None:
        if not item.ended:
            (self.running if item.running else self.waiting).remove(item)
            item.ended, item.running = True, False
            if item not in self.leaving:
                self.leaving.append(item)

    def launch(self, item: Request, budget: int, rows: Rows, query_len: int = 0) -> int:
        """query_len: of a decode, that is its last token and drafts behind it; 0: a chunk."""
        length = min(query_len or item.needed, budget)
        if length:
            start, item.computed = item.computed, item.computed + length
            item.launched += 1
            if query_len or item.computed == item.known:  # each of these rows yields another
                item.known += query_len or 1
            rows.append((item.request_id, start, item.computed))
        return length

    def reserve(self, item: Request, query_len: int) -> bool:
        decodes = item.needed and not item.prefilling
        due = item.computed + min(item.needed, self.limits.max_num_tokens)
        due = item.computed + query_len if decodes else due
        missing = max(0, self.pages_for(due) - item.pages)
        leaving: list[Request] = []
        while self.num_free + self.num_coming(leaving) < missing:
            victim = self.running[-1]
            if victim is item:
                return False
            self.running.pop()
            self.waiting.insert(0, victim)
            victim.running, victim.computed, victim.preempted = False, 0, True
            leaving += [victim] if victim.launched else []
            self.leaving.append(victim)
            self.settle()
        if missing > self.num_free:
            return False
        self.grow(item, missing)
        return True

    def num_coming(self, leaving: list[Request]) -> int:
        others = [item for item in self.requests.values() if item not in leaving]
        return self.num_held_by(self.requests.values()) - self.num_held_by(others)

    def grow(self, item: Request, count: int) -> None:
        item.pages += count
        if self.prefixes is not None:
            self.prefixes.shrink_to(self.num_free)

    def settle(self) -> None:
        """Take the pages of those that stopped running, in that order, once no step has them."""
        for item in self.leaving[:]:
            if not item.launched:
                self.leaving.remove(item)
                left, item.prefixes, item.coming, item.pages = item.prefixes, [], [], 0
                self.let_go(left)

    def let_go(self, left: Sequence[Prefix]) -> None:
        """One request has left these; those that nobody else holds are idle."""
        if self.prefixes is not None:
            held = {prefix for each in self.requests.values() for prefix in each.prefixes}
            self.prefixes.leave([prefix for prefix in left if prefix not in held])

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

"""The scheduler's policy, one request after the other: what its arrays must come to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dp_runtime.core.attention_metadata import PageGeometry
from dp_runtime.scheduler.limits import Limits

Rows = list[tuple[int, int, int]]  # request id, [start, end) of its tokens


@dataclass(eq=False)
class Request:
    """One request; tokens are only counted."""

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

    @property
    def needed(self) -> int:
        return self.known - self.computed if self.known < self.max_tokens else 0

    @property
    def prefilling(self) -> bool:
        return self.needed > 1 or self.computed < self.prompt


class ReferenceScheduler:
    """Chooses rows as Scheduler says it does; holds page counts instead of pages."""

    def __init__(self, pages: PageGeometry, limits: Limits) -> None:
        self.page_size = pages.page_size
        self.limits = limits
        self.num_free = pages.num_pages - 1
        self.requests: dict[int, Request] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []

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

    def abandon(self, known: dict[int, int]) -> None:
        """Forget the steps in flight, and who was in one computes all of its known tokens again."""
        for item in self.requests.values():
            if item.launched:
                item.computed, item.launched, item.known = 0, 0, known[item.request_id]
                self.settle(item)

    def schedule(self, prefill_budget: int | None = None) -> Rows:
        ready = [item for item in list(self.running) if item.running and self.reserve(item)]
        budget = self.limits.max_num_tokens
        rows: Rows = []
        admitting = len(ready) == len(self.running)
        for item in ready:
            budget -= 0 if item.prefilling else self.launch(item, budget, rows)
        budget = budget if prefill_budget is None else min(budget, prefill_budget)
        for item in [item for item in ready if item.prefilling]:
            budget -= self.launch(item, budget, rows)
        while (
            admitting
            and self.waiting
            and budget
            and len(self.running) < self.limits.max_num_requests
            and self.num_held < self.limits.num_table_rows
            and not self.waiting[0].launched
            and self.pages_for(self.waiting[0].known + 1) <= self.num_free
        ):
            item = self.waiting.pop(0)
            item.running = True
            self.running.append(item)
            self.grow(item, self.pages_for(min(item.needed, budget)))
            budget -= self.launch(item, budget, rows)
        return rows

    def commit(self, rows: Rows, ended: Iterable[int]) -> None:
        """A launched step is done, and with it the requests that it brought to their end."""
        for request_id, _, _ in rows:
            item = self.requests[request_id]
            item.launched -= 1
            if request_id in ended:
                self.end(request_id)
            self.settle(item)

    def end(self, request_id: int) -> None:
        item = self.requests[request_id]
        if not item.ended:
            (self.running if item.running else self.waiting).remove(item)
            item.ended, item.running = True, False
            self.settle(item)

    def launch(self, item: Request, budget: int, rows: Rows) -> int:
        length = min(item.needed, budget)
        if length:
            start, item.computed = item.computed, item.computed + length
            item.launched += 1
            item.known += item.computed == item.known  # the last known token yields another
            rows.append((item.request_id, start, item.computed))
        return length

    def reserve(self, item: Request) -> bool:
        due = item.computed + min(item.needed, self.limits.max_num_tokens)
        missing = max(0, self.pages_for(due) - item.pages)
        coming = 0
        while self.num_free + coming < missing:
            victim = self.running[-1]
            if victim is item:
                return False
            self.running.pop()
            self.waiting.insert(0, victim)
            victim.running, victim.computed, victim.preempted = False, 0, True
            coming += victim.pages if victim.launched else 0
            self.settle(victim)
        if missing > self.num_free:
            return False
        self.grow(item, missing)
        return True

    def grow(self, item: Request, count: int) -> None:
        self.num_free -= count
        item.pages += count

    def settle(self, item: Request) -> None:
        if not item.running and not item.launched:
            self.num_free += item.pages
            item.pages = 0

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

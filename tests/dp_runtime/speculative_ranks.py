"""Ranks as threads that serve a script of arrivals and aborts, and note every verification."""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from collectives.in_process import InProcessGroup
from dp_runtime.config import EngineConfig
from dp_runtime.core.attention_metadata import PageGeometry
from dp_runtime.core.request import RankRequest, RequestUpdate
from dp_runtime.parallel.agreement import ProgramPolicy, keep_program
from dp_runtime.runner.drafting import DraftChains
from dp_runtime.runner.step_loop import Inbox, StepLoop
from dp_runtime.runner.step_tracing import InflightStep
from dp_runtime.sampling.draft_verification import Verification
from dp_runtime.startup.build_rank import assemble, load_rank, new_flight
from dp_runtime.startup.rank_plan import plan_rank
from dp_runtime.startup.served_requests import ServedRequests

TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Verified:
    """One verification of a request: what was drafted after its known tokens, and accepted."""

    num_known: int
    drafts: tuple[int, ...]
    num_accepted: int


class Watch:
    """Notes every verification of a loop, request by request, in the order of the commits."""

    def __init__(
        self, loop: StepLoop, verified: defaultdict[int, list[Verified]] | None = None
    ) -> None:
        self.verified = defaultdict(list) if verified is None else verified
        self._launched: deque[Tensor] = deque()  # drafts of the steps that are not committed
        self._scheduler = loop.scheduler
        drafting = loop.runner.drafting
        assert drafting is not None, "only ranks that draft are watched"
        self._verification, self._commit = drafting.verification, loop.commit
        drafting.verification = self.verification  # type: ignore[method-assign]
        loop.commit = self.commit  # type: ignore[method-assign]

    def verification(self, chains: DraftChains) -> Verification:
        self._launched.append(chains.drafts)
        return self._verification(chains)

    def commit(self, step: InflightStep) -> list[RequestUpdate]:
        decoding = [self._scheduler.table.request(row) for row in step.scheduled.decodes.tolist()]
        known = [None if live.finish_reason else live.num_tokens for live in decoding]
        drafts = self._launched.popleft().tolist()
        accepted = step.output.sampled.to_host().num_accepted
        updates = self._commit(step)
        for live, count, chain, taken in zip(decoding, known, drafts, accepted, strict=True):
            if count is not None:
                self.verified[live.request_id].append(Verified(count, tuple(chain), taken))
        return updates


@dataclass(frozen=True)
class Event:
    """What happens to a request on its rank before a step: it arrives, or is aborted."""

    step: int
    dp_rank: int
    request: RankRequest
    abort: bool = False


@dataclass
class Served:
    """What became of the requests of a script, all ranks together."""

    outputs: dict[int, tuple[int, ...]] = field(default_factory=dict)
    verified: dict[int, list[Verified]] = field(default_factory=dict)
    preemptions: int = 0
    epochs: int = 0

    @property
    def begins_again(self) -> bool:
        """Whether requests may have got a token from a chunk that had outputs already."""
        return self.preemptions > 0 or self.epochs > 1


class ScriptedRank:
    """A rank's loop with its part of a script; `take` is called once a step, in step."""

    def __init__(self, requests: ServedRequests, events: Sequence[Event]) -> None:
        self.requests = requests
        self.verified: defaultdict[int, list[Verified]] = defaultdict(list)
        self.outputs: dict[int, tuple[int, ...]] = {}
        self._events = deque(sorted(events, key=lambda event: event.step))
        self._unfinished = {event.request.request_id for event in events}
        self._step = 0

    def join(self, loop: StepLoop) -> None:
        """Serve with this loop, which has the requests, from now on."""
        self.loop = loop
        self.watch = Watch(loop, self.verified)

    @property
    def done(self) -> bool:
        """Seen by other ranks' threads at any moment; true once, it stays so."""
        return not (self._unfinished or self._events or self.requests.scheduler.has_work)

    def take(self, stop: bool) -> Inbox:
        self.loop.scheduler.check()
        due = []
        while self._events and self._events[0].step <= self._step:
            due.append(self._events.popleft())
        self._step += 1
        if self._events:
            self._wake()  # steps count on while all ranks are idle
        add = [event.request for event in due if not event.abort]
        abort = [event.request.request_id for event in due if event.abort]
        return Inbox(add, abort, stop=stop)

    def deliver(self, items: list[RequestUpdate]) -> None:
        for item in items:
            before = self.outputs.get(item.request_id, ())
            assert item.first_index == len(before), "progress goes on where the last one ended"
            self.outputs[item.request_id] = before + item.token_ids
            if item.finish_reason:
                self._unfinished.remove(item.request_id)
        self._wake()  # this may have been the last

    def _wake(self) -> None:
        self.loop.coordinator.board.wake()


class SpeculativeRanks:
    """The ranks of one size, loaded once for many scripts.

    fields: of their EngineConfig, with the most steps, pages, requests and tokens of any script.
    """

    def __init__(self, model: Path, dp_size: int, **fields: Any) -> None:
        self.config = EngineConfig(str(model), dp_size=dp_size, launcher="thread", **fields)
        self._plans = [plan_rank(self.config, rank, "cpu") for rank in range(dp_size)]
        self._loaded = [load_rank(self.config, plan, lambda count: None) for plan in self._plans]

    def serve(
        self,
        script: Sequence[Event],
        num_steps: int,
        *,
        num_pages: int | None = None,
        num_requests: int | None = None,
        num_tokens: int | None = None,
        policy: ProgramPolicy = keep_program,
        faults: Sequence[Fault] = (),
        **fields: Any,
    ) -> Served:
        """Run a script to its end; the caches hold what the scripts before it left.

        Each fault ends an epoch, and the next begins with what was committed.
        """
        requests = num_requests or self.config.max_num_requests
        tokens = num_tokens or self.config.max_num_tokens
        config = replace(
            self.config, speculative_num_steps=num_steps, max_num_requests=requests,
            max_num_tokens=tokens, **fields,
        )  # fmt: skip
        ranks, parts = [], []
        for rank, (plan, loaded) in enumerate(zip(self._plans, self._loaded)):
            limits = replace(
                plan.limits, max_num_requests=requests, max_num_tokens=tokens, max_drafts=num_steps
            )
            pages = PageGeometry(num_pages or plan.pages.num_pages, plan.pages.page_size)
            part = replace(plan, limits=limits, pages=pages, depth=config.depth)
            parts.append(part)
            own = ServedRequests.none(part, loaded)
            ranks.append(ScriptedRank(own, [one for one in script if one.dp_rank == rank]))
        served = Served()
        for epoch, fault in enumerate((*faults, None)):
            group = InProcessGroup(config.dp_size, TIMEOUT_S)
            for rank, (one, part, loaded) in enumerate(zip(ranks, parts, self._loaded)):
                board, rows = group.board(rank), group.collective(rank)
                flight = new_flight(config, part)
                loop = assemble(config, part, loaded, board, rows, flight, epoch, one.requests)
                loop.coordinator.policy = policy
                one.join(loop)
            if fault is not None:
                fault.arm(ranks[fault.dp_rank % len(ranks)].loop)
            served.epochs += 1
            if _run(ranks):
                break
            for one in ranks:
                one.requests.abandon_steps()
        for one in ranks:
            served.outputs |= one.outputs
            served.verified |= one.verified
            served.preemptions += one.loop.scheduler.num_preemptions
            assert one.loop.scheduler.num_free_pages == one.loop.scheduler.pages.num_pages - 1
        return served


@dataclass(frozen=True)
class Fault:
    """A rank fails as it enters its collective number `call`, or posts so many records."""

    dp_rank: int
    call: int
    of_board: bool = False

    def arm(self, loop: StepLoop) -> None:
        coordinator = loop.coordinator
        board: Any = coordinator.board
        collective: Any = coordinator.collective
        owner, name = (board, "all_gather_records") if self.of_board else (collective, "all_gather")
        calls, original = itertools.count(), getattr(owner, name)

        def fail_at(*arguments: Any) -> Any:
            if next(calls) == self.call:
                raise RuntimeError("the fault of a test")
            return original(*arguments)

        setattr(owner, name, fail_at)


def _run(ranks: Sequence[ScriptedRank]) -> bool:
    """Return False if a fault has ended the epoch; no rank steps any more."""

    def taker(rank: ScriptedRank) -> Callable[[], Inbox]:
        return lambda: rank.take(stop=all(other.done for other in ranks))

    with ThreadPoolExecutor(len(ranks)) as pool:
        runs = [pool.submit(rank.loop.run, taker(rank), rank.deliver) for rank in ranks]
        wait(runs, TIMEOUT_S)
    errors = [error for run in runs if (error := run.exception()) is not None]
    if any("the fault of a test" not in str(error) for error in errors):
        raise errors[0]
    return not errors

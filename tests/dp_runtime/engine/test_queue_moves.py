"""Requests that wait on one rank go to another: no token is lost or doubled, whatever races."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from unittest.mock import Mock, patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_runtime import Engine, EngineConfig, RequestHandle, SamplingParams
from dp_runtime.core.membership import Membership, Transition
from dp_runtime.core.rank_events.rank_load import RankLoad
from dp_runtime.core.request import FinishReason, RankRequest, RequestUpdate
from dp_runtime.engine.routing.admission import Admission
from dp_runtime.engine.routing.load_balancer import Demand, RoundRobin
from dp_runtime.engine.routing.queue_moves import Move, RankLimits
from dp_runtime.engine.routing.relocation import MAX_REPLAYS
from dp_runtime.errors import RequestFailed
from tests.dp_runtime.engine.fake_group import FakeGroup, outstanding

ROWS, PAGES = 2, 20
IDLE, FULL = RankLoad(0, 0, PAGES), RankLoad(ROWS, 1, PAGES)


class FakeRank:
    """A rank's queue: what it is told happens in order, and only when it works."""

    def __init__(self) -> None:
        self.mail: deque[tuple[str, object]] = deque()
        self.waiting: dict[int, RankRequest] = {}
        self.running: dict[int, list[int]] = {}  # request id: its tokens
        self.wanted: dict[int, int] = {}
        self.outbox: list[RequestUpdate] = []

    @property
    def load(self) -> RankLoad:
        num_waiting = len(self.waiting) + sum(kind == "submit" for kind, _ in self.mail)
        return RankLoad(len(self.running), num_waiting, PAGES - len(self.running))

    def read(self) -> None:
        """Do the first thing that it was told."""
        kind, content = self.mail.popleft()
        match kind, content:
            case "submit", RankRequest() as request:
                assert request.request_id not in {*self.waiting, *self.running}
                self.waiting[request.request_id] = request
            case "abort", int(request_id):
                tokens = self.running.pop(request_id, None)
                waited = self.waiting.pop(request_id, None)
                if tokens is not None or waited is not None:
                    count = len(tokens or (waited.outputs if waited else ()))
                    reason = FinishReason.ABORT
                    self.outbox.append(RequestUpdate(request_id, count, finish_reason=reason))
            case "recall", int(request_id):
                given_back = self.waiting.pop(request_id, None) is not None
                self.outbox.append(RequestUpdate(request_id, 0, given_back=given_back))

    def begin(self) -> None:
        if self.waiting and len(self.running) < ROWS:
            request_id = next(iter(self.waiting))
            request = self.waiting.pop(request_id)
            self.running[request_id] = [*request.outputs]
            self.wanted[request_id] = request.params.known_max_tokens

    def step(self, number: int) -> None:
        if not self.running:
            return
        request_id = sorted(self.running)[number % len(self.running)]
        tokens = self.running[request_id]
        index = len(tokens)
        tokens.append(index)  # so outputs tell if one is lost or doubled
        last = len(tokens) == self.wanted[request_id]
        reason = FinishReason.LENGTH if last else None
        self.outbox.append(RequestUpdate(request_id, index, (index,), finish_reason=reason))
        if last:
            del self.running[request_id]


class QueueingGroup(FakeGroup):
    def __init__(self, dp_size: int) -> None:
        super().__init__(dp_size)
        self.ranks = {rank: FakeRank() for rank in range(dp_size)}

    def submit(self, dp_rank: int, requests: Sequence[RankRequest]) -> None:
        self.ranks[dp_rank].mail += [("submit", request) for request in requests]

    def abort(self, dp_rank: int, request_ids: Sequence[int]) -> None:
        self.ranks[dp_rank].mail += [("abort", request_id) for request_id in request_ids]

    def recall(self, dp_rank: int, request_ids: Sequence[int]) -> None:
        self.ranks[dp_rank].mail += [("recall", request_id) for request_id in request_ids]

    def poll(self, dp_rank: int) -> None:
        rank = self.ranks[dp_rank]
        told, rank.outbox = rank.outbox, []
        self.on_progress(dp_rank, told)
        self.on_load(dp_rank, rank.load)

    def lose(self, dp_rank: int, comes_back: bool) -> None:
        """Another takes the rank's place, or the others go on without it."""
        del self.ranks[dp_rank]
        if comes_back or not self.ranks:
            self.ranks[dp_rank] = FakeRank()
        self.members = Membership(tuple(sorted(self.ranks)))

        def resume(again: dict[int, list[RankRequest]]) -> None:
            for rank, requests in again.items():
                self.submit(rank, requests)

        self.on_transition(Transition(self.members, frozenset({dp_rank}), frozenset()), resume)


class Story:
    """Callers and ranks that act in any order."""

    def __init__(self, engine: Engine, group: QueueingGroup) -> None:
        self.engine, self.group = engine, group
        self.handles: dict[int, tuple[RequestHandle, int]] = {}  # and its max_tokens
        self.ended_early: set[int] = set()
        self.num_lost = 0

    def act(self, name: str, number: int) -> None:
        rank = sorted(self.group.ranks)[number % len(self.group.ranks)]
        ranks, at = self.group.ranks, number // 3
        match name:
            case "submit" | "pinned":
                params = SamplingParams(max_tokens=1 + number % 3, ignore_eos=True)
                handle = self.engine.submit(
                    [1] * (1 + number), params, rank if at % 4 == 3 else None
                )
                self.handles[handle.request_id] = handle, 1 + number % 3
            case "read" if ranks[rank].mail:
                ranks[rank].read()
            case "begin":
                ranks[rank].begin()
            case "step":
                ranks[rank].step(at)
            case "poll":
                self.group.poll(rank)
            case "abort" if self.handles:
                request_id = sorted(self.handles)[at % len(self.handles)]
                self.ended_early.add(request_id)
                self.handles[request_id][0].abort()
            case "timeout" if self.handles:
                request_id = sorted(self.handles)[at % len(self.handles)]
                self.ended_early.add(request_id)
                self.engine._core._on_due({request_id: FinishReason.TIMEOUT})
            case "lose":
                self.num_lost += 1
                self.group.lose(rank, comes_back=bool(at % 2))
        self.check()

    def check(self) -> None:
        live = {log.request_id for log, _ in self.engine._core._outputs._live.values()}
        at: dict[int, int] = dict.fromkeys(live, 0)
        for rank in self.group.ranks.values():
            told = [content for kind, content in rank.mail if kind == "submit"]
            known = [each.request_id for each in told if isinstance(each, RankRequest)]
            known += [*rank.waiting, *rank.running]
            known += [each.request_id for each in rank.outbox if each.given_back]
            known += [each.request_id for each in rank.outbox if each.finish_reason]
            for request_id in known:
                if request_id in at:
                    at[request_id] += 1
        gone = {each for each, count in at.items() if count != 1} - self.ended_early
        assert not gone, f"requests on no rank, or on two: {gone}"
        counted = sum(requests for requests, _ in outstanding(self.engine))
        assert counted == self.engine._core.num_unfinished == len(live)

    def finish(self) -> None:
        while any(not handle.done for handle, _ in self.handles.values()):
            for name, rank in list(self.group.ranks.items()):
                while rank.mail:
                    rank.read()
                rank.begin()
                rank.step(0)
                self.group.poll(name)
        for request_id, (handle, max_tokens) in self.handles.items():
            if self.num_lost > MAX_REPLAYS and handle.output is None:
                with pytest.raises(RequestFailed, match="ranks were lost"):
                    handle.result(0)
                continue
            output = handle.result(0)
            assert output.token_ids == tuple(range(len(output.token_ids)))
            if request_id not in self.ended_early:
                assert len(output.token_ids) == max_tokens
        assert all(each == (0, 0) for each in outstanding(self.engine))
        loads = self.engine._core._admission._loads
        for dp_rank in self.group.ranks:
            assert loads.rank(dp_rank).pending_prefill == 0
            assert not loads.rank(dp_rank).unbegun


ACTS = ("submit", "submit", "submit", "read", "read", "begin", "step", "step", "poll", "poll",
        "poll", "abort", "timeout", "lose")  # fmt: skip


def play(acts: list[tuple[str, int]], routing: str = "round_robin") -> int:
    """Return how many requests were moved."""
    group = QueueingGroup(3)
    config = EngineConfig(
        "fake", dp_size=3, launcher="thread", routing=routing, max_num_requests=ROWS, page_size=4
    )
    with (
        patch("dp_runtime.engine.core.start_ranks", lambda *given: group),
        Engine(config) as engine,
    ):
        story = Story(engine, group)
        for name, number in acts:
            story.act(name, number)
        story.finish()
        return sum(each.moved for each in engine._core._metrics._requests.values())


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(ACTS), st.integers(0, 30)), max_size=80))
def test_each_request_is_on_one_rank_and_no_token_is_lost(acts: list[tuple[str, int]]) -> None:
    play(acts)


@pytest.mark.slow
@settings(max_examples=3000)
@given(st.lists(st.tuples(st.sampled_from(ACTS), st.integers(0, 30)), max_size=200))
def test_many_stories_of_moves(acts: list[tuple[str, int]]) -> None:
    play(acts)


def admission_of(max_moves: int = 2) -> Admission:
    limits = RankLimits(max_num_requests=ROWS, page_size=4, max_moves=max_moves)
    return Admission(RoundRobin(), Membership.first(2), 100, limits)


def demand(request_id: int, prompt_tokens: int = 10, dp_rank: int | None = None) -> Demand:
    return Demand(2 * prompt_tokens, prompt_tokens, dp_rank, request_id=request_id)


def test_the_first_that_waits_goes_where_it_can_start() -> None:
    admission = admission_of()
    placed = [demand(number) for number in range(5)]
    assert [admission.enter(each) for each in placed] == [0, 1, 0, 1, 0]
    assert admission.report(0, FULL) == []  # nobody knows how busy the other is
    assert admission.report(1, RankLoad(2, 0, PAGES)) == []
    admission.begun([Mock(demand=each, num_cached_tokens=0) for each in (placed[0], placed[2])])
    admission.leave(placed[1])
    assert admission.report(1, RankLoad(1, 1, PAGES)) == []  # it has a queue of its own
    assert admission.report(1, RankLoad(1, 0, 3)) == []  # prompts of 10 tokens take 3 pages each
    assert admission.report(1, RankLoad(1, 0, 6)) == [Move(4, 0)]
    assert admission.report(0, FULL) == []  # it is on its way
    assert admission.recalled(placed[4], given_back=True) == 1
    assert admission.recalled(placed[4], given_back=True) is None  # it was told twice


def test_who_has_begun_stays() -> None:
    admission = admission_of()
    placed = [demand(number, dp_rank=0) if number else demand(0) for number in range(2)]
    admission.enter(placed[0])
    admission.enter(placed[1])
    assert admission.report(0, RankLoad(ROWS, 2, 0)) == []
    assert admission.report(1, IDLE) == [Move(0, 0)]  # not the one that is pinned
    assert admission.recalled(placed[0], given_back=False) is None
    assert admission.num_unfinished_of({0}) == 2


def test_prefill_of_others_is_waited_for_unless_the_move_has_less_of_it() -> None:
    admission = admission_of()
    long, short = demand(0, 100), demand(1, 10)
    admission.enter(long)
    admission.enter(demand(2, 50))
    admission.enter(short)
    could_start = RankLoad(1, 1, 100)
    assert admission.report(0, could_start) == []
    assert admission.report(1, RankLoad(1, 0, 100)) == [Move(1, 0)]  # 60 tokens, and not 110
    admission = admission_of()
    for each in (demand(0, 30), demand(1, 50), demand(2, 10)):
        admission.enter(each)
    admission.report(0, could_start)
    assert admission.report(1, RankLoad(1, 0, 100)) == []


def test_moves_are_so_many_at_most() -> None:
    for max_moves in range(3):
        admission, one = admission_of(max_moves), demand(0)
        source, moves = admission.enter(one), 0
        for _ in range(5):
            admission.report(1 - source, IDLE)
            if admission.report(source, RankLoad(ROWS, 1, 0)):
                target = admission.recalled(one, given_back=True)
                assert target == 1 - source
                source, moves = target, moves + 1
        assert moves == max_moves


def test_a_rank_that_leaves_gets_nothing_and_one_that_was_lost_is_forgotten() -> None:
    admission, one = admission_of(), demand(0)
    admission.enter(one)
    admission.report(1, IDLE)
    admission.spare([1])
    assert admission.report(0, RankLoad(ROWS, 1, 0)) == []
    admission.spare([])
    admission.serve(Membership.first(2), {1})
    assert admission.report(0, RankLoad(ROWS, 1, 0)) == []
    admission.report(1, IDLE)
    assert admission.num_unfinished_of({1}) == 1
    admission.serve(Membership.first(1), {1})
    assert admission.recalled(one, given_back=True) == 0  # where it was on its way to is gone

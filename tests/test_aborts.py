"""An abort takes effect at the next schedule, and two steps later the pages are free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from dp_runtime import Engine, FinishReason, SamplingParams, StructuredOutputs
from dp_runtime.runner.step_loop import Inbox, StepLoop
from dp_runtime.scheduler.request_state import RequestState, RequestStatus
from dp_runtime.scheduler.scheduler import Scheduler
from dp_runtime.scheduler.scheduler_output import SchedulerOutput
from tests.serving import check_pages_free
from tests.speculative_cases import TRAINED, engine_of
from tests.workers.leftovers import wait_until

WAIT_S = 60.0
MARK = 17  # the first token of the prompt of the request to abort
LONG = [MARK, *range(20, 80)]
Plain = dict[str, Any]
ENGINES: dict[str, Plain] = {
    f"dp{dp_size}{' overlap' if overlap else ''}{' drafts' if num_steps else ''}": {
        "dp_size": dp_size, "overlap": overlap, "num_steps": num_steps,
    }
    for dp_size in (1, 2) for overlap in (False, True) for num_steps in (0, 2)
}  # fmt: skip
CHEAP = (("dp2 overlap drafts", True),)


def when_waiting(scheduler: Scheduler, request: RequestState) -> bool:
    return request.status is RequestStatus.WAITING and not request.outputs


def when_running(scheduler: Scheduler, request: RequestState) -> bool:
    return request.status is RequestStatus.RUNNING and len(request.outputs) >= 3


def when_prefilling(scheduler: Scheduler, request: RequestState) -> bool:
    if request.status is not RequestStatus.RUNNING:
        return False
    computed = int(scheduler.table.num_computed_tokens[request.req_index])
    return 0 < computed < request.num_prompt_tokens


def when_preempted(scheduler: Scheduler, request: RequestState) -> bool:
    return request.status.is_queued and bool(request.outputs)


@dataclass(eq=False)
class Aborter:
    """Aborts the marked request of rank 0 as soon as it is in a state; counts the steps since."""

    when: Callable[[Scheduler, RequestState], bool]
    request_id: int | None = None
    steps: list[str] = field(default_factory=list)  # since the abort: what was left of it

    def step(self, loop: StepLoop, inbox: Inbox, go_on: Callable[[Inbox], bool]) -> bool:
        scheduler = loop.scheduler
        if self.request_id is None:
            for request in list(scheduler.requests._requests.values()):
                if request.prompt[0] == MARK and self.when(scheduler, request):
                    self.request_id = request.request_id
                    inbox = replace(inbox, abort=[*inbox.abort, request.request_id])
        before = scheduler.schedule

        def schedule(program: Any, prefill_budget: int | None = None) -> SchedulerOutput:
            scheduled = before(program, prefill_budget)
            ids = scheduler.table.request_ids[scheduled.req_indices]
            if self.request_id in ids.tolist():
                self.steps.append("scheduled")
            return scheduled

        if self.request_id is None or len(self.steps) > 1:
            return go_on(inbox)
        scheduler.schedule = schedule  # type: ignore[method-assign]
        try:
            goes_on = go_on(inbox)
        finally:
            scheduler.schedule = before  # type: ignore[method-assign]
        self.steps.append("gone" if scheduler.requests.get(self.request_id) is None else "there")
        return goes_on


@pytest.fixture
def aborter(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Aborter]:
    current: list[Aborter] = []
    real = StepLoop.step

    def step(self: StepLoop, inbox: Inbox, deliver: Any) -> bool:
        if not current or self._dp_rank != 0:
            return real(self, inbox, deliver)
        return current[0].step(self, inbox, lambda given: real(self, given, deliver))

    def watch(when: Any) -> Aborter:
        current[:] = [Aborter(when)]
        return current[0]

    monkeypatch.setattr(StepLoop, "step", step)
    return watch


def check_aborted(
    engine: Engine, watch: Callable[[Any], Aborter], when: Any, params: SamplingParams
) -> None:
    count = 4 if when is when_waiting else 2  # as many as run at a time
    length = 60 if when is when_preempted else 12
    greedy = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
    aborter = watch(when)
    salts = [f"{when.__name__} {number}" for number in range(count + 1)]
    beside = [
        engine.submit([3, 4, 5] * 3, replace(greedy, cache_salt=salt), 0) for salt in salts[1:]
    ]
    own_pages = replace(params, cache_salt=salts[0])  # as all have, and it computes its prompt
    output = engine.submit(LONG, own_pages, 0).result(WAIT_S)
    assert output.finish_reason is FinishReason.ABORT
    (expected,) = {one.result(WAIT_S).token_ids for one in beside}
    check_pages_free(engine)
    wait_until(lambda: "gone" in aborter.steps or len(aborter.steps) > 1, "two steps")
    assert aborter.steps[:2] in (["gone"], ["gone", "gone"], ["there", "gone"]), aborter.steps
    aborter.when = lambda *_: False
    assert engine.generate([[3, 4, 5] * 3], greedy)[0].token_ids == expected


@pytest.mark.parametrize(
    ("name", "structured"),
    [
        pytest.param(name, form, marks=() if (name, form) in CHEAP else pytest.mark.slow)
        for name in ENGINES
        for form in (False, True)
    ],
)
def test_an_abort_frees_its_pages_within_two_steps(
    name: str, structured: bool, aborter: Callable[[Any], Aborter]
) -> None:
    form = StructuredOutputs(regex="[a-z ]+") if structured else None
    params = SamplingParams(
        max_tokens=100, temperature=0.0, ignore_eos=True, structured_outputs=form
    )
    fields = {"max_num_tokens": 16, "max_num_requests": 4, "page_size": 8, "max_model_len": 170}
    with engine_of(TRAINED, num_pages=24, **fields | ENGINES[name]) as engine:
        for when in (when_running, when_prefilling, when_preempted, when_waiting):
            check_aborted(engine, aborter, when, params)

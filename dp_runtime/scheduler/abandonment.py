"""What becomes of a rank's requests when its steps in flight are abandoned."""

from __future__ import annotations

from dp_runtime.core.request import FinishReason, RequestUpdate
from dp_runtime.scheduler.scheduler import Scheduler
from dp_runtime.scheduler.scheduler_output import SchedulerOutput


def abandon_steps(scheduler: Scheduler) -> None:
    """Take all requests back to their committed outputs; pages keep what committed steps wrote.

    So do recurrent states that no other step can have written. Every other state of a request
    begins anew from its outputs, as after a preemption. A draft's next chain begins with what a row
    of its last but one token gives, so that is fed again.
    """
    table, requests = scheduler.table, scheduler.requests
    num_again = 2 if scheduler.limits.max_drafts else 1
    scheduler.states.abandon()
    for req_index in table.req_indices:
        table.abandon(table.request(req_index), num_again)
        if scheduler.prefixes is not None:
            scheduler.prefixes.abandoned(req_index)
    requests.settle()
    scheduler.images.clear()
    for req_index in table.req_indices:
        state = table.request(req_index)
        state.num_scored = state.num_reported
        for each in requests.states:
            if each not in (scheduler.page_table, scheduler.states):
                each.remove(req_index)
                each.add(req_index, state.request, state.outputs)
        if scheduler.prefixes is not None:
            scheduler.prefixes.begin_again(state, num_again)
        scheduler.page_table.doubt(req_index)
    scheduler.check()


def fail_prefill(
    scheduler: Scheduler, step: SchedulerOutput, error: Exception
) -> RequestUpdate | None:
    """End the request that alone prefilled in a step which is abandoned; None if none did."""
    if len(step.chunks) != 1:
        return None
    request = step.chunks[0].state
    if request.finish_reason:
        return None
    scheduler.requests.finish(request, FinishReason.ERROR)
    return RequestUpdate.failed(request.request.request_id, len(request.outputs), error)

"""The metrics of a rank: docs/observability.md says what each means."""

from __future__ import annotations

from itertools import accumulate

from dp_runtime.core.request import FinishReason
from dp_runtime.core.step_program import MAX_DRAFTS
from dp_runtime.metrics.histogram import Histogram
from dp_runtime.metrics.prometheus.family import ByLabel, Family
from dp_runtime.metrics.snapshot import RankSnapshot
from dp_runtime.metrics.status import RankState
from dp_runtime.metrics.totals import add_counts

LENGTHS = tuple(float(length) for length in range(MAX_DRAFTS))


def _kv_usage(rank: RankSnapshot) -> float:
    usable = rank.health.num_pages - 1  # one is the null page
    return 1 - rank.health.free_pages / usable if usable > 0 else 0.0


def _padding_waste(rank: RankSnapshot) -> float:
    totals = rank.totals
    return 1 - totals.real_rows / totals.gathered_rows if totals.gathered_rows else 0.0


def _passes(rank: RankSnapshot) -> ByLabel:
    return {(kind, mode): count for (kind, mode), count in rank.totals.pass_modes.items()}


def _phases(rank: RankSnapshot) -> ByLabel:
    phases = rank.totals.phase_s | rank.totals.pass_s | {"wait": rank.totals.wait_s}
    return {(phase,): seconds for phase, seconds in phases.items()}


def _waits(rank: RankSnapshot) -> ByLabel:
    return {(str(slowest),): seconds for slowest, seconds in rank.totals.wait_for_s.items()}


def _states(rank: RankSnapshot) -> ByLabel:
    return {(state,): float(state is rank.health.state) for state in RankState}


def _ends(rank: RankSnapshot) -> ByLabel:
    return {(reason,): rank.requests.ended.get(reason, 0) for reason in FinishReason}


def _accepted_lengths(rank: RankSnapshot) -> Histogram:
    counts = add_counts(rank.totals.accepted, (0,) * (MAX_DRAFTS + 1))
    return Histogram(LENGTHS, list(counts), float(_drafts_accepted(rank)))


def _drafts_accepted(rank: RankSnapshot) -> int:
    return sum(length * count for length, count in enumerate(rank.totals.accepted))


def _accepted_by_position(rank: RankSnapshot) -> ByLabel:
    at_least = [*accumulate(reversed(rank.totals.accepted))][::-1]
    return {(str(position),): count for position, count in enumerate(at_least[1:])}


OWN = (
    Family("gauge", "rank_answers", "1 if the rank has answered this scrape in time",
           lambda rank: rank.answered),
    Family("gauge", "rank_state", "1 for the state the rank is in", _states, ("state",)),
    Family("gauge", "epoch", "Times that ranks have joined anew", lambda rank: rank.health.epoch),
    Family("gauge", "dp_size", "Ranks that serve together", lambda rank: rank.health.dp_size),
    Family("gauge", "last_step", "Number of the last finished step in this epoch",
           lambda rank: rank.health.last_step),
    Family("gauge", "last_step_age_seconds", "Time since the last finished step",
           lambda rank: rank.health.last_step_age_s),
    Family("gauge", "requests_running", "Requests that have a place in steps",
           lambda rank: rank.health.num_running),
    Family("gauge", "requests_queued", "Requests that wait for a place in steps",
           lambda rank: rank.health.num_queued),
    Family("gauge", "kv_pages", "Pages of the KV cache, the null page included",
           lambda rank: rank.health.num_pages),
    Family("gauge", "kv_pages_free", "Pages of the KV cache that no request holds",
           lambda rank: rank.health.free_pages),
    Family("gauge", "kv_usage_ratio", "Share of the KV cache's pages that requests hold",
           _kv_usage),
    Family("gauge", "state_slots", "Slots of recurrent states for requests",
           lambda rank: rank.health.states.num_slots),
    Family("gauge", "state_slots_free", "Slots of recurrent states that no request holds",
           lambda rank: rank.health.states.free_slots),
    Family("gauge", "state_checkpoints", "Slots for recurrent states in the prefix cache",
           lambda rank: rank.health.states.num_checkpoints),
    Family("gauge", "state_checkpoints_free", "Those of them without a state",
           lambda rank: rank.health.states.free_checkpoints),
    Family("counter", "state_checkpoint_evictions", "States given up for others to be kept",
           lambda rank: rank.health.states.evictions),
    Family("gauge", "padding_waste_ratio", "Share of gathered rows that were padding, all steps",
           _padding_waste),
    Family("counter", "steps", "Finished steps", lambda rank: rank.totals.steps),
    Family("counter", "idle_steps", "Steps in which this rank had no rows and another had",
           lambda rank: rank.totals.idle_steps),
    Family("counter", "passes", "Passes by kind and by how they were executed",
           _passes, ("pass", "mode")),
    Family("counter", "real_rows", "Rows of tokens in passes", lambda rank: rank.totals.real_rows),
    Family("counter", "gathered_rows", "Rows in passes with padding",
           lambda rank: rank.totals.gathered_rows),
    Family("counter", "step_phase_seconds", "Host time by phase of the step; passes by their kind",
           _phases, ("phase",)),
    Family("counter", "wait_seconds", "Host time in waits for other ranks, by the slowest of them",
           _waits, ("slowest_rank",)),
    Family("gauge", "prefill_budget_tokens", "Prompt tokens that a step with decodes may take last",
           lambda rank: rank.totals.prefill_budget),
    Family("counter", "held_back_steps", "Steps in which that budget held prompts back",
           lambda rank: rank.totals.held_back_steps),
    Family("counter", "prompt_tokens", "Prompt tokens computed, again after a preemption",
           lambda rank: rank.totals.prompt_tokens),
    Family("counter", "output_tokens", "Tokens generated", lambda rank: rank.totals.output_tokens),
    Family("counter", "preemptions", "Requests put back into the queue for lack of pages",
           lambda rank: rank.totals.preemptions),
    Family("counter", "prefix_cache_queries", "Tokens of requests that were looked up",
           lambda rank: rank.totals.prefixes.queries),
    Family("counter", "prefix_cache_hits", "Tokens of requests that the cache had",
           lambda rank: rank.totals.prefixes.hits),
    Family("counter", "prefix_cache_evictions", "Pages that left the prefix cache",
           lambda rank: rank.totals.prefixes.evictions),
    Family("gauge", "prefix_cache_pages", "Full pages in the prefix cache, held or not",
           lambda rank: rank.totals.prefixes.cached_pages),
    Family("counter", "drafts_proposed", "Draft tokens that were verified",
           lambda rank: rank.totals.drafts_proposed),
    Family("counter", "drafts_accepted", "Draft tokens that were accepted", _drafts_accepted),
    Family("counter", "verifications", "Verifications of drafts, one for a request and step",
           lambda rank: sum(rank.totals.accepted)),
    Family("counter", "drafts_accepted_by_position", "Draft tokens accepted, by place in the draft",
           _accepted_by_position, ("position",)),
    Family("counter", "prompt_tokens_expected_cached",
           "Prompt tokens that routing expected in this rank's prefix cache",
           lambda rank: rank.requests.expected_cached_tokens),
    Family("counter", "prompt_tokens_cached", "Prompt tokens that requests found there",
           lambda rank: rank.requests.cached_tokens),
    Family("counter", "requests_moved", "Requests that went from this rank's queue to another rank",
           lambda rank: rank.requests.moved),
    Family("counter", "requests_ended", "Requests by how they ended",
           _ends, ("finish_reason",)),
    Family("histogram", "step_seconds", "Host time of a step, waits included",
           lambda rank: rank.totals.step_s),
    Family("histogram", "step_tokens", "Prompt and output tokens of a step",
           lambda rank: rank.totals.step_tokens),
    Family("histogram", "accepted_length", "Accepted draft tokens of a verification",
           _accepted_lengths),
    Family("histogram", "queue_seconds", "Time of a request in the queue of its rank, until it ran",
           lambda rank: rank.totals.queue_s),
    Family("histogram", "first_token_seconds", "Time from submission to the first token",
           lambda rank: rank.requests.first_token_s),
    Family("histogram", "inter_token_seconds", "Time between a request's tokens, by token",
           lambda rank: rank.requests.inter_token_s),
    Family("histogram", "request_seconds", "Time from submission to the end, if by stop or length",
           lambda rank: rank.requests.request_s),
)  # fmt: skip

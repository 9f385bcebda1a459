"""What a rank has scheduled for a step: a batch per pass, whose rows they are, what they gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dp_runtime.core.batch import Int64, LocalBatch
from dp_runtime.core.request import TokenLogprob
from dp_runtime.core.sample_positions import SamplePositions
from dp_runtime.scheduler.request_state import RequestState


@dataclass(frozen=True, eq=False)
class Chunk:
    """Tokens [start, end) of one prefilling request in a step, as it stood when scheduled."""

    live: RequestState
    start: int
    end: int
    samples: bool  # its last row yields a new token
    score_start: int  # prompt positions [score_start, score_end) get log probabilities
    score_end: int

    @classmethod
    def of(cls, live: RequestState, start: int, needed: int, budget: int) -> Chunk:
        """As many as the budget allows of the tokens that a request needs."""
        end = start + min(needed, budget)
        scored = live.request.params.prompt_logprobs is not None
        score_start = max(start, live.num_scored)
        score_end = max(score_start, min(end, live.num_prompt - 1)) if scored else score_start
        return cls(live, start, end, needed <= budget, score_start, score_end)

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def prompt_tokens(self) -> int:
        return max(0, min(self.end, self.live.num_prompt) - self.start)

    @property
    def scores(self) -> bool:
        return self.score_end > self.score_start


@dataclass(frozen=True, eq=False)
class SchedulerOutput:
    """The rows of one rank for one step: a batch per pass, and who they belong to."""

    batches: tuple[LocalBatch, ...]  # one per pass of the program
    decodes: Int64  # rows of the request table; the target pass's first requests
    chunks: tuple[Chunk, ...]  # its other requests
    rows: Int64  # of all of them, in the request table
    sampled: Int64  # those of them that sample
    samples: SamplePositions  # the target pass's first sample rows, num_drafts + 1 of each decode
    num_drafts: int  # tokens of each decode that the target verifies

    @property
    def real_rows(self) -> tuple[int, ...]:
        return tuple(batch.num_tokens for batch in self.batches)

    @property
    def prefill(self) -> bool:
        return any(chunk.length > 1 for chunk in self.chunks)

    @property
    def scored(self) -> tuple[Chunk, ...]:
        """Chunks whose prompt rows follow among the sample rows."""
        return tuple(chunk for chunk in self.chunks if chunk.scores)


@dataclass(frozen=True)
class StepResult:
    """What a step sampled, on the host, in the order of `Scheduled.samples` and `.scored`.

    num_accepted: drafts of each decode that became its output, before one more token; empty
    without drafts.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...]
    prompt_logprobs: Sequence[tuple[TokenLogprob, ...]]
    num_accepted: Sequence[int] = ()

"""Per-step measurements of a rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class PassTrace:
    """Rows of one pass, as all ranks agreed on them; times are this rank's."""

    pass_kind: str
    real_rows: tuple[int, ...]  # [rank]
    gathered_rows: tuple[int, ...]  # [rank]
    wire_rows: int  # rows that reached another rank, all MoE layers and both directions
    forward_s: float  # of the host, waits included; on a GPU that of launching
    wait_s: float  # for slower ranks, inside collectives
    mode: str  # how it ran: an ExecutionMode
    start_s: float = 0.0  # of the host's performance counter, when the forward began
    prepare_s: float = 0.0  # before it

    @property
    def busy_s(self) -> float:
        return self.forward_s - self.wait_s

    @property
    def max_rows(self) -> int:
        return max(self.real_rows)


@dataclass(frozen=True)
class PrefixCounts:
    queries: int = 0  # tokens of requests as they first ran, since the rank's start
    hits: int = 0  # those of them that need not be computed
    evictions: int = 0  # pages that left the cache, as their memory was needed
    cached_pages: int = 0  # now

    @property
    def hit_rate(self) -> float:
        return self.hits / self.queries if self.queries else 0.0


class Arrival(NamedTuple):
    """A request that a rank has got, which may have waited before."""

    request_id: int
    prompt_tokens: int
    max_tokens: int  # of output that it may take


class End(NamedTuple):
    """A request that has ended on a rank."""

    request_id: int
    output_tokens: int
    cached_tokens: int  # of its prompt, which were not computed


@dataclass(frozen=True)
class StepTrace:
    """One finished step of one rank; durations in seconds."""

    dp_rank: int
    step_id: int
    epoch: int
    start_s: float  # of the host's performance counter, the same for its processes
    schedule_s: float
    agree_s: float  # this rank's part of exchanging records and agreeing
    agree_wait_s: float  # for the records of slower ranks
    prepare_s: float  # metadata and input tensors
    sample_s: float
    commit_s: float
    passes: tuple[PassTrace, ...]
    output_tokens: int
    prompt_tokens: int
    num_preemptions: int = 0  # of the rank since its start
    num_drafts: int = 0  # of each verification
    accepted: tuple[int, ...] = ()  # verifications by how many of their drafts were accepted
    sample_start_s: float = 0.0  # as start_s
    position: int | None = None  # of the rank in rows of all ranks; None: its dp_rank
    prefixes: PrefixCounts = field(default_factory=PrefixCounts)
    commit_start_s: float = 0.0  # as start_s; with overlap the next step has been launched by then
    encode_s: float = 0.0  # of the host, for images: on a GPU that of launching
    num_images: int = 0  # that were encoded
    record: tuple[int, ...] = ()  # the words of the StepRecord that the rank posted
    kv_tokens: int = 0  # that the target pass's requests of this rank have in the cache after it
    attended_tokens: int = 0  # summed over its rows: each attends to those up to itself
    arrived: tuple[Arrival, ...] = ()  # since the rank scheduled the step before
    ended: tuple[End, ...] = ()  # by this step, or aborted before it
    free_pages: int | None = None  # after it, cached ones that nobody holds among them

    @property
    def index(self) -> int:  # of this rank in rows of all ranks
        return self.dp_rank if self.position is None else self.position

    @property
    def wait_s(self) -> float:  # for slower ranks
        return self.agree_wait_s + sum(each.wait_s for each in self.passes)

    @property
    def phases(self) -> tuple[tuple[str, float], ...]:  # seconds without waits; no passes
        encode = (("encode", self.encode_s),) if self.num_images else ()
        return (
            ("schedule", self.schedule_s), ("agree", self.agree_s), *encode,
            ("prepare", self.prepare_s), ("sample", self.sample_s), ("commit", self.commit_s),
        )  # fmt: skip

    @property
    def busy_s(self) -> float:
        phases = sum(seconds for _, seconds in self.phases)
        return phases + sum(each.busy_s for each in self.passes)

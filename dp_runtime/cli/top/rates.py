"""What ranks did between two scrapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from dp_runtime.cli.top.scrape import Scrape

PHASES = "dp_runtime_step_phase_seconds_total"


@dataclass(frozen=True)
class Interval:
    first: Scrape | None  # None: since the server's start
    last: Scrape

    @property
    def seconds(self) -> float | None:
        return None if self.first is None else self.last.at - self.first.at

    def rise(self, name: str, **labels: str) -> float:
        """Return how far counters have risen, all that have these labels; from 0 if they fell."""
        first = 0.0 if self.first is None else self.first.sum(name, **labels)
        last = self.last.sum(name, **labels)
        return last - first if last >= first else last

    def per_s(self, name: str, **labels: str) -> float | None:
        return ratio(self.rise(name, **labels), self.seconds or 0.0)

    def rise_by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        values = {sample.labels[label] for sample in self.last.having(name, **labels)}
        return {value: self.rise(name, **labels, **{label: value}) for value in values}

    def quantile(self, name: str, share: float) -> float | None:
        """Estimate a quantile of all ranks' observations, as PromQL's histogram_quantile does."""
        counts = self.rise_by(f"{name}_bucket", "le")
        buckets = sorted((float(bound), count) for bound, count in counts.items())
        if not buckets or not buckets[-1][1]:
            return None
        wanted = share * buckets[-1][1]
        for (low, before), (high, count) in pairwise([(0.0, 0.0), *buckets]):
            if count >= wanted:
                inside = (wanted - before) / (count - before) if count > before else 1.0
                return low if high == float("inf") else low + (high - low) * inside
        raise AssertionError("the last bucket holds all")


@dataclass(frozen=True)
class RankRow:
    """One rank's line; None where there is nothing to divide by."""

    dp_rank: str
    state: str
    running: float
    queued: float
    output_per_s: float | None
    step_s: float | None
    wait_share: float | None  # of a step
    waits_for: str | None  # the rank that was the slowest for most of the wait
    kv_share: float
    hit_share: float | None  # of the tokens of requests that began, found in the prefix cache
    preemptions: float  # since its start
    padding_share: float | None
    accepted: float | None  # drafts of a verification
    last_step_age_s: float

    @classmethod
    def of(cls, interval: Interval, dp_rank: str) -> RankRow:
        def rise(name: str) -> float:
            return interval.rise(f"dp_runtime_{name}", dp_rank=dp_rank)

        def now(name: str) -> float:
            return interval.last.sum(f"dp_runtime_{name}", dp_rank=dp_rank)

        waits = interval.rise_by("dp_runtime_wait_seconds_total", "slowest_rank", dp_rank=dp_rank)
        waited = interval.rise(PHASES, dp_rank=dp_rank, phase="wait")
        real = ratio(rise("real_rows_total"), rise("gathered_rows_total"))
        return cls(
            dp_rank=dp_rank,
            state=state_of(interval.last, dp_rank),
            running=now("requests_running"),
            queued=now("requests_queued"),
            output_per_s=interval.per_s("dp_runtime_output_tokens_total", dp_rank=dp_rank),
            step_s=ratio(rise("step_seconds_sum"), rise("step_seconds_count")),
            wait_share=ratio(waited, rise("step_seconds_sum")),
            waits_for=largest(waits),
            kv_share=now("kv_usage_ratio"),
            hit_share=ratio(rise("prefix_cache_hits_total"), rise("prefix_cache_queries_total")),
            preemptions=now("preemptions_total"),
            padding_share=None if real is None else 1 - real,
            accepted=ratio(rise("drafts_accepted_total"), rise("verifications_total")),
            last_step_age_s=now("last_step_age_seconds"),
        )


def state_of(scrape: Scrape, dp_rank: str) -> str:
    if not scrape.sum("dp_runtime_rank_answers", dp_rank=dp_rank):
        return "silent"
    states = scrape.having("dp_runtime_rank_state", dp_rank=dp_rank)
    return next((each.labels["state"] for each in states if each.value), "unknown")


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def largest(shares: Mapping[str, float]) -> str | None:
    name = max(shares, key=shares.__getitem__, default=None)
    return name if name is not None and shares[name] > 0 else None

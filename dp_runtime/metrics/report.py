"""Report: what an engine has done since its start, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from statistics import fmean

from dp_runtime.metrics.request_totals import RequestTotals
from dp_runtime.metrics.totals import Totals, add_counts
from dp_runtime.metrics.trace import PrefixCounts


@dataclass(frozen=True)
class Report:
    """Sums up an engine since its start; `str()` prints it as a table."""

    dp_ranks: tuple[int, ...]  # those that serve
    elapsed_s: float  # while at least one request was unfinished
    requests: int
    steps: int
    prompt_tokens: int
    output_tokens: int
    preemptions: int
    padding_waste: float  # 1 - sum of real rows / sum of gathered rows
    row_balance: float  # mean rows of a rank / rows of the largest rank
    wire_rows: int
    busy_s: tuple[float, ...]  # [rank]
    wait_s: tuple[float, ...]  # [rank] for slower ranks
    idle_steps: tuple[int, ...]  # [rank]
    output_tokens_by_rank: tuple[int, ...]
    prefill_budget: int = 0  # prompt tokens of a rank in a step, when there last was a limit
    held_back_steps: tuple[int, ...] = ()  # [rank] that it shortened
    drafts_proposed: int = 0
    accepted_histogram: tuple[int, ...] = ()  # verifications by accepted drafts, all ranks
    moved: int = 0  # requests that went from one rank's queue to another rank
    expected_cached_tokens: int = 0  # of prompts, by routing, where their ranks have caches
    cached_tokens: int = 0  # those that were found there
    pass_s: Mapping[str, float] = field(default_factory=dict)  # mean of the ranks, without waits
    prefixes: tuple[PrefixCounts, ...] = ()  # [rank]

    @property
    def dp_size(self) -> int:
        return len(self.dp_ranks)

    @property
    def verifications(self) -> int:
        return sum(self.accepted_histogram)

    @property
    def drafts_accepted(self) -> int:
        return sum(length * count for length, count in enumerate(self.accepted_histogram))

    @property
    def tokens_per_verification(self) -> float:
        count = self.verifications
        return 1 + self.drafts_accepted / count if count else 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.elapsed_s if self.elapsed_s else 0.0

    @classmethod
    def from_totals(
        cls, ranks: Sequence[Totals], requests: Sequence[RequestTotals], elapsed_s: float
    ) -> Report:
        """Sum up what ranks did, and what the driver saw of their requests."""
        first = ranks[0]
        real_rows, gathered_rows = (
            sum(rank.real_rows for rank in ranks), sum(rank.gathered_rows for rank in ranks),
        )  # fmt: skip
        waste = 1 - real_rows / gathered_rows if gathered_rows else 0.0
        balance = real_rows / (len(ranks) * first.max_rows) if first.max_rows else 1.0
        return cls(
            dp_ranks=tuple(rank.dp_rank for rank in ranks),
            elapsed_s=elapsed_s,
            requests=sum(sum(rank.ended.values()) for rank in requests),
            moved=sum(rank.moved for rank in requests),
            expected_cached_tokens=sum(rank.expected_cached_tokens for rank in requests),
            cached_tokens=sum(rank.cached_tokens for rank in requests),
            steps=first.steps,
            prompt_tokens=sum(rank.prompt_tokens for rank in ranks),
            output_tokens=sum(rank.output_tokens for rank in ranks),
            preemptions=sum(rank.preemptions for rank in ranks),
            padding_waste=waste,
            row_balance=balance,
            wire_rows=first.wire_rows,
            busy_s=tuple(rank.busy_s for rank in ranks),
            wait_s=tuple(rank.wait_s for rank in ranks),
            idle_steps=tuple(rank.idle_steps for rank in ranks),
            output_tokens_by_rank=tuple(rank.output_tokens for rank in ranks),
            prefill_budget=first.prefill_budget,
            held_back_steps=tuple(rank.held_back_steps for rank in ranks),
            drafts_proposed=sum(rank.drafts_proposed for rank in ranks),
            accepted_histogram=reduce(add_counts, (rank.accepted for rank in ranks)),
            pass_s={
                pass_kind: fmean(rank.pass_s.get(pass_kind, 0.0) for rank in ranks)
                for pass_kind in first.pass_s
            },
            prefixes=tuple(rank.prefixes for rank in ranks),
        )

    def __str__(self) -> str:
        lines = [
            f"requests {self.requests}   moved between ranks {self.moved}   steps {self.steps}   "
            f"preemptions {self.preemptions}",
            f"prompt tokens {self.prompt_tokens}   output tokens {self.output_tokens}   "
            f"{self.tokens_per_s:.1f} output tok/s over {self.elapsed_s:.2f} s",
            f"padding_waste {self.padding_waste:.3f}   row_balance {self.row_balance:.3f}   "
            f"wire_rows {self.wire_rows}",
            *self._prefixes(),
            *self._routing(),
            *self._budget(),
            *self._speculation(),
            "rank  output tokens  idle steps  busy s  wait for the slowest rank s",
        ]
        lines += [
            f"{rank:>4}  {self.output_tokens_by_rank[at]:>13}  {self.idle_steps[at]:>10}  "
            f"{self.busy_s[at]:>6.2f}  {self.wait_s[at]:>6.2f}"
            for at, rank in enumerate(self.dp_ranks)
        ]
        lines.append(f" all  mean busy {fmean(self.busy_s):.2f} s, wait {fmean(self.wait_s):.2f} s")
        return "\n".join(lines)

    def _prefixes(self) -> list[str]:
        queries = sum(rank.queries for rank in self.prefixes)
        if not queries:
            return []
        hits = sum(rank.hits for rank in self.prefixes)
        rates = "  ".join(f"{rank.hit_rate:.3f}" for rank in self.prefixes)
        return [
            f"tokens found in the prefix cache {hits} of {queries}   share by rank  {rates}   "
            f"pages evicted {sum(rank.evictions for rank in self.prefixes)}"
        ]

    def _routing(self) -> list[str]:
        if not self.expected_cached_tokens:
            return []
        return [
            f"prompt tokens that routing expected in prefix caches {self.expected_cached_tokens}, "
            f"found there {self.cached_tokens}"
        ]

    def _budget(self) -> list[str]:
        if not self.prefill_budget:
            return []
        steps = "  ".join(map(str, self.held_back_steps))
        return [
            f"prefill budget {self.prefill_budget} tokens   steps in which it held prompts back, "
            f"by rank  {steps}"
        ]

    def _speculation(self) -> list[str]:
        if not self.verifications:
            return []
        lengths = "  ".join(f"{n}: {count}" for n, count in enumerate(self.accepted_histogram))
        times = "  ".join(
            f"{pass_kind} {seconds:.2f} s" for pass_kind, seconds in self.pass_s.items()
        )
        return [
            f"verifications {self.verifications}   drafts accepted {self.drafts_accepted} of "
            f"{self.drafts_proposed}   tokens per verification {self.tokens_per_verification:.3f}",
            f"verifications by accepted drafts  {lengths}",
            f"mean time of a rank by pass  {times}",
        ]

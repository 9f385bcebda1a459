"""Per-step measurements of a rank, their totals, and their export as a Chrome trace."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from itertools import zip_longest
from statistics import fmean

MAX_REMEMBERED_STEPS = 20_000


@dataclass(frozen=True)
class PassTrace:
    """Rows of one pass, as all ranks agreed on them; times are this rank's."""

    pass_kind: str
    real_rows: tuple[int, ...]  # [rank]
    gathered_rows: tuple[int, ...]  # [rank]
    wire_rows: int  # rows that reached another rank, all MoE layers and both directions
    forward_s: float  # of the host, waits included; on a GPU that of launching
    wait_s: float  # for slower ranks, inside collectives

    @property
    def max_rows(self) -> int:
        return max(self.real_rows)


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

    @property
    def wait_s(self) -> float:  # for slower ranks
        return self.agree_wait_s + sum(each.wait_s for each in self.passes)

    @property
    def busy_s(self) -> float:
        forward = sum(each.forward_s for each in self.passes)
        phases = self.schedule_s + self.agree_s + self.prepare_s + self.sample_s + self.commit_s
        return phases + forward - sum(each.wait_s for each in self.passes)


@dataclass(frozen=True)
class Totals:
    """Sums over the finished steps of one rank; row counts are over all ranks."""

    dp_rank: int
    steps: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0
    preemptions: int = 0
    real_rows: int = 0
    gathered_rows: int = 0
    max_rows: int = 0  # sum over steps of the largest rank's rows
    wire_rows: int = 0
    busy_s: float = 0.0
    wait_s: float = 0.0
    idle_steps: int = 0  # this rank had no rows while another had
    drafts_proposed: int = 0
    accepted: tuple[int, ...] = ()  # verifications by how many of their drafts were accepted
    pass_s: Mapping[str, float] = field(default_factory=dict)  # by pass, without waits for ranks

    def plus(self, step: StepTrace) -> Totals:
        passes = step.passes
        pass_s = dict(self.pass_s)
        for each in passes:
            busy_s = each.forward_s - each.wait_s
            pass_s[each.pass_kind] = pass_s.get(each.pass_kind, 0.0) + busy_s
        return Totals(
            dp_rank=self.dp_rank,
            steps=self.steps + 1,
            output_tokens=self.output_tokens + step.output_tokens,
            prompt_tokens=self.prompt_tokens + step.prompt_tokens,
            preemptions=step.num_preemptions,
            real_rows=self.real_rows + sum(sum(each.real_rows) for each in passes),
            gathered_rows=self.gathered_rows + sum(sum(each.gathered_rows) for each in passes),
            max_rows=self.max_rows + sum(each.max_rows for each in passes),
            wire_rows=self.wire_rows + sum(each.wire_rows for each in passes),
            busy_s=self.busy_s + step.busy_s,
            wait_s=self.wait_s + step.wait_s,
            idle_steps=self.idle_steps + all(each.real_rows[step.dp_rank] == 0 for each in passes),
            drafts_proposed=self.drafts_proposed + step.num_drafts * sum(step.accepted),
            accepted=_add(self.accepted, step.accepted),
            pass_s=pass_s,
        )


@dataclass
class Recorder:
    """Remembers the last steps of a rank and adds all of them up."""

    totals: Totals
    steps: deque[StepTrace] = field(default_factory=lambda: deque(maxlen=MAX_REMEMBERED_STEPS))

    def add(self, step: StepTrace) -> None:
        self.steps.append(step)
        self.totals = self.totals.plus(step)


def _add(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip_longest(one, other, fillvalue=0))


@dataclass(frozen=True)
class Report:
    """Sums up an engine since its start; `str()` prints it as a table."""

    dp_size: int
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
    drafts_proposed: int = 0
    accepted_histogram: tuple[int, ...] = ()  # verifications by accepted drafts, all ranks
    pass_s: Mapping[str, float] = field(default_factory=dict)  # mean of the ranks, without waits

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
    def from_totals(cls, ranks: Sequence[Totals], requests: int, elapsed_s: float) -> Report:
        first = ranks[0]  # every rank counts the rows of all
        waste = 1 - first.real_rows / first.gathered_rows if first.gathered_rows else 0.0
        balance = first.real_rows / (len(ranks) * first.max_rows) if first.max_rows else 1.0
        return cls(
            dp_size=len(ranks),
            elapsed_s=elapsed_s,
            requests=requests,
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
            drafts_proposed=sum(rank.drafts_proposed for rank in ranks),
            accepted_histogram=reduce(_add, (rank.accepted for rank in ranks)),
            pass_s={
                pass_kind: fmean(rank.pass_s.get(pass_kind, 0.0) for rank in ranks)
                for pass_kind in first.pass_s
            },
        )

    def __str__(self) -> str:
        lines = [
            f"requests {self.requests}   steps {self.steps}   preemptions {self.preemptions}",
            f"prompt tokens {self.prompt_tokens}   output tokens {self.output_tokens}   "
            f"{self.tokens_per_s:.1f} output tok/s over {self.elapsed_s:.2f} s",
            f"padding_waste {self.padding_waste:.3f}   row_balance {self.row_balance:.3f}   "
            f"wire_rows {self.wire_rows}",
            *self._speculation(),
            "rank  output tokens  idle steps  busy s  wait for the slowest rank s",
        ]
        lines += [
            f"{rank:>4}  {self.output_tokens_by_rank[rank]:>13}  {self.idle_steps[rank]:>10}  "
            f"{self.busy_s[rank]:>6.2f}  {self.wait_s[rank]:>6.2f}"
            for rank in range(self.dp_size)
        ]
        lines.append(f" all  mean busy {fmean(self.busy_s):.2f} s, wait {fmean(self.wait_s):.2f} s")
        return "\n".join(lines)

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


def chrome_trace(steps: Iterable[StepTrace]) -> str:
    """Return the steps as JSON that Perfetto opens ("Trace Event Format", microseconds)."""
    events = [event for step in steps for event in _events(step)]
    return json.dumps({"traceEvents": events})


def _events(step: StepTrace) -> list[dict[str, object]]:
    phases = [("schedule", step.schedule_s), ("agree", step.agree_s + step.agree_wait_s)]
    phases += [("prepare", step.prepare_s)]
    phases += [(each.pass_kind, each.forward_s) for each in step.passes]
    phases += [("sample", step.sample_s), ("commit", step.commit_s)]
    events: list[dict[str, object]] = []
    at = step.start_s
    args: dict[str, object] = {"step": step.step_id, "passes": [asdict(s) for s in step.passes]}
    if step.num_drafts:
        args["verifications by accepted drafts"] = step.accepted
    for name, duration in phases:
        events.append(
            {"name": name, "ph": "X", "ts": at * 1e6, "dur": duration * 1e6, "pid": 0}
            | {"tid": step.dp_rank, "args": args}
        )
        at += duration
    return events

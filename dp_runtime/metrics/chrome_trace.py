"""Steps as a Chrome trace ("Trace Event Format"), which Perfetto opens: a process for each rank."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dp_runtime.metrics.status import RankHealth
from dp_runtime.metrics.trace import PassTrace, StepTrace

PHASES, WAITS = 1, 2  # tracks of a rank
TRACKS = {PHASES: "step phases", WAITS: "waits for other ranks"}

Event = dict[str, Any]


def chrome_trace(steps: Sequence[StepTrace], ranks: Sequence[RankHealth]) -> Iterator[str]:
    """Yield the parts of a JSON document; times are microseconds from the first step on."""
    clocks = _clocks(ranks)
    begin_us = min((step.start_s * 1e6 + clocks[step.dp_rank] for step in steps), default=0.0)
    yield '{"displayTimeUnit": "ms", "traceEvents": [\n'
    yield ",\n".join(json.dumps(event) for rank in ranks for event in _names(rank))
    for step in steps:
        events = _StepEvents(step, clocks[step.dp_rank] - begin_us).all()
        yield "".join(f",\n{json.dumps(event)}" for event in events)
    yield "\n]}\n"


def _clocks(ranks: Sequence[RankHealth]) -> dict[int, float]:
    """Microseconds from a rank's clock to the first one's; ranks of one host share theirs."""
    hosts: dict[str, int] = {}
    for rank in ranks:
        hosts.setdefault(rank.host, rank.clock_offset_ns)
    return {rank.dp_rank: (hosts[rank.host] - ranks[0].clock_offset_ns) / 1e3 for rank in ranks}


def _pid(dp_rank: int) -> int:
    return dp_rank + 1  # Perfetto takes process 0 for the kernel's: google/perfetto#394


def _names(rank: RankHealth) -> Iterator[Event]:
    pid, name = _pid(rank.dp_rank), f"rank {rank.dp_rank} ({rank.host}, pid {rank.pid})"
    yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
    for tid, track in TRACKS.items():
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": track}}


@dataclass(frozen=True)
class _StepEvents:
    step: StepTrace
    shift_us: float  # from the rank's clock to the trace's

    def all(self) -> Iterator[Event]:
        step = self.step
        args: Event = {"step": step.step_id, "epoch": step.epoch}
        scheduled = step.start_s + step.schedule_s
        agreed = scheduled + step.agree_s + step.agree_wait_s
        yield self._slice("schedule", step.start_s, scheduled, args | {"position": step.index})
        yield self._slice("agree", scheduled, agreed, args)
        yield from self._wait("wait for records", agreed, step.agree_wait_s)
        if step.num_images:
            images = args | {"images": step.num_images}
            yield self._slice("encode", agreed, agreed + step.encode_s, images)
        for one in step.passes:
            yield from self._pass(one, args)
        yield self._slice("sample", step.sample_start_s, step.sample_start_s + step.sample_s, args)
        done = {
            "output tokens": step.output_tokens, "prompt tokens": step.prompt_tokens,
            "preemptions": step.num_preemptions, "prefixes": asdict(step.prefixes),
            "free pages": step.free_pages,
        }  # fmt: skip
        if step.num_drafts:
            args = args | {"verifications by accepted drafts": step.accepted}
        committed = step.commit_start_s + step.commit_s
        yield self._slice("commit", step.commit_start_s, committed, args | done)

    def _pass(self, one: PassTrace, args: Event) -> Iterator[Event]:
        rank, end_s = self.step.dp_rank, one.start_s + one.forward_s
        if one.prepare_s:
            begun = one.start_s - one.prepare_s
            yield self._slice(f"prepare {one.pass_kind}", begun, one.start_s, args)
        rows = {
            "real rows": one.real_rows, "gathered rows": one.gathered_rows,
            "wire rows": one.wire_rows,
        }  # fmt: skip
        yield self._slice(f"{one.pass_kind} ({one.mode})", one.start_s, end_s, args | rows)
        # When in the pass it waited is not known, only for how long in all.
        yield from self._wait("wait in collectives", end_s, one.wait_s)
        at = self.step.index
        real, gathered = one.real_rows[at], one.gathered_rows[at]
        yield {
            "ph": "C", "name": f"rows of {one.pass_kind}", "pid": _pid(rank),
            "ts": self._us(one.start_s), "args": {"real": real, "padding": gathered - real},
        }  # fmt: skip

    def _wait(self, name: str, end_s: float, seconds: float) -> Iterator[Event]:
        if seconds > 0:
            yield self._slice(name, end_s - seconds, end_s, {"step": self.step.step_id}, WAITS)

    def _slice(
        self, name: str, start_s: float, end_s: float, args: Event, track: int = PHASES
    ) -> Event:
        start_us = self._us(start_s)
        return {
            "ph": "X", "name": name, "pid": _pid(self.step.dp_rank), "tid": track,
            "ts": start_us, "dur": round(self._us(end_s) - start_us, 3), "args": args,
        }  # fmt: skip

    def _us(self, time_s: float) -> float:
        """Round to nanoseconds: Perfetto drops a slice that begins before another has ended."""
        return round(time_s * 1e6 + self.shift_us, 3)

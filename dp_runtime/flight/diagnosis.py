"""Which rank of a flight record is odd, and what it did differently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from dp_runtime.flight.place import Wait, duration, place_of, wait_of
from dp_runtime.flight.record import FlightDump, ProcessState, RankFlight, Source, StepFlight
from dp_runtime.flight.recorder import PROTOCOL_NAMES
from dp_runtime.flight.stragglers import find_straggler

STALL_S = 1.0  # who waits for less may wait for a busy rank


@dataclass(frozen=True)
class Finding:
    dp_ranks: tuple[int, ...]
    text: str


def diagnose(dump: FlightDump) -> tuple[Finding, ...]:
    """Name the odd ranks, by the plainest evidence that there is."""
    for find in (_lost, _failed, _disagreeing, _behind, _slow):
        if findings := tuple(find(dump)):
            return findings
    return ()


def _lost(dump: FlightDump) -> Iterator[Finding]:
    """Ranks whose process does not run, or of which nothing could be read."""
    for rank in dump.ranks:
        match rank.process, rank.source:
            case ProcessState.ENDED, _:
                yield _finding(dump, rank, "its process has ended")
            case ProcessState.STOPPED, _:
                yield _finding(dump, rank, "its process is stopped (SIGSTOP, or a debugger)")
            case _, Source.NONE:
                yield _finding(dump, rank, "nothing of it could be read")


def _failed(dump: FlightDump) -> Iterator[Finding]:
    """Ranks with an error of their own, which the others can only follow."""
    for rank in dump.ranks:
        if rank.error and not rank.error.startswith(PROTOCOL_NAMES):
            yield _finding(dump, rank, f"it failed: {rank.error}")


def _disagreeing(dump: FlightDump) -> Iterator[Finding]:
    """Ranks whose last record, agreement or collective is not what the others' is."""
    if not all(rank.steps for rank in dump.ranks):
        return
    if any(rank.error.startswith("RankDisagreement") for rank in dump.ranks):
        names = "epoch, step, program, number of passes"
        yield from _minority(dump, f"record ({names})", map(_last_key, dump.ranks))
        return
    done = [_done_steps(rank) for rank in dump.ranks]
    for key in sorted(set.intersection(*map(set, done)), reverse=True):
        steps = [of_rank[key] for of_rank in done]
        found = (
            *_minority(dump, f"agreement on step {key[1]}", map(_agreed, steps)),
            *_minority(dump, f"collectives of step {key[1]}", map(_kinds, steps)),
        )
        yield from found
        if found:
            return


def _last_key(rank: RankFlight) -> Hashable:
    return (rank.last_posted or rank.steps[-1]).record_key


def _done_steps(rank: RankFlight) -> dict[tuple[int, int], StepFlight]:
    return {s.key: s for s in rank.steps if s.passes and s.passes[-1].ended_us}


def _agreed(step: StepFlight) -> Hashable:
    plans = ((one.kind, one.mode, one.gathered_rows, one.real_rows) for one in step.passes)
    return (step.outcome, step.next_program_id, *plans)


def _kinds(step: StepFlight) -> Hashable:
    return tuple(one[:4] for one in step.collectives)  # all but sizes and times


def _minority(dump: FlightDump, what: str, of_ranks: Iterable[Hashable]) -> Iterator[Finding]:
    values = list(of_ranks)
    usual, _ = Counter(values).most_common(1)[0]
    others = [rank.dp_rank for rank, value in zip(dump.ranks, values) if value == usual]
    for rank, value in zip(dump.ranks, values):
        if value != usual:
            texts = f"its {what} is {_short(value)}, that of {named(others)} is {_short(usual)}"
            yield _finding(dump, rank, texts)


def _behind(dump: FlightDump) -> Iterator[Finding]:
    """Ranks for which the one that has waited longest waits."""
    waits = [wait for rank in dump.ranks if (wait := wait_of(rank, dump.taken_us))]
    timed_out = any(rank.error.startswith("CollectiveTimeout") for rank in dump.ranks)
    longest = max(waits, key=lambda wait: wait.waited_us, default=None)
    if longest and (timed_out or longest.waited_us >= STALL_S * 1e6):
        for rank in dump.ranks:
            if not longest.met_by(rank):
                yield _finding(dump, rank, "it is behind the others")


def _slow(dump: FlightDump) -> Iterator[Finding]:
    late = find_straggler(dump.ranks)
    if late:
        yield Finding((late.dp_rank,), f"rank {late.dp_rank}: it is slow: {late}")


def _finding(dump: FlightDump, rank: RankFlight, what: str) -> Finding:
    """Tell of a rank, where it is, and who waits for what it did not do."""
    texts = [f"rank {rank.dp_rank}: {what}"]
    texts += (
        _last_seen(dump, rank.dp_rank)
        if rank.source is Source.NONE
        else [place_of(rank, dump.taken_us)]
    )
    if rank.silent_s >= STALL_S:
        texts.append(f"last answer to the driver {rank.silent_s:.1f} s before")
    waits = [wait_of(other, dump.taken_us) for other in dump.ranks if other is not rank]
    missed = [wait for wait in waits if wait and not wait.met_by(rank)]
    if missed:
        texts.append(_missed(missed))
    return Finding((rank.dp_rank,), "; ".join(texts))


def _last_seen(dump: FlightDump, dp_rank: int) -> list[str]:
    """Say what the others know of a rank that could not be read."""
    steps = [step for rank in dump.ranks for step in rank.steps if step.agreed_us]
    last = max(steps, key=lambda step: step.key, default=None)
    position = [rank.dp_rank for rank in dump.ranks].index(dp_rank)
    if last is None or any(position >= len(one.real_rows) for one in last.passes):
        return []
    rows = sum(one.real_rows[position] for one in last.passes)
    return [f"the others last agreed with it on step {last.step_id}, where it had {rows} rows"]


def _missed(waits: Sequence[Wait]) -> str:
    first = min(waits, key=lambda wait: wait.key)
    same = [wait for wait in waits if wait.key == first.key]
    waited, waiting = max(wait.waited_us for wait in same), named([wait.dp_rank for wait in same])
    return f"it did not {first.action}, for which {waiting} waited {duration(waited)}"


def named(dp_ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(dp_ranks) != 1)} {', '.join(map(str, dp_ranks))}"


def _short(value: Hashable) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:197]}..."

"""The report of `doctor`: who is odd, a table of the ranks, and their last steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from dp_runtime.errors import one_line
from dp_runtime.flight.diagnosis import Finding, named
from dp_runtime.flight.place import place_of
from dp_runtime.flight.record import FlightDump, RankFlight, Source, StepFlight

TIMELINE_STEPS = 12
MAX_SHOWN_RANKS = 16  # of the timeline


def report(dump: FlightDump, findings: Sequence[Finding]) -> str:
    lines = (*_head(dump), *_findings(findings), *_table(dump), *_timeline(dump))
    return "\n".join(one_line(line) for line in lines)  # a file may hold control characters


def _head(dump: FlightDump) -> Iterator[str]:
    hosts = sorted({rank.host for rank in dump.ranks if rank.host})
    at = datetime.fromtimestamp(dump.taken_us / 1e6, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    yield f"Flight record of {len(dump.ranks)} ranks on {', '.join(hosts)}, taken {at} UTC"
    yield f"reason  {dump.reason}"
    if len(hosts) > 1:
        yield "note    the clocks of different hosts may differ by milliseconds"


def _findings(findings: Sequence[Finding]) -> Iterator[str]:
    yield ""
    if not findings:
        yield "No rank is odd."
        return
    ranks = sorted({dp_rank for finding in findings for dp_rank in finding.dp_ranks})
    yield f"Odd: {named(ranks)}"
    for finding in findings:
        yield f"  {finding.text}"


def _table(dump: FlightDump) -> Iterator[str]:
    head = ("rank", "process", "read from", "last step", "rows", "answered", "where it is")
    yield ""
    yield "Ranks (rows of the last record; seconds since the last answer to the driver)"
    yield from _aligned([head, *(_row(rank, dump.taken_us) for rank in dump.ranks)])
    for rank in dump.ranks:
        if rank.error:
            yield f"  rank {rank.dp_rank} ended with {rank.error.splitlines()[0]}"


def _row(rank: RankFlight, taken_us: int) -> tuple[str, ...]:
    posted = rank.last_posted
    step, rows = (str(posted.step_id), str(sum(posted.rows))) if posted else ("-", "-")
    where = "-" if rank.source is Source.NONE else place_of(rank, taken_us)
    process = f"{rank.process} {rank.pid}" if rank.pid else str(rank.process)
    answered = f"{rank.silent_s:.1f} s"
    return str(rank.dp_rank), process, str(rank.source), step, rows, answered, where


def _timeline(dump: FlightDump) -> Iterator[str]:
    ranks = [rank for rank in dump.ranks if rank.steps][:MAX_SHOWN_RANKS]
    keys = sorted({step.key for rank in ranks for step in rank.steps})[-TIMELINE_STEPS:]
    if not keys:
        return
    yield ""
    yield "Last steps (posted: ms after the first rank's record; ended: ms from there to the last"
    yield "rank's end of its passes; -: not reached)"
    head = ("step", "at s", "modes", "real rows of ranks", "gathered", "last to post", "ended ms")
    posted = [f"posted {rank.dp_rank}" for rank in ranks]
    yield from _aligned([(*head, *posted), *(_step_row(dump, ranks, key) for key in keys)])


def _step_row(
    dump: FlightDump, ranks: Sequence[RankFlight], key: tuple[int, int]
) -> tuple[str, ...]:
    found = [next((s for s in reversed(rank.steps) if s.key == key), None) for rank in ranks]
    steps = [step for step in found if step is not None]
    times = [step.posted_us if step else 0 for step in found]
    first = min(filter(None, times), default=0)
    latest = times.index(max(times))
    last_to_post = str(ranks[latest].dp_rank) if all(times) and len(times) > 1 else "-"
    late = [f"{(at - first) / 1e3:.2f}" if at else "-" for at in times]
    at = f"{(first - dump.taken_us) / 1e6:.3f}" if first else "-"
    agreed = next((step for step in steps if step.agreed_us), steps[0])
    return str(key[1]), at, *_plans(agreed), last_to_post, _ended(steps, first), *late


def _plans(step: StepFlight) -> tuple[str, str, str]:
    if step.idle or not step.passes:
        return step.outcome, "-", "-"
    modes = ", ".join(f"{one.kind} {one.mode}" for one in step.passes)
    rows = " ".join(",".join(map(str, one.real_rows[:MAX_SHOWN_RANKS])) for one in step.passes)
    return modes, rows, " ".join(str(one.gathered_rows) for one in step.passes)


def _ended(steps: Sequence[StepFlight], first: int) -> str:
    ends = [step.passes[-1].ended_us for step in steps if step.passes]
    return f"{(max(ends) - first) / 1e3:.2f}" if ends and all(ends) and first else "-"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()

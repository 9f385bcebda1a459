"""The odd rank is named, with what it did differently, and a well group is left in peace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from dp_runtime.errors import CollectiveAborted, CollectiveTimeout, RankDisagreement
from dp_runtime.flight.diagnosis import Finding, diagnose
from dp_runtime.flight.record import FlightDump, ProcessState, RankFlight, Source
from dp_runtime.flight.report import report
from dp_runtime.parallel.agreement import StepRecord
from tests.dp_runtime.flight.flights import Clock, Flights


def texts(dump: FlightDump) -> list[str]:
    findings = diagnose(dump)
    assert report(dump, findings)
    return [finding.text for finding in findings]


def the_odd(findings: Sequence[Finding]) -> list[int]:
    return [rank for finding in findings for rank in finding.dp_ranks]


def changed(dump: FlightDump, dp_rank: int, **fields: object) -> FlightDump:
    ranks = list(dump.ranks)
    ranks[dp_rank] = replace(ranks[dp_rank], **fields)  # type: ignore[arg-type]
    return replace(dump, ranks=tuple(ranks))


def test_ranks_that_step_together_are_well(clock: Clock) -> None:
    flights = Flights(clock)
    assert texts(flights.dump()) == []
    flights.step(40)
    assert texts(flights.dump()) == []
    flights.post(0)
    assert texts(flights.dump(after_ms=500)) == []  # the others may be busy


@pytest.fixture
def stopped(clock: Clock) -> FlightDump:
    """Rank 2 hangs before collective 3 of step 20, in which the others wait for 5 seconds."""
    flights = Flights(clock)
    flights.step(20)
    records = [flights.record(rank) for rank in range(4)]
    for rank in range(4):
        flights.run(rank, records, stop_in=2 if rank == 2 else 3)
    flights.ranks[2].leave()
    for rank in (0, 1, 3):
        clock.set(5206.0 + flights.late(rank, 20))
        flights.ranks[rank].fail(
            CollectiveTimeout("reduce_scatter: waited 5 s for ranks 2")
            if rank
            else CollectiveAborted("aborted by rank 1: CollectiveTimeout: reduce_scatter: ...")
        )
    return flights.dump(after_ms=5010)


def test_a_rank_that_does_not_enter_a_collective(stopped: FlightDump) -> None:
    (text,) = texts(stopped)
    assert text == (
        "rank 2: it is behind the others; in step 20: pass 0 (target), after all_gather #82 "
        "(MoE layer 1), for 5.0 s; it did not enter reduce_scatter #83 (MoE layer 1), for which "
        "ranks 0, 1, 3 waited 5.0 s"
    )


def test_a_process_that_is_stopped_or_has_ended(stopped: FlightDump) -> None:
    asleep = changed(stopped, 2, process=ProcessState.STOPPED, silent_s=6.2)
    (text,) = texts(asleep)
    assert text.startswith("rank 2: its process is stopped (SIGSTOP, or a debugger); in step 20")
    assert "last answer to the driver 6.2 s before" in text
    assert "it did not enter reduce_scatter #83" in text
    (text,) = texts(changed(stopped, 2, process=ProcessState.ENDED))
    assert text.startswith("rank 2: its process has ended; in step 20")
    lost = replace(stopped, ranks=(*stopped.ranks[:3], RankFlight(3, Source.NONE)))
    assert texts(lost)[0].startswith(
        "rank 3: nothing of it could be read; the others last agreed with it on step 20, where it "
        "had 4 rows; it did not enter "
    )


def test_a_rank_that_does_not_post_its_record(clock: Clock) -> None:
    flights = Flights(clock)
    flights.step(20)
    for rank in (0, 2, 3):
        flights.post(rank)
    (text,) = texts(flights.dump(after_ms=2001))
    assert text == (
        "rank 1: it is behind the others; in step 19: commit, for 2.0 s; it did not post its "
        "record of step 20, for which ranks 0, 2, 3 waited 2.0 s"
    )


def test_a_rank_with_an_error_of_its_own(stopped: FlightDump) -> None:
    failed = changed(stopped, 2, error="IndexError at dp_runtime/scheduler/scheduler.py:12")
    (text,) = texts(failed)
    assert text.startswith("rank 2: it failed: IndexError at dp_runtime/scheduler")
    assert "for which ranks 0, 1, 3 waited" in text


def test_a_record_of_another_step(clock: Clock) -> None:
    flights = Flights(clock)
    flights.step(20)
    for rank, flight in enumerate(flights.ranks):
        step = 21 if rank == 3 else 20
        flight.schedule(step)
        flight.post(StepRecord(0, step, 0, (1,)))
        flight.fail(RankDisagreement("ranks disagree about the step"))
    (text,) = texts(flights.dump())
    assert text.startswith(
        "rank 3: its record (epoch, step, program, number of passes) is (0, 21, 0, 1), that of "
        "ranks 0, 1, 2 is (0, 20, 0, 1)"
    )


def test_a_rank_that_came_to_another_agreement(clock: Clock) -> None:
    flights = Flights(clock)
    flights.step(10)
    records = [flights.record(rank) for rank in range(4)]
    for rank in range(4):
        seen = [records[0], *records[2:], records[3]] if rank == 1 else records
        flights.run(rank, seen)
    flights.steps += 1
    found = texts(flights.dump())
    assert found[0].startswith("rank 1: its agreement on step 10 is ('run', 0, ('target', 'eager'")
    assert "that of ranks 0, 2, 3 is" in found[0]


def test_a_rank_with_other_collectives(clock: Clock) -> None:
    flights = Flights(clock)
    flights.step(10)
    dump = flights.dump()
    last = dump.ranks[2].steps[-1]
    steps = (*dump.ranks[2].steps[:-1], replace(last, collectives=last.collectives[:-1]))
    (text,) = texts(changed(dump, 2, steps=steps))
    assert text.startswith("rank 2: its collectives of step 9 is ")


def test_a_rank_that_is_always_late(clock: Clock) -> None:
    flights = Flights(clock, late=lambda rank, step: 0.6 if rank == 1 else 0.05 * (step % 3))
    flights.step(40)
    (text,) = texts(flights.dump())
    assert text.startswith("rank 1: it is slow: in the last 40 busy steps it was the last at 100%")
    assert "2.76 ms a step for it alone" in text
    assert "It had 2.0 rows a step, the others 2.7" in text
    few = Flights(clock, late=flights.late)
    few.step(10)
    assert texts(few.dump()) == []


def test_a_report_has_titles_units_and_every_rank(stopped: FlightDump) -> None:
    shown = report(stopped, diagnose(stopped))
    lines = shown.splitlines()
    assert lines[0].startswith("Flight record of 4 ranks on ")
    assert "Odd: rank 2" in lines
    table = lines[lines.index(next(line for line in lines if line.startswith("Ranks ("))) + 1 :]
    assert table[0].split() == [
        "rank", "process", "read", "from", "last", "step", "rows", "answered", "where", "it", "is",
    ]  # fmt: skip
    assert [row.split()[0] for row in table[1:5]] == ["0", "1", "2", "3"]
    assert "target eager" in lines[-1]
    assert "1,2,3,4" in lines[-1]


def test_one_rank_alone(clock: Clock) -> None:
    flights = Flights(clock, dp_size=1, late=lambda rank, step: 0.0)
    flights.step(40)
    assert texts(flights.dump()) == []
    assert the_odd(diagnose(changed(flights.dump(), 0, process=ProcessState.STOPPED))) == [0]

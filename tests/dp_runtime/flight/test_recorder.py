"""What a rank notes is what is read from its ring, whoever reads it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from dataclasses import replace
from multiprocessing.queues import SimpleQueue

import pytest

from dp_runtime.core.step_program import Pass, Program
from dp_runtime.errors import CollectiveAborted, CollectiveTimeout
from dp_runtime.flight.reading import read_ring
from dp_runtime.flight.record import CollectiveFlight, Source
from dp_runtime.flight.recorder import FlightRecorder, Kind, describe, without_foreign_text
from dp_runtime.flight.ring import NUM_STEPS, FlightRing, RingLayout, wall_offset_ns
from dp_runtime.host.memory_address import MemoryAddress
from dp_runtime.parallel.agreement import StepRecord, agree
from tests.dp_runtime.flight.flights import Clock, Flights
from tests.signals import stop

LAYOUT = RingLayout(2, 3, 12)


def test_a_step_is_read_as_it_was_noted(clock: Clock) -> None:
    program = Program((Pass.DRAFT, Pass.TARGET, Pass.DRAFT_EXTEND))
    records = [
        StepRecord(3, 17, 0, (1, 2, 3), 40, 5, 4, 7, 0, 99, 2, 1, 800),
        StepRecord(3, 17, 0, (0, 6, 0)),
    ]  # fmt: skip
    flight = FlightRecorder.in_process(1, LAYOUT)
    flight.join(3, "shared_memory")
    flight.schedule(17)
    clock.now_ns += 5000
    flight.post(records[0])
    flight.agree(agree(records, (program,)))
    for index in range(3):
        flight.begin_pass(index)
        clock.now_ns += 1000
        flight.enter(Kind.ALL_GATHER, 12, 128)
        clock.now_ns += 2000
        if index < 2:
            flight.leave()
            flight.end_pass()
    found = read_ring(flight.snapshot(), Source.MEMORY)
    zero = found.clock_offset_us + 10**9
    assert (found.dp_rank, found.pid, found.epoch) == (1, os.getpid(), 3)
    assert (found.transport, found.source, found.error) == ("shared_memory", "memory", "")
    assert (found.phase, found.phase_step, found.phase_pass) == ("pass", 17, 2)
    assert found.since_us == zero + 11
    (step,) = found.steps
    assert (step.epoch, step.step_id, step.record_key) == (3, 17, (3, 17, 0, 3))
    assert (step.begun_us, step.posted_us, step.sampled_us) == (zero, zero + 5, 0)
    assert (step.rows, step.queued_tokens, step.graph_votes) == ((1, 2, 3), 40, 7)
    assert (step.drafts_proposed, step.drafts_accepted, step.waited_us) == (5, 4, 99)
    assert (step.prefill_rows, step.num_sampling, step.step_us) == (2, 1, 800)
    assert (step.outcome, step.next_program_id) == ("run", 0)
    assert [one.kind for one in step.passes] == ["draft", "target", "draft_extend"]
    assert [one.mode for one in step.passes] == ["eager"] * 3
    assert [one.real_rows for one in step.passes] == [(1, 0), (2, 6), (3, 0)]
    assert [one.gathered_rows for one in step.passes] == [2, 12, 6]
    assert [one.ended_us > 0 for one in step.passes] == [True, True, False]
    assert [one.first_collective for one in step.passes] == [0, 1, 2]
    assert step.collectives[1] == CollectiveFlight(1, "all_gather", 1, 12, 128, zero + 9, zero + 11)
    assert found.last_collective == step.collectives[2]
    assert step.collectives[2].left_us == 0


def test_the_last_steps_are_kept_over_epochs(clock: Clock) -> None:
    flights = Flights(clock, dp_size=2)
    flights.step(NUM_STEPS + 20)
    found = read_ring(flights.ranks[0].snapshot(), Source.MEMORY)
    assert [step.step_id for step in found.steps] == list(range(20, NUM_STEPS + 20))
    assert all(len(step.collectives) == 4 for step in found.steps)
    flights.ranks[0].fail(CollectiveTimeout("record of step 9: waited 1 s for ranks 1"))
    flights.epoch, flights.steps = 1, 0
    flights.ranks[0].join(1, "in_process")
    flights.step(3)
    found = read_ring(flights.ranks[0].snapshot(), Source.MEMORY)
    assert [step.key for step in found.steps[-4:]] == [(0, NUM_STEPS + 19), (1, 0), (1, 1), (1, 2)]
    assert len(found.steps) == NUM_STEPS
    assert [one.number for one in found.steps[-3].collectives] == [0, 1, 2, 3]
    assert found.error == ""


def test_an_idle_rank_and_one_that_ends() -> None:
    flight = FlightRecorder.in_process(0, LAYOUT)
    assert read_ring(flight.snapshot(), Source.MEMORY).phase == "starting"
    flight.join(0, "in_process")
    for fault_bits, phase in ((0, "idle"), (1, "ended")):
        flight.schedule(fault_bits)
        record = StepRecord(0, fault_bits, 0, (0,), fault_bits=fault_bits)
        flight.post(record)
        flight.agree(agree([record] * 2, (Program((Pass.TARGET,)),)))
        if not fault_bits:
            flight.rest()
        found = read_ring(flight.snapshot(), Source.MEMORY)
        assert (found.phase, found.phase_step) == (phase, fault_bits)
    assert [step.outcome for step in found.steps] == ["idle", "stop"]


def step_for_ever(told: SimpleQueue[MemoryAddress | None]) -> None:
    ring = FlightRing.shared(LAYOUT, 1)
    flight = FlightRecorder(ring)
    flight.join(0, "shared_memory")
    flight.schedule(5)
    told.put(ring.address)
    signal.pause()


@pytest.mark.skipif(sys.platform != "linux", reason="rings are shared through Linux's memfd")
def test_a_ring_is_readable_while_its_process_is_stopped_and_after_its_end() -> None:
    fork = multiprocessing.get_context("fork")
    told: SimpleQueue[MemoryAddress | None] = fork.SimpleQueue()
    process = fork.Process(target=step_for_ever, args=(told,), daemon=True)
    process.start()
    address, pid = told.get(), process.pid
    assert address is not None
    assert pid is not None
    stop(pid)
    memory = address.map()
    assert memory is not None
    for wrong in ({"host": "other"}, {"descriptor": 0}, {"pid": os.getpid(), "descriptor": 10**6}):
        assert replace(address, **wrong).map() is None
    process.kill()
    process.join()
    found = read_ring(memory[:], Source.MEMORY)
    assert (found.dp_rank, found.pid, found.phase_step) == (1, pid, 5)
    assert address.map() is None  # it has no name to be found by any more


def test_bytes_that_are_no_ring_are_refused() -> None:
    ring = FlightRing.in_process(LAYOUT, 0).snapshot()
    for broken in (b"", b"x" * len(ring), ring[:-1], ring + b"\0"):
        with pytest.raises(ValueError, match="ring: "):
            read_ring(broken, Source.ANSWER)


def test_an_error_is_named_with_its_place_and_without_its_text() -> None:
    with pytest.raises(AssertionError) as caught:
        StepRecord.from_words([5])
    text = describe(caught.value)
    assert text.startswith("AssertionError at dp_runtime/parallel/agreement.py:")
    assert "words" not in text
    assert describe(KeyError("secret")) == "KeyError"
    timeout = CollectiveTimeout("all_gather: waited 1 s for ranks 2")
    assert describe(timeout) == f"CollectiveTimeout: {timeout}"
    aborted = CollectiveAborted("aborted by rank 1: KeyError: 'secret: rank 1: x'")
    assert describe(aborted) == "CollectiveAborted: aborted by rank 1: KeyError: ..."
    kept = "rank 2 has not answered; rank 0: CollectiveTimeout: all_gather: waited 1 s for ranks 2"
    assert without_foreign_text(kept) == kept


def test_the_offset_of_the_wall_clock_is_read_where_nothing_came_between() -> None:
    clock = iter([0, 1000, 2000, 2010, 3000, 4000, 5000, 6000, 7000, 9000])
    wall = iter([700, 10_005, 900, 900, 900])
    assert wall_offset_ns(lambda: next(clock), lambda: next(wall)) == 10_005 - 2005

"""From the bytes of a ring to values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from dp_runtime.core.step_program import MAX_PASSES
from dp_runtime.errors import require
from dp_runtime.flight.record import (
    CollectiveFlight,
    PassFlight,
    RankFlight,
    Source,
    StepFlight,
)
from dp_runtime.flight.recorder import MODE_CODES, PASS_CODES, Kind, Outcome, Phase
from dp_runtime.flight.ring import (
    BEGUN,
    CLOCK,
    CLOCK_AT,
    COLLECTIVE,
    COMMITTED_AT,
    COMMITTING_AT,
    EPOCH,
    EPOCH_AT,
    ERROR,
    ERROR_AT,
    HEAD,
    MAGIC,
    MARK,
    NOW,
    NOW_AT,
    NUM_STEPS,
    PASS_TIMES,
    PASSES_AT,
    POSTED,
    POSTED_AT,
    RANK,
    RANK_AT,
    SAMPLED_AT,
    RingLayout,
)

PASSES = {code: str(pass_kind) for pass_kind, code in PASS_CODES.items()}
MODES = {code: str(mode) for mode, code in MODE_CODES.items()}
KINDS, OUTCOMES, PHASES = (
    {item.value: item.name.lower() for item in names} for names in (Kind, Outcome, Phase)
)


def read_ring(ring: bytes, source: Source) -> RankFlight:
    """Read a copy of a ring, whose owner may have been writing a step of it."""
    require(ring[: len(MAGIC)] == MAGIC, "ring", ring[: len(MAGIC)], f"bytes that begin {MAGIC!r}")
    layout = RingLayout(*HEAD.unpack_from(ring)[1:])
    size = layout.total_bytes
    require(len(ring) == size, "ring", f"{len(ring)} bytes", f"{size} bytes, as its head says")
    return _Reader(ring, layout, CLOCK.unpack_from(ring, CLOCK_AT)[0]).rank(source)


@dataclass(frozen=True, eq=False)
class _Reader:
    ring: bytes
    layout: RingLayout
    offset_ns: int

    def rank(self, source: Source) -> RankFlight:
        dp_rank, pid, host = RANK.unpack_from(self.ring, RANK_AT)
        epoch, transport = EPOCH.unpack_from(self.ring, EPOCH_AT)
        phase, turn, index, since = NOW.unpack_from(self.ring, NOW_AT)
        error_at, error = ERROR.unpack_from(self.ring, ERROR_AT)
        return RankFlight(
            dp_rank, source, host=_text(host), pid=pid, epoch=epoch, transport=_text(transport),
            clock_offset_us=self.offset_ns // 1000, phase=_name(PHASES, phase),
            phase_step=BEGUN.unpack_from(self.ring, self.layout.step(turn))[2] if phase else -1,
            phase_pass=index, since_us=self._us(since), error=_text(error),
            error_us=self._us(error_at), steps=self._steps(),
        )  # fmt: skip

    def _steps(self) -> tuple[StepFlight, ...]:
        collectives = self._collectives()
        slots = [self.layout.step(turn) for turn in range(NUM_STEPS)]
        turns = [(BEGUN.unpack_from(self.ring, at)[0], at) for at in slots]
        return tuple(self._step(at, collectives[turn]) for turn, at in sorted(turns) if turn > 0)

    def _collectives(self) -> defaultdict[int, list[CollectiveFlight]]:
        found: defaultdict[int, list[CollectiveFlight]] = defaultdict(list)
        part = memoryview(self.ring)[self.layout.collectives_at :]
        for turn, number, kind, index, rows, row_bytes, entered, left in COLLECTIVE.iter_unpack(
            part
        ):
            if turn > 0:
                times = self._us(entered), self._us(left)
                found[turn].append(
                    CollectiveFlight(number, _name(KINDS, kind), index, rows, row_bytes, *times)
                )
        for one in found.values():
            one.sort()
        return found

    def _step(self, at: int, collectives: list[CollectiveFlight]) -> StepFlight:
        _, epoch, step_id, begun = BEGUN.unpack_from(self.ring, at)
        *words, posted = POSTED.unpack_from(self.ring, at + POSTED_AT)
        num_passes = min(max(words[3], 0), MAX_PASSES)
        agreed_at = at + self.layout.agreed_at
        agreed, outcome, next_program, _ = self.layout.agreed(0).unpack_from(self.ring, agreed_at)
        sampled, committing, committed = (
            self._us(MARK.unpack_from(self.ring, at + mark)[0])
            for mark in (SAMPLED_AT, COMMITTING_AT, COMMITTED_AT)
        )
        queued, proposed, accepted, votes, faults, waited, *load = words[4 + MAX_PASSES :]
        prefill_rows, num_sampling, step_us, _ = load
        return StepFlight(
            epoch=epoch, step_id=step_id, begun_us=self._us(begun), posted_us=self._us(posted),
            agreed_us=self._us(agreed), sampled_us=sampled, committing_us=committing,
            committed_us=committed, record_key=tuple(words[:4]),
            rows=tuple(words[4 : 4 + num_passes]), queued_tokens=queued,
            drafts_proposed=proposed, drafts_accepted=accepted, graph_votes=votes,
            fault_bits=faults, waited_us=waited, prefill_rows=prefill_rows,
            num_sampling=num_sampling, step_us=step_us, outcome=_name(OUTCOMES, outcome),
            next_program_id=next_program, passes=self._passes(at),
            collectives=tuple(collectives),
        )  # fmt: skip

    def _passes(self, at: int) -> tuple[PassFlight, ...]:
        agreed_at, layout = at + self.layout.agreed_at, self.layout
        num_passes = layout.agreed(0).unpack_from(self.ring, agreed_at)[3]
        num_passes = min(max(num_passes, 0), layout.max_passes)
        words = layout.agreed(num_passes).unpack_from(self.ring, agreed_at)[4:]
        width, passes = 3 + layout.dp_size, []
        for index in range(num_passes):
            kind, mode, gathered, *real = words[index * width : (index + 1) * width]
            times_at = at + PASSES_AT + index * PASS_TIMES.size
            begun, ended, first = PASS_TIMES.unpack_from(self.ring, times_at)
            passes.append(
                PassFlight(
                    _name(PASSES, kind), _name(MODES, mode), gathered, tuple(real),
                    self._us(begun), self._us(ended), first,
                )
            )  # fmt: skip
        return tuple(passes)

    def _us(self, time_ns: int) -> int:
        return (time_ns + self.offset_ns) // 1000 if time_ns else 0


def _name(names: Mapping[int, str], code: int) -> str:
    """Name a code; "?" for one that was half written."""
    return names.get(code, "?")


def _text(text: bytes) -> str:
    return text.split(b"\0")[0].decode(errors="replace")

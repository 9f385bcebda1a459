"""RankWatch: asks every rank how it is, and notices who does not answer or does not step."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from collectives.awake_clock import LOOK_EVERY_S, AwakeClock
from dp_runtime.config import EngineConfig
from dp_runtime.metrics.status import RankHealth, RankState
from workers.messages import Message, ReadHealth

BEAT_S = 0.5  # after an answer, until the next question
RECENT_S = 3 * BEAT_S  # a rank that has answered since then is well
MIN_SILENCE_S = 2.0  # a rank on a busy machine may take so long
TOGETHER = 5  # times as long may all ranks be silent: they are paused, not lost
LOADING = 5  # times as long may one be that loads: much of that may hold the GIL
ASK_S = 1.0
LOADS = (RankState.STARTING, RankState.LOADING, RankState.COMPILING)

OnSilence = Callable[[Sequence[int], str], None]  # of no ranks: of one for which all wait


class Answering(Protocol):
    dp_rank: int
    answered: bool  # its process has come up, as the driver knows from another answer

    def call(self, message: Message[RankHealth]) -> Future[RankHealth]: ...


@dataclass(frozen=True)
class SilenceLimits:
    """Bounds how long a rank may be silent before it counts as lost, in seconds."""

    first: float  # before it has answered for the first time
    later: float
    step: float = math.inf  # in a step, for how long none may end
    loading: float = math.inf  # once it has answered

    @classmethod
    def while_starting(cls, config: EngineConfig) -> SilenceLimits:
        """Allow half the start for its process to come up, and less once it answers."""
        half = max(config.start_timeout_s / 2, MIN_SILENCE_S)
        later = min(half, max(config.step_timeout_s, 5 * MIN_SILENCE_S))
        return cls(half, later, loading=later)

    @classmethod
    def while_serving(cls, config: EngineConfig) -> SilenceLimits:
        """Allow a process that takes another's place as long as at the start."""
        later = max(config.hang_timeout_s, MIN_SILENCE_S) + BEAT_S
        step = config.hang_timeout_s if config.device == "cuda" else config.step_timeout_s
        first = cls.while_starting(config).first
        return cls(first, later, max(step, MIN_SILENCE_S), min(first, LOADING * later))


@dataclass(eq=False)
class _Pulse:
    rank: Answering
    answered_at: float
    question: Future[RankHealth] | None = None
    health: RankHealth | None = None
    comes_up: bool = True  # its process has not answered anybody yet, as far as is known
    loads: bool = True  # as far as is known
    is_lost: bool = False  # and was reported
    moved_at: float = math.inf  # when it was last seen to rest, or to have ended or captured more

    @property
    def has_come_up(self) -> bool:
        return self.rank.answered or not self.comes_up

    def limit(self, limits: SilenceLimits) -> float:
        if not self.has_come_up:
            return limits.first
        return limits.loading if self.loads else limits.later

    def begin(self, now: float) -> None:
        self.answered_at, self.question, self.health = now, None, None
        self.comes_up, self.loads, self.is_lost, self.moved_at = True, True, False, math.inf

    def serve(self, now: float) -> None:
        """Take it that the rank has joined, whatever it answered before that."""
        self.comes_up, self.loads, self.is_lost, self.moved_at = False, False, False, now
        self.question = None

    def beat(self, now: float) -> None:
        """Take in an answer, and ask again a while after it."""
        if self.question is not None and self.question.done():
            self.answered_at = now  # an error is an answer too
            if self.question.exception() is None:
                self._take(self.question.result(), now)
            self.question = None
        if self.question is None and (self.health is None or now - self.answered_at >= BEAT_S):
            self.question = self.rank.call(ReadHealth())

    def _take(self, health: RankHealth, now: float) -> None:
        before, self.health, self.comes_up = self.health, health, False
        self.loads = health.state in LOADS
        steps = health.state in (RankState.RUNNING, RankState.CAPTURING)
        if not steps or before is None or _place(before) != _place(health):
            self.moved_at = now


class RankWatch:
    """Asks in a thread of its own; ranks answer in one that neither steps nor loads."""

    def __init__(
        self,
        ranks: Sequence[Answering],
        limits: SilenceLimits,
        on_silence: OnSilence,
    ) -> None:
        self._judging = (limits, on_silence)
        self._clock = AwakeClock()
        self._now = self._clock.now()
        self._pulses = {rank: _Pulse(rank, self._now) for rank in ranks}
        self._lock = threading.Lock()  # of what pulses know
        self._over = threading.Event()
        threading.Thread(target=self._run, name="rank-watch", daemon=True).start()

    @property
    def healths(self) -> tuple[RankHealth, ...]:
        return tuple(pulse.health for pulse in self._all if pulse.health is not None)

    @property
    def silences_s(self) -> dict[int, float]:  # by dp_rank, since its last answer
        return {pulse.rank.dp_rank: self._now - pulse.answered_at for pulse in self._all}

    @property
    def _all(self) -> tuple[_Pulse, ...]:
        return tuple(self._pulses.values())

    def follow(self, ranks: Sequence[Answering]) -> None:
        """Watch these from now on, and nobody else."""
        new = {rank: _Pulse(rank, self._now) for rank in ranks if rank not in self._pulses}
        self._pulses = {rank: new.get(rank) or self._pulses[rank] for rank in ranks}

    def silent(self, limit: float = RECENT_S) -> list[int]:
        now = self._now
        return [one.rank.dp_rank for one in self._all if now - one.answered_at > limit]

    def ask(self) -> list[int]:
        """Ask all ranks now, and return those that do not answer within ASK_S."""
        questions = {rank.dp_rank: rank.call(ReadHealth()) for rank in self._pulses}
        wait(questions.values(), ASK_S)
        return [dp_rank for dp_rank, question in questions.items() if not question.done()]

    def renew(self, dp_ranks: Collection[int]) -> None:
        """Other processes take the place of these ranks."""
        with self._lock:
            for pulse in self._all:
                if pulse.rank.dp_rank in dp_ranks:
                    pulse.begin(self._now)

    def serve(self, limits: SilenceLimits, on_silence: OnSilence) -> None:
        """Judge by these limits, now that all ranks have joined; tell anew of who is silent."""
        with self._lock:
            for pulse in self._all:
                pulse.serve(self._now)
        self._judging = (limits, on_silence)

    def end(self) -> None:
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            self._now = self._clock.now()
            with self._lock:
                for pulse in self._all:
                    pulse.beat(self._now)
            limits, on_silence = self._judging
            if lost := self._lost(limits):
                for pulse in lost:
                    pulse.is_lost = True
                text = _silence_of(lost, self._now)
                on_silence([pulse.rank.dp_rank for pulse in lost], text)
            if stuck := self._stuck(limits):
                text = f"ranks {stuck} have ended no step for {limits.step:g} s"
                on_silence([], text)

    def _stuck(self, limits: SilenceLimits) -> list[int]:
        stuck = [one for one in self._all if one.answered_at - one.moved_at > limits.step]
        for pulse in stuck:
            pulse.moved_at = self._now
        return [pulse.rank.dp_rank for pulse in stuck]

    def _lost(self, limits: SilenceLimits) -> list[_Pulse]:
        pulses = self._all
        together = len(pulses) > 1 and len(self.silent()) == len(pulses)
        factor = TOGETHER if together else 1
        return [
            pulse
            for pulse in pulses
            if not pulse.is_lost and self._now - pulse.answered_at > factor * pulse.limit(limits)
        ]


@contextmanager
def watched(newcomers: Sequence[Answering], config: EngineConfig) -> Iterator[Callable[[], str]]:
    """Watch ranks that do not serve yet; yields what says who is silent, if anybody is."""
    texts: list[str] = []
    limits = SilenceLimits.while_serving(config)
    watch = RankWatch(newcomers, limits, lambda dp_ranks, text: texts.append(text))
    try:
        yield lambda: texts[0] if texts else ""
    finally:
        watch.end()


def _place(health: RankHealth) -> tuple[RankState, int, int, int]:
    return health.state, health.epoch, health.last_step, health.graphs_captured


def _silence_of(pulses: Sequence[_Pulse], now: float) -> str:
    seconds = max(now - pulse.answered_at for pulse in pulses)
    return name_silent([pulse.rank.dp_rank for pulse in pulses], f" for {seconds:.1f} s")


def name_silent(dp_ranks: Sequence[int], how_long: str = "") -> str:
    """Say who does not answer, and what that means."""
    who = f"rank {dp_ranks[0]} has" if len(dp_ranks) == 1 else f"ranks {list(dp_ranks)} have"
    return f"{who} not answered{how_long}: the process is stopped, or hangs"

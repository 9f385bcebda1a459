"""Workload: the conversations of an experiment, the same for everyone who has its values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dp_runtime.core.settings import setting
from dp_runtime.errors import require
from dp_runtime.experiments.tables import Checked, Table, as_table, read_kind, read_table, within
from dp_runtime.experiments.workload.arrivals import ARRIVALS, Arrivals
from dp_runtime.experiments.workload.conversations import Conversation, Segment, Turn
from dp_runtime.experiments.workload.lengths import LENGTHS, Lengths
from dp_runtime.experiments.workload.skew import SKEWS, Ranks, Skew
from dp_runtime.experiments.workload.traces import BurstGpt, Mooncake, TracedRequest

OWN_KEY, SYSTEM_KEY = 3, 4  # first parts of segments' keys; traces have 1 and 2
ARRIVING, LENGTH, ANSWER, RANK, SYSTEM = range(5)  # streams of draws: one more draw moves no other


@dataclass(frozen=True)
class Workload(ABC):
    """What is asked, when, and of which rank; `conversations` is a pure function of its values."""

    seed: int
    skew: Skew

    @abstractmethod
    def conversations(self, dp_size: int) -> tuple[Conversation, ...]:
        """Return them in the order of arrival; ValueError if the skew does not fit the ranks."""

    def _ranks(self, count: int, dp_size: int) -> Ranks:
        with within("workload.skew"):
            return self.skew.ranks(count, dp_size, self._rng(RANK))

    def _rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream])


@dataclass(frozen=True)
class Shape(Checked):
    """Numbers of a workload that is drawn."""

    num_requests: int = setting(64, "requests, all turns together", at_least=1)
    turns: int = setting(1, "requests of a conversation, each after the answer before", at_least=1)
    think_s: float = setting(0.0, "seconds from an answer to the next turn", at_least=0)
    system_prompts: int = setting(0, "prompts that conversations share", at_least=0)
    system_prompt_tokens: int = setting(0, "tokens of each", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = self.num_requests % self.turns == 0
        require(ok, "num_requests", self.num_requests, f"a multiple of turns, {self.turns}")
        ok = bool(self.system_prompts) == bool(self.system_prompt_tokens)
        tokens = self.system_prompt_tokens
        require(ok, "system_prompt_tokens", tokens, "above 0 with system_prompts, else 0")


@dataclass(frozen=True)
class DrawnWorkload(Workload):
    """Random prompts, whose times and lengths are drawn."""

    shape: Shape
    arrivals: Arrivals
    prompts: Lengths  # new tokens of a turn
    outputs: Lengths

    def conversations(self, dp_size: int) -> tuple[Conversation, ...]:
        shape, turns = self.shape, self.shape.turns
        count = shape.num_requests // turns
        times = self.arrivals.times(count, self._rng(ARRIVING))
        prompts = self.prompts.draw(shape.num_requests, self._rng(LENGTH)).reshape(count, turns)
        outputs = self.outputs.draw(shape.num_requests, self._rng(ANSWER)).reshape(count, turns)
        ranks = self._ranks(count, dp_size)
        systems = self._rng(SYSTEM).integers(0, max(shape.system_prompts, 1), count)
        return tuple(
            Conversation(float(at_s), rank, self._turns(number, prompt, output, int(system)))
            for number, (at_s, rank, prompt, output, system) in enumerate(
                zip(times, ranks, prompts.tolist(), outputs.tolist(), systems, strict=True)
            )
        )

    def _turns(
        self, number: int, prompts: list[int], outputs: list[int], system: int
    ) -> tuple[Turn, ...]:
        turns = []
        for turn, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            own = Segment((OWN_KEY, self.seed, number, turn), prompt)
            shared = Segment((SYSTEM_KEY, self.seed, system), self.shape.system_prompt_tokens)
            begins = turn == 0 and self.shape.system_prompts > 0
            think_s = self.shape.think_s if turn else 0.0
            turns.append(Turn((shared, own) if begins else (own,), output, think_s))
        return tuple(turns)


@dataclass(frozen=True)
class TracedWorkload(Workload):
    """The requests of a published trace."""

    trace: Mooncake | BurstGpt

    def conversations(self, dp_size: int) -> tuple[Conversation, ...]:
        requests: list[TracedRequest] = self.trace.requests(self.seed)
        ranks = self._ranks(len(requests), dp_size)
        return tuple(
            Conversation(request.at_s, rank, (request.turn,))
            for rank, request in zip(ranks, requests, strict=True)
        )


@dataclass(frozen=True)
class Seeded(Checked):
    seed: int = setting(0, "of every draw", at_least=0)


TRACES: Mapping[str, type[Mooncake] | type[BurstGpt]] = {"mooncake": Mooncake, "burstgpt": BurstGpt}
DRAWN = "drawn"
PARTS = ("arrivals", "prompts", "outputs")  # tables of a workload that is drawn
PROMPTS = {"kind": "log_uniform", "shortest": 16, "longest": 512}
OUTPUTS = {"kind": "log_uniform", "shortest": 16, "longest": 128}


def read_workload(value: object, where: str = "workload") -> Workload:
    """Read the table of a workload; ValueError names the field by its dotted path."""
    table = dict(as_table(value, where))
    kind = table.pop("kind", DRAWN)
    kinds = (DRAWN, *TRACES)
    require(kind in kinds, f"{where}.kind", kind, f"one of {', '.join(kinds)}")
    seed = read_table(Seeded, {"seed": table.pop("seed", 0)}, where).seed
    skew = read_kind(SKEWS, table.pop("skew", {"kind": "routed"}), f"{where}.skew")
    if kind != DRAWN:
        return TracedWorkload(seed, skew, read_table(TRACES[kind], table, where))
    return _drawn(seed, skew, table, where)


def _drawn(seed: int, skew: Skew, table: Table, where: str) -> DrawnWorkload:
    arrivals = table.get("arrivals", {"kind": "all_at_once"})
    numbers = {name: value for name, value in table.items() if name not in PARTS}
    shape = read_table(Shape, numbers, where)
    return DrawnWorkload(
        seed, skew, shape,
        read_kind(ARRIVALS, arrivals, f"{where}.arrivals"),
        read_kind(LENGTHS, table.get("prompts", PROMPTS), f"{where}.prompts"),
        read_kind(LENGTHS, table.get("outputs", OUTPUTS), f"{where}.outputs"),
    )  # fmt: skip

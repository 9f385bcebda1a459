"""Scenario: the events of a run, checked before anything starts."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from time import monotonic

from dp_runtime.config import EngineConfig
from dp_runtime.core.membership import Membership
from dp_runtime.engine.async_engine import AsyncEngine
from dp_runtime.errors import require
from dp_runtime.experiments.scenario.events import EVENTS, Drain, Event, RankEvent, Resize
from dp_runtime.experiments.tables import as_table, read_kind, within

LOOK_EVERY_S = 0.05


@dataclass(frozen=True)
class Scenario:
    events: Mapping[str, Event]  # by name

    @classmethod
    def read(cls, value: object) -> Scenario:
        """Read a table of events; ValueError names the field by its dotted path."""
        table = as_table(value, "scenario")
        return cls({n: read_kind(EVENTS, each, f"scenario.{n}") for n, each in table.items()})

    @property
    def happens_to_ranks(self) -> bool:
        return any(isinstance(event, RankEvent) for event in self.events.values())

    @property
    def changes_ranks(self) -> bool:
        return any(isinstance(event, Drain | Resize) for event in self.events.values())

    def injected(self, config: EngineConfig) -> EngineConfig:
        """Return the configuration whose ranks let their events happen; ValueError if not."""
        faults = [config.inject] if config.inject else []
        for name, event in self.events.items():
            if isinstance(event, RankEvent) and event.fault:
                with within(f"scenario.{name}"):
                    replace(config, inject=event.fault)
                faults.append(event.fault)
        return replace(config, inject=";".join(faults) or None)

    def check_changes(self, dp_size: int) -> None:
        """Raise ValueError for a rank that does not serve when it is to be drained."""
        members = Membership.first(dp_size)
        for name, event in self._changes():
            match event:
                case Drain(rank=rank):
                    ok = rank in members and members.size > 1
                    require(ok, f"scenario.{name}.rank", rank, f"one of several ranks, {members}")
                    members = members.without({rank})
                case Resize(dp_size=size):
                    members = members.resized(size)

    async def play(self, engine: AsyncEngine, start_s: float) -> None:
        """Change the ranks, each change at its step or time."""
        for _, event in self._changes():
            await _moment(event, engine, start_s)
            match event:
                case Drain(rank=rank, timeout_s=timeout_s):
                    await engine.drain(rank, timeout_s)
                case Resize(dp_size=size):
                    await engine.resize(size)

    def _changes(self) -> list[tuple[str, Event]]:
        """List the changes of ranks in their order; those at steps wait for those at times."""
        changes = [each for each in self.events.items() if isinstance(each[1], Drain | Resize)]
        return sorted(changes, key=lambda each: (each[1].at_s or 0.0, each[1].at_step or 0))


async def _moment(event: Event, engine: AsyncEngine, start_s: float) -> None:
    if event.at_s is not None:
        await asyncio.sleep(start_s + event.at_s - monotonic())
        return
    assert event.at_step is not None, "an event has one of them"
    while max(rank.last_step for rank in await engine.health()) < event.at_step:
        await asyncio.sleep(LOOK_EVERY_S)

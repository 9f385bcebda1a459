"""The events of a scenario; those of ranks become faults of `inject`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass

from dp_runtime.core.settings import setting
from dp_runtime.errors import require
from dp_runtime.experiments.tables import Checked


@dataclass(frozen=True, kw_only=True)
class Event(Checked):
    """Something that happens once a step or a time has come."""

    at_step: int | None = setting(None, "first step, by the ranks' own count", at_least=0)
    at_s: float | None = setting(None, "seconds after the start, in place of at_step", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = (self.at_step is None) != (self.at_s is None)
        require(ok, "at_step", self.at_step, "either at_step or at_s")


@dataclass(frozen=True, kw_only=True)
class RankEvent(Event, ABC):
    """An event of one rank, which the rank lets happen itself."""

    rank: int = setting(MISSING, "its dp_rank", at_least=0)

    @property
    def fault(self) -> str:
        """Say it as `inject` does; empty if nothing happens."""
        begin = f"after_s={self.at_s}" if self.at_step is None else f"step={self.at_step}"
        return f"rank={self.rank},{begin},{self._what}" if self._what else ""

    @property
    @abstractmethod
    def _what(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Straggler(RankEvent):
    """Each step of the rank takes longer, up to a step or a time."""

    ms: float = setting(MISSING, "milliseconds that each step takes longer", at_least=0)
    until_step: int | None = setting(None, "last such step", at_least=0)
    until_s: float | None = setting(None, "seconds after the start, in place of it", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = (self.until_step is None) != (self.until_s is None)
        require(ok, "until_step", self.until_step, "either until_step or until_s")

    @property
    def _what(self) -> str:
        end = f"until_s={self.until_s}" if self.until_step is None else f"until={self.until_step}"
        return f"kind=slow,seconds={self.ms / 1e3},{end}" if self.ms else ""


@dataclass(frozen=True, kw_only=True)
class Pause(RankEvent):
    seconds: float = setting(MISSING, "that one step takes longer", above=0)

    @property
    def _what(self) -> str:
        return f"kind=slow,seconds={self.seconds}"


@dataclass(frozen=True, kw_only=True)
class Kill(RankEvent):
    @property
    def _what(self) -> str:
        return "kind=kill"


@dataclass(frozen=True, kw_only=True)
class Drain(Event):
    """The engine serves without the rank from then on."""

    rank: int = setting(MISSING, "its dp_rank", at_least=0)
    timeout_s: float = setting(0.0, "seconds that its requests have to end there", at_least=0)


@dataclass(frozen=True, kw_only=True)
class Resize(Event):
    dp_size: int = setting(MISSING, "ranks that serve from then on", at_least=1, at_most=4096)


EVENTS: Mapping[str, type[Event]] = {
    "straggler": Straggler, "pause": Pause, "kill": Kill, "drain": Drain, "resize": Resize,
}  # fmt: skip

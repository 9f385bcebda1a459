"""Faults that are made on purpose: `rank=2,step=50,kind=kill;rank=0,step=9,kind=slow,seconds=2`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from dp_runtime.errors import require

FIELD = "inject"
MAX_STEP = 2**31 - 1
MAX_SECONDS = 86_400.0


class FaultKind(Enum):
    KILL = "kill"  # SIGKILL to its own process
    STOP = "stop"  # SIGSTOP
    RAISE = "raise"  # an exception in a step
    SLOW = "slow"  # a step that takes so many seconds longer
    NAN = "nan"  # in the logits of one request
    OOM = "oom"  # no memory for one request's prompt
    MISMATCH = "mismatch"  # a record of another program
    DROP_WAKEUP = "drop_wakeup"  # news for an idle rank that it does not hear of


KINDS = {kind.value: kind for kind in FaultKind}
OF_THE_BOARD = (FaultKind.MISMATCH, FaultKind.DROP_WAKEUP)
SECONDS_NEEDED = "kind slow needs it, alone"
ENDS_PROCESS = (FaultKind.KILL, FaultKind.STOP)
ALLOWED = (
    f"faults as rank=2,step=50,kind=kill with kind one of {', '.join(KINDS)}, separated by ';'; "
    "epoch (else 0), after_s in place of step, of kind slow seconds, until or until_s, may follow"
)
NAMES = ("rank", "step", "after_s", "kind", "epoch", "seconds", "until", "until_s")


@dataclass(frozen=True)
class Fault:
    """Happens in the first step of the rank's epoch, from some step or time on, that it fits.

    Times are those since the rank's first step of the epoch that had rows.
    """

    dp_rank: int
    step: int
    kind: FaultKind
    epoch: int = 0  # a rank that was replaced is well
    seconds: float = 0.0
    after_s: float = 0.0
    until: int | None = None  # else once: in each step up to this one
    until_s: float | None = None

    def is_due(self, step_id: int, elapsed_s: float) -> bool:
        return step_id >= self.step and elapsed_s >= self.after_s

    def is_over(self, step_id: int, elapsed_s: float) -> bool:
        """Tell whether the steps in which it happens are past."""
        return (self.until is not None and step_id > self.until) or (
            self.until_s is not None and elapsed_s > self.until_s
        )

    @property
    def lasts(self) -> bool:
        return self.until is not None or self.until_s is not None


def read_faults(text: str | None, dp_size: int) -> tuple[Fault, ...]:
    """Read a list of faults; ValueError if one can not happen to an engine of so many ranks."""
    return tuple(_read_fault(one, dp_size) for one in text.split(";")) if text else ()


def _read_fault(text: str, dp_size: int) -> Fault:
    given: dict[str, str] = {}
    for item in text.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        require(bool(equals) and name in NAMES and name not in given, FIELD, item.strip(), ALLOWED)
        given[name] = value
    starts = ("step" in given) != ("after_s" in given)
    require(starts and given.keys() >= {"rank", "kind"}, FIELD, text.strip(), ALLOWED)
    kinds = f"kind is one of {', '.join(KINDS)}"
    require(given["kind"] in KINDS, f"{FIELD}: kind", given["kind"], kinds)
    kind = KINDS[given["kind"]]
    for name in given.keys() & {"until", "until_s"}:
        require(kind is FaultKind.SLOW, f"{FIELD}: {name}", given[name], "kind slow has it, alone")
    if kind in OF_THE_BOARD:
        timed = given.get("after_s")
        require(timed is None, f"{FIELD}: after_s", timed, f"step, with kind {kind.value}")
    seconds = given.get("seconds")
    takes = kind is FaultKind.SLOW
    require((seconds is not None) == takes, f"{FIELD}: seconds", seconds, SECONDS_NEEDED)
    return Fault(
        _count(given, "rank", dp_size - 1),
        _count(given, "step", MAX_STEP) if "step" in given else 0,
        kind,
        _count(given, "epoch", MAX_STEP) if "epoch" in given else 0,
        _seconds(given, "seconds") if "seconds" in given else 0.0,
        _seconds(given, "after_s") if "after_s" in given else 0.0,
        _count(given, "until", MAX_STEP) if "until" in given else None,
        _seconds(given, "until_s") if "until_s" in given else None,
    )


def _count(given: Mapping[str, str], name: str, most: int) -> int:
    text = given[name]
    ok = text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= most
    require(ok, f"{FIELD}: {name}", text, f"an integer of 0..{most}")
    return int(text)


def _seconds(given: Mapping[str, str], name: str) -> float:
    text = given[name]
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    ok = 0 < seconds <= MAX_SECONDS
    require(ok, f"{FIELD}: {name}", text, f"a number above 0, at most {MAX_SECONDS:g}")
    return seconds

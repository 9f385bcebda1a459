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
ENDS_PROCESS = (FaultKind.KILL, FaultKind.STOP)
ALLOWED = (
    f"faults as rank=2,step=50,kind=kill with kind one of {', '.join(KINDS)}, separated by ';'; "
    "epoch (else 0), and seconds of kind slow, may follow"
)


@dataclass(frozen=True)
class Fault:
    """Happens once, in the first step of the rank's epoch from `step` on that it fits."""

    dp_rank: int
    step: int
    kind: FaultKind
    epoch: int = 0  # a rank that was replaced is well
    seconds: float = 0.0


def read_faults(text: str | None, dp_size: int) -> tuple[Fault, ...]:
    """Read a list of faults; ValueError if one can not happen to an engine of so many ranks."""
    return tuple(_read_fault(one, dp_size) for one in text.split(";")) if text else ()


def _read_fault(text: str, dp_size: int) -> Fault:
    given: dict[str, str] = {}
    for item in text.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        known = name in ("rank", "step", "kind", "epoch", "seconds")
        require(bool(equals) and known and name not in given, FIELD, item.strip(), ALLOWED)
        given[name] = value
    require(given.keys() >= {"rank", "step", "kind"}, FIELD, text.strip(), ALLOWED)
    kinds = f"kind is one of {', '.join(KINDS)}"
    require(given["kind"] in KINDS, f"{FIELD}: kind", given["kind"], kinds)
    kind = KINDS[given["kind"]]
    rank, step = _count(given, "rank", dp_size - 1), _count(given, "step", MAX_STEP)
    epoch = _count(given, "epoch", MAX_STEP) if "epoch" in given else 0
    return Fault(rank, step, kind, epoch, _seconds(given, kind))


def _count(given: Mapping[str, str], name: str, most: int) -> int:
    text = given[name]
    ok = text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= most
    require(ok, f"{FIELD}: {name}", text, f"an integer of 0..{most}")
    return int(text)


def _seconds(given: Mapping[str, str], kind: FaultKind) -> float:
    text, takes = given.get("seconds"), kind is FaultKind.SLOW
    require((text is not None) == takes, f"{FIELD}: seconds", text, "kind slow needs it, alone")
    if text is None:
        return 0.0
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    ok = 0 < seconds <= MAX_SECONDS
    require(ok, f"{FIELD}: seconds", text, f"a number above 0, at most {MAX_SECONDS:g}")
    return seconds

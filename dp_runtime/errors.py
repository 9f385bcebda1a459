"""Errors, one type per cause. Mistakes of the user are plain ValueErrors."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import TypeVar

MAX_SHOWN = 200  # characters of a field or a value in a message
MAX_TEXT = 2000  # characters of a message

Error = TypeVar("Error", bound=BaseException)


def require(ok: bool, field: str, value: object, allowed: str) -> None:
    if not ok:
        raise not_allowed(field, value, allowed)


def not_allowed(field: str, value: object, allowed: str) -> ValueError:
    name = one_line(field, MAX_SHOWN)
    return ValueError(one_line(f"{name}: {shown(value)} is not allowed; {allowed}"))


@dataclass(eq=False)
class ContextExceeded(ValueError):
    """A prompt, or what is to come after it, has no room in the model's context."""

    field: str
    value: object
    allowed: str

    def __str__(self) -> str:
        return str(not_allowed(self.field, self.value, self.allowed))


def shown(value: object, limit: int = MAX_SHOWN) -> str:
    """The value's repr for a message, or its type where it has none."""
    try:
        text = str.__str__(repr(value))
    except Exception:  # nested too deeply, an int of too many digits, a user's own __repr__
        text = f"<{type(value).__name__}>"
    return one_line(text, limit)


def one_line(text: str, limit: int = MAX_TEXT) -> str:
    """The text cut to `limit` characters, with escapes for those that do not print."""
    text = text[: limit + 1]
    if not text.isprintable():
        text = "".join(map(_printable, text))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def fresh(error: Error) -> Error:
    """An equal error for one more caller: the traceback of one object grows with each raise."""
    again = copy(error)
    again.__cause__ = error.__cause__
    return again


class RankDisagreement(RuntimeError):
    """The records of one step differ between ranks; raised before any collective."""


class ContractViolation(RuntimeError):
    """An attention call whose inputs do not fit its metadata."""


class CollectiveAborted(RuntimeError):
    """A collective or a board was aborted while, or before, a rank waited on it."""


class CollectiveTimeout(RuntimeError):
    """A peer did not arrive at a collective or a step in time."""


class OneLineError(RuntimeError):
    """Its text is one line of bounded length, whatever files, ranks and requests put into it."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class StepAbandoned(OneLineError):
    """A step can not end, because of one request that is over now; its rank is well."""


class CaptureFailed(OneLineError):
    """A rank could not capture one of its CUDA graphs."""


class StartError(OneLineError):
    """The ranks could not be started; names the ranks and the reason."""


class ResizeFailed(OneLineError):
    """The ranks could not be changed; those that served before go on."""


class RankFailed(OneLineError):
    """A rank died or stopped while it served."""


class PolicyFailed(RankFailed):
    """A policy of the user's own raised, or said what can not be; no other rank has another one."""


class RankMissing(OneLineError):
    """A request is pinned to a rank that was lost, and others serve without it until it is back."""


class ServerSilent(OneLineError):
    """A server can not be asked, or does not say what a server of dp-runtime says."""


class RequestFailed(OneLineError):
    """One request could not be served; its engine serves on."""


@dataclass(eq=False)
class EngineOverloaded(RuntimeError):
    """The engine holds as many unfinished requests as it may."""

    num_unfinished: int
    limit: int  # max_queued_requests
    num_waiting: int = 0  # callers of `generate` who wait for a place, and come first

    def __str__(self) -> str:
        waiting = f", and {self.num_waiting} callers wait for a place" if self.num_waiting else ""
        unfinished = f"{self.num_unfinished} requests are unfinished"
        return f"{unfinished}, and {self.limit} may be (max_queued_requests){waiting}"


class Terminated(KeyboardInterrupt):
    """SIGTERM came before there was anything that it could drain."""


class EngineClosed(OneLineError):
    """The engine was used after close()."""


def _printable(char: str) -> str:
    return char if char.isprintable() else char.encode("unicode_escape").decode("ascii")

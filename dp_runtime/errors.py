"""Errors, one type per cause. Mistakes of the user are plain ValueErrors."""

from __future__ import annotations

import math
from numbers import Integral, Real

MAX_SHOWN = 200  # characters of a value in a message


def require(ok: bool, field: str, value: object, allowed: str) -> None:
    if not ok:
        text = repr(value)
        text = text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
        raise ValueError(f"{field}: {text} is not allowed; {allowed}")


class RankDisagreement(RuntimeError):
    """The records of one step differ between ranks; raised before any collective."""


class ContractViolation(RuntimeError):
    """An attention call whose inputs do not fit its metadata."""


class CollectiveAborted(RuntimeError):
    """A collective or a board was aborted while, or before, a rank waited on it."""


class CollectiveTimeout(RuntimeError):
    """A peer did not arrive at a collective or a step in time."""


class StartError(RuntimeError):
    """The ranks could not be started; names the ranks and the reason."""


class RankFailed(RuntimeError):
    """A rank died or stopped while it served."""


class RequestFailed(RuntimeError):
    """One request could not be served; its engine serves on."""


class QueueFull(RuntimeError):
    """The engine holds as many unfinished requests as it may."""


class EngineClosed(RuntimeError):
    """The engine was used after close()."""


def is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the floats
        return False

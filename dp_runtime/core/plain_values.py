"""What users give, read once into Python's own types.

Each reader takes any object, numpy's and torch's scalars among them, and never calls methods that
a subclass of Python's types overrides. It returns None for what it does not take, or can't read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import islice
from numbers import Integral, Real
from typing import TypeVar

import numpy as np
from torch import Tensor

MAX_ENTRIES = 1 << 24  # a user's own sequence may have no end
SURROGATES = re.compile("[\ud800-\udfff]")  # no text has them

Plain = TypeVar("Plain")


def _guarded(read: Callable[[object], Plain | None]) -> Callable[[object], Plain | None]:
    @wraps(read)
    def guarded(value: object) -> Plain | None:
        try:
            return read(value)
        except Exception:  # objects of users may raise anything
            return None

    return guarded


@_guarded
def plain_bool(value: object) -> bool | None:
    value = _scalar(value)
    return value if isinstance(value, bool) else None


@_guarded
def plain_int(value: object) -> int | None:
    value = _scalar(value)
    if isinstance(value, bool) or not isinstance(value, Integral):
        return None
    return int.__int__(value) if isinstance(value, int) else int(value)


@_guarded
def plain_float(value: object) -> float | None:
    """A finite number, without a sign if it is zero."""
    number = _real(value)
    return number + 0.0 if number is not None and math.isfinite(number) else None


@_guarded
def plain_timeout(value: object) -> float | None:
    """Seconds that are not negative, of which there may be infinitely many."""
    number = _real(value)
    return number if number is not None and number >= 0 else None


@_guarded
def plain_str(value: object) -> str | None:
    return str.__str__(value) if isinstance(value, str) else None


@_guarded
def plain_list(value: object) -> list[object] | None:
    """The entries of a sequence, or of an array or a tensor; text and bytes are none."""
    if isinstance(value, list):
        return list.copy(value)
    if isinstance(value, tuple):
        return list(tuple.__iter__(value))
    if isinstance(value, np.ndarray | Tensor):
        entries = value.tolist() if math.prod(value.shape) <= MAX_ENTRIES else None
        return entries if type(entries) is list else None
    if isinstance(value, str | bytes | bytearray | memoryview) or not isinstance(value, Sequence):
        return None
    entries = list(islice(iter(value), MAX_ENTRIES + 1))
    return entries if len(entries) <= MAX_ENTRIES else None


@_guarded
def plain_items(value: object) -> list[tuple[object, object]] | None:
    """The keys and values of a mapping."""
    if isinstance(value, dict):
        return list(dict.items(value))
    if not isinstance(value, Mapping):
        return None
    items = [(key, item) for key, item in islice(value.items(), MAX_ENTRIES + 1)]
    return items if len(items) <= MAX_ENTRIES else None


def plain_ints(value: object) -> list[int] | None:
    """The entries of a sequence whose entries are all integers."""
    entries = plain_list(value)
    if entries is None:
        return None
    ints = [entry if type(entry) is int else plain_int(entry) for entry in entries]
    kept = [entry for entry in ints if entry is not None]
    return kept if len(kept) == len(ints) else None


def _scalar(value: object) -> object:
    """Python's number for a scalar of numpy or torch, or for an array without dimensions."""
    if isinstance(value, np.generic | np.ndarray):
        return value.item() if value.ndim == 0 and value.dtype.kind in "biuf" else None
    if isinstance(value, Tensor):
        return value.item() if value.ndim == 0 else None
    return value


def _real(value: object) -> float | None:
    value = _scalar(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    if isinstance(value, int):
        value = int.__int__(value)
    return float.__float__(value) if isinstance(value, float) else float(value)

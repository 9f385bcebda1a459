"""Checks that what a file said of fields is of their types: files are edited."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from dp_runtime.errors import not_allowed

MOST = 2**63
Check = Callable[[Any, tuple[str, ...]], None]  # of a value, and its place


def check_fields(value: object, where: str, least: int = 0) -> None:
    """Raise ValueError for a field of another type than it says, or an integer below `least`."""
    kind: Any = type(value)
    _check_of(kind, least)(value, (where,))


@cache
def _check_of(hint: Any, least: int) -> Check:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is int:
        return _check(lambda v: type(v) is int and least <= v < MOST, f"an integer >= {least}")
    if kind is float:
        return _check(_is_number, "a finite number")
    if kind is UnionType:
        (some,) = (_check_of(each, least) for each in inner if each is not NoneType)
        return lambda value, path: None if value is None else some(value, path)
    if kind is tuple and inner:
        return _each(_check_of(inner[0], least))
    if kind is Mapping:
        return _check(lambda v: isinstance(v, dict), "a table")
    if is_dataclass(kind) or issubclass(kind, tuple):
        hints = get_type_hints(kind)
        return _all(kind, {name: _check_of(hint, least) for name, hint in hints.items()})
    return _check(lambda v: type(v) is kind, f"of type {kind.__name__}")


def _check(ok: Callable[[Any], bool], allowed: str) -> Check:
    def check(value: Any, path: tuple[str, ...]) -> None:
        if not ok(value):
            raise not_allowed(": ".join(path), value, allowed)

    return check


def _each(check_one: Check) -> Check:
    is_list = _check(lambda v: isinstance(v, tuple), "a list")

    def check(value: Any, path: tuple[str, ...]) -> None:
        is_list(value, path)
        for one in value:
            check_one(one, path)

    return check


def _all(kind: type, checks: Mapping[str, Check]) -> Check:
    is_kind = _check(lambda v: type(v) is kind, f"of type {kind.__name__}")

    def check(value: Any, path: tuple[str, ...]) -> None:
        is_kind(value, path)
        for name, check_one in checks.items():
            check_one(getattr(value, name), (*path, name))

    return check


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < MOST and math.isfinite(value)

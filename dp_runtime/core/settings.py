"""Dataclass fields with documentation and allowed values: `setting(1, "ranks", at_least=1)`.

Checks, command-line flags and docs/settings.md all come from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from dp_runtime.core.plain_values import plain_bool, plain_float, plain_int, plain_str
from dp_runtime.errors import not_allowed

MAX_INT = 2**31 - 1  # of a field that names no other limit: all sizes fit into int32


@dataclass(frozen=True, kw_only=True)
class Setting:
    doc: str  # a phrase that begins in lower case
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    shown_default: str = ""  # the default in words, where its value says little
    allowed: str = ""  # the allowed values in words, where the fields above don't say it
    secret: bool = False  # left out where its owner is shown
    read: Callable[[object], Any] | None = None  # makes the value kept; None if it is not allowed

    def in_range(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
        )

    @property
    def range(self) -> str:
        limits = ((">=", self.at_least), ("above", self.above), ("at most", self.at_most))
        return ", ".join(f"{word} {_number(limit)}" for word, limit in limits if limit is not None)


def setting(default: Any, doc: str, **limits: Any) -> Any:
    """Make a dataclass field with a Setting; a default of MISSING makes it required."""
    made = Setting(doc=doc, **limits)
    how: dict[str, Any] = {"metadata": {"setting": made}, "repr": not made.secret}
    if isinstance(default, dict):
        return field(default_factory=default.copy, **how)
    return field(default=default, **how)


@dataclass(frozen=True)
class Field:
    name: str
    kind: type  # bool, int, float or str; any that its setting reads itself
    repeated: bool  # a sequence of that kind
    optional: bool  # None is allowed too
    default: Any  # MISSING if it must be given
    setting: Setting

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def shown_default(self) -> str:
        known = "" if self.default is MISSING else str(self.default)
        return self.setting.shown_default or known

    @property
    def allowed(self) -> str:
        if self.setting.choices:
            words = "one of " + ", ".join(self.setting.choices)
        elif self.setting.allowed:
            words = self.setting.allowed
        else:
            kinds = {bool: "a bool", int: "an integer", float: "a number", str: "a non-empty text"}
            words = " ".join(filter(None, (kinds[self.kind], self.setting.range)))
        return f"None or {words}" if self.optional else words

    def plain(self, value: Any) -> Any:
        """Return the value as one of Python's own; ValueError if it is not allowed."""
        if value is None and self.optional:
            return None
        own = (self.setting.read or _READERS[self.kind])(value)
        if own is None or not self._allows(own):
            raise not_allowed(self.name, value, self.allowed)
        return own

    def _allows(self, value: Any) -> bool:
        if self.kind is bool or self.setting.read:
            return True
        if self.kind is str:
            return bool(value) and (not self.setting.choices or value in self.setting.choices)
        return self.setting.in_range(value)


_READERS: dict[type, Callable[[object], Any]] = {
    bool: plain_bool, int: plain_int, float: plain_float, str: plain_str,
}  # fmt: skip


@cache
def settings_of(owner: Any) -> tuple[Field, ...]:
    hints = get_type_hints(owner)
    found = []
    for item in fields(owner):
        if "setting" in item.metadata:
            kind, repeated, optional = _kind(hints[item.name])
            setting: Setting = item.metadata["setting"]
            if kind is int and setting.at_most is None:
                setting = replace(setting, at_most=MAX_INT)
            found.append(Field(item.name, kind, repeated, optional, item.default, setting))
    return tuple(found)


def _kind(hint: Any) -> tuple[type, bool, bool]:
    """Return a type's first kind, or that of its entries, and if it is a sequence or optional."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    first = next(member for member in members if member is not type(None))
    repeated = get_origin(first) is Sequence
    return get_args(first)[0] if repeated else first, repeated, type(None) in members


def check_settings(owner: Any) -> None:
    """Check the fields in `__post_init__`, and keep them as Python's own types."""
    kind: Any = type(owner)
    for item in settings_of(kind):
        object.__setattr__(owner, item.name, item.plain(getattr(owner, item.name)))


def _number(limit: float) -> str:
    if limit == MAX_INT:
        return "2**31-1"
    return str(limit) if isinstance(limit, int) else f"{limit:g}"

"""Dataclass fields with documentation and allowed values: `setting(1, "ranks", at_least=1)`.

Checks, command-line flags and docs/settings.md all come from there.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Any, get_args, get_type_hints

from dp_runtime.errors import is_finite, is_int, require


@dataclass(frozen=True, kw_only=True)
class Setting:
    doc: str  # a phrase that begins in lower case
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    shown_default: str = ""  # the default in words, where its value says little
    allowed: str = ""  # the allowed values in words, where the fields above don't say it

    def in_range(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
        )

    @property
    def range(self) -> str:
        limits = ((">=", self.at_least), ("above", self.above), ("at most", self.at_most))
        return ", ".join(f"{word} {limit:g}" for word, limit in limits if limit is not None)


def setting(default: Any, doc: str, **limits: Any) -> Any:
    """Make a dataclass field with a Setting; a default of MISSING makes it required."""
    return field(default=default, metadata={"setting": Setting(doc=doc, **limits)})


@dataclass(frozen=True)
class Field:
    name: str
    kind: type  # bool, int, float or str
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
        require(self._allows(value), self.name, value, self.allowed)
        return self.kind(value)

    def _allows(self, value: Any) -> bool:
        if self.kind is bool:
            return isinstance(value, bool)
        if self.kind is str:
            ok = isinstance(value, str) and bool(value)
            return ok and (not self.setting.choices or value in self.setting.choices)
        number = is_int(value) if self.kind is int else is_finite(value)
        return number and self.setting.in_range(value)


@cache
def settings_of(owner: Any) -> tuple[Field, ...]:
    hints = get_type_hints(owner)
    found = []
    for item in fields(owner):
        if "setting" in item.metadata:
            members = get_args(hints[item.name]) or (hints[item.name],)
            optional = type(None) in members
            kind = next(member for member in members if member is not type(None))
            setting: Setting = item.metadata["setting"]
            found.append(Field(item.name, kind, optional, item.default, setting))
    return tuple(found)


def check_settings(owner: Any) -> None:
    """Check the fields in `__post_init__`; numpy's numbers, whose sums wrap, become Python's."""
    kind: Any = type(owner)
    for item in settings_of(kind):
        object.__setattr__(owner, item.name, item.plain(getattr(owner, item.name)))

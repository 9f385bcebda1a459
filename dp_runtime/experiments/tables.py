"""Tables of a TOML file as checked dataclasses; mistakes name the field by its dotted path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass
from typing import Any, TypeVar

from dp_runtime.core.settings import check_settings, settings_of
from dp_runtime.errors import not_allowed, require

Owner = TypeVar("Owner")
Table = Mapping[str, Any]


@dataclass(frozen=True)
class Checked:
    """A dataclass of settings, which are checked on construction (ValueError)."""

    def __post_init__(self) -> None:
        check_settings(self)


def as_table(value: object, where: str) -> Table:
    require(isinstance(value, Mapping), where, value, "a table")
    assert isinstance(value, Mapping), "checked above"
    return value


def check_names(table: Table, known: list[str], where: str) -> None:
    for name, value in table.items():
        require(name in known, dotted(where, name), value, f"known here: {', '.join(known)}")


def read_table(owner: type[Owner], value: object, where: str) -> Owner:
    """Make a dataclass of settings from a table."""
    kind: Any = owner
    table, items = as_table(value, where), settings_of(kind)
    check_names(table, [item.name for item in items], where)
    for item in items:
        if item.default is MISSING and item.name not in table:
            raise not_allowed(dotted(where, item.name), None, f"it is needed: {item.allowed}")
    with within(where):
        return owner(**table)


def read_kind(kinds: Mapping[str, type[Owner]], value: object, where: str) -> Owner:
    """Make one of several dataclasses, whichever `kind` names."""
    table = dict(as_table(value, where))
    kind = table.pop("kind", None)
    ok = isinstance(kind, str) and kind in kinds
    require(ok, dotted(where, "kind"), kind, f"one of {', '.join(kinds)}")
    return read_table(kinds[kind], table, where)


@contextmanager
def within(where: str) -> Iterator[None]:
    """Let errors name their fields by dotted paths."""
    try:
        yield
    except ValueError as error:
        raise ValueError(dotted(where, str(error))) from None


def dotted(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def with_value(table: Table, name: str, value: object) -> dict[str, Any]:
    """Return the nested tables with the value of one dotted name put in."""
    head, dot, rest = name.partition(".")
    inner = table.get(head, {})
    if dot:
        require(isinstance(inner, Mapping), name, value, f"{head} is no table")
        value = with_value(inner, rest, value)
    return {**table, head: value}


def flattened(value: object, where: str = "") -> Iterator[tuple[str, object]]:
    """Iterate over nested tables and lists by dotted names."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from flattened(inner, dotted(where, name))
    elif isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
        for number, inner in enumerate(value):
            yield from flattened(inner, dotted(where, str(number)))
    else:
        yield where, value

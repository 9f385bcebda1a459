"""StructuredOutputs: the form that the text of a request must have."""

from __future__ import annotations

import json as json_text
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dp_runtime.core.plain_values import (
    SURROGATES,
    plain_bool,
    plain_float,
    plain_int,
    plain_items,
    plain_list,
    plain_str,
)
from dp_runtime.errors import require

MAX_BYTES = 1 << 18  # of a schema, regex, grammar or all choices; a parser takes 100 times as many
MAX_DEPTH = 100  # of a schema


@dataclass(frozen=True)
class StructuredOutputs:
    """Exactly one of its fields, which are kept as Python's own types."""

    json: Mapping[str, Any] | str | None = None  # a JSON schema, kept as its text
    json_object: bool = False  # any JSON object
    regex: str | None = None  # which the whole text matches
    choice: Sequence[str] | None = None
    grammar: str | None = None  # as Lark or llama.cpp write it

    def __post_init__(self) -> None:
        kinds = [item.name for item in fields(self)]
        given = [kind for kind in kinds if not self._lacks(kind)]
        allowed = f"exactly one of {', '.join(kinds)}"
        require(len(given) == 1, "structured_outputs", given, allowed)
        field, (read, allowed) = f"structured_outputs.{given[0]}", _READERS[given[0]]
        raw = getattr(self, given[0])
        value = read(raw)
        if value is None and plain_items(raw) is not None:
            raw = f"a {type(raw).__name__}"  # the repr of one that contains itself has no end
        require(value is not None, field, raw, allowed)
        object.__setattr__(self, given[0], value)
        size = len(str(value).encode())
        require(size <= MAX_BYTES, field, f"{size:,} bytes", f"at most {MAX_BYTES:,} bytes")

    @property
    def kind(self) -> str:
        return next(item.name for item in fields(self) if not self._lacks(item.name))

    @classmethod
    def read(cls, given: object) -> StructuredOutputs | None:
        """Copy one, or read its fields from a mapping; None if it is neither."""
        known = [item.name for item in fields(cls)]
        if issubclass(type(given), StructuredOutputs):  # what a user's object says may be a lie
            return cls(**{name: getattr(given, name) for name in known})
        items = plain_items(given)
        if items is None:
            return None
        values: dict[str, Any] = {}
        for key, value in items:
            name = plain_str(key)
            allowed = f"known fields: {', '.join(known)}"
            require(name in known, "structured_outputs", {key: value}, allowed)
            values[str(name)] = value
        return cls(**values)

    def _lacks(self, kind: str) -> bool:
        value = getattr(self, kind)
        return value is None or value is False


def _text(given: object) -> str | None:
    text = plain_str(given)
    return text if text and not SURROGATES.search(text) else None


def _choice(given: object) -> tuple[str, ...] | None:
    entries = plain_list(given) or ()
    texts = tuple(text for text in map(_text, entries) if text is not None)
    return texts if 0 < len(texts) == len(entries) else None


def _schema(given: object) -> str | None:
    """The text of a schema, whose names keep their order."""
    text = plain_str(given)
    try:
        parsed = given if text is None else json_text.loads(text)
        schema = _plain_json(parsed, MAX_DEPTH, iter(range(MAX_BYTES)))
        return json_text.dumps(schema, allow_nan=False) if isinstance(schema, dict) else None
    except (ValueError, RecursionError):
        return None


def _plain_json(value: object, depth: int, budget: Iterator[int]) -> object:
    """Copy a JSON value, of as many objects and arrays as the budget has; else a ValueError."""
    if value is None:
        return None
    for read in (plain_str, plain_bool, plain_int, plain_float):
        if (scalar := read(value)) is not None:
            return scalar
    items, entries = plain_items(value), plain_list(value)
    names = [plain_str(key) for key, _ in items or ()]
    if depth == 0 or next(budget, None) is None or None in names or items is entries is None:
        raise ValueError
    if items is None:
        return [_plain_json(entry, depth - 1, budget) for entry in entries or ()]
    return {name: _plain_json(item, depth - 1, budget) for name, (_, item) in zip(names, items)}


_READERS: dict[str, tuple[Callable[[object], object], str]] = {
    "json": (_schema, f"a JSON schema: an object or its text, nested {MAX_DEPTH} deep at most"),
    "json_object": (plain_bool, "a bool"),
    "regex": (_text, "a non-empty text without surrogates"),
    "choice": (_choice, "a list of non-empty texts without surrogates"),
    "grammar": (_text, "a non-empty text without surrogates"),
}

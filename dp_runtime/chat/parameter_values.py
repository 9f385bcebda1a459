"""Values of parameters that stand in a text as they are, made JSON by the tool's schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn, Protocol

from dp_runtime.chat.tool_calls import len_begun
from dp_runtime.chat.tools import Tool

END = "</parameter>"
_WORDS = {"true": "true", "false": "false", "none": "null"}  # as Python writes them
_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}


class ParameterValue(Protocol):
    """Takes text up to the closing tag, and gives JSON."""

    rest: str | None  # what comes behind the tag, once it was seen

    def push(self, text: str) -> str: ...

    def finish(self) -> str: ...


def parameter_value(tool: Tool | None, name: str) -> ParameterValue:
    """A value that is a text, or that the schema does not describe, comes piece by piece."""
    schema: Mapping[str, Any] = {} if tool is None else tool.parameters
    properties = schema.get("properties")
    described = properties.get(name) if isinstance(properties, dict) else None
    types = types_of(described, schema)
    return JsonValue(types) if types - {"string"} else TextValue()


class TextValue:
    """A text between two line breaks, which are not part of it."""

    def __init__(self) -> None:
        self.rest: str | None = None
        self._held = ""
        self._quoted = self._begun = False

    def push(self, text: str) -> str:
        text, self._held = self._held + text, ""
        value, found, rest = text.partition(END)
        if found:
            self.rest = rest
            return self._written(value, is_last=True) + '"'
        size = len(text) - max(len_begun(text, END), len_begun(text, "\n" + END))
        self._held = text[size:]
        return self._written(text[:size])

    def finish(self) -> str:
        return self._written(self._held)

    def _written(self, text: str, is_last: bool = False) -> str:
        quote, self._quoted = "" if self._quoted else '"', True
        if text and not self._begun:
            text, self._begun = text.removeprefix("\n"), True
        if is_last:
            text = text.removesuffix("\n")
        return quote + json.dumps(text, ensure_ascii=False)[1:-1]


class JsonValue:
    """JSON of one of these types; what is none is passed on as a text."""

    def __init__(self, types: frozenset[str]) -> None:
        self.rest: str | None = None
        self._types = types
        self._pieces: list[str] = []
        self._held = ""

    def push(self, text: str) -> str:
        value, found, rest = (self._held + text).partition(END)
        size = len(value) if found else len(value) - len_begun(value, END)
        self._pieces.append(value[:size])
        self._held = value[size:]
        if not found:
            return ""
        self.rest = rest
        return json_value("".join(self._pieces), self._types)

    def finish(self) -> str:
        return ("".join(self._pieces) + self._held).strip()


def json_value(text: str, types: frozenset[str]) -> str:
    stripped = text.strip()
    stripped = _WORDS.get(stripped.lower(), stripped)
    try:
        value = json.loads(stripped, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return _quoted(text)
    kind = kind_of(value)
    fits = kind in types or (kind == "integer" and "number" in types)
    return stripped if fits or "string" not in types else _quoted(text)


def _quoted(text: str) -> str:
    return json.dumps(text.removeprefix("\n").removesuffix("\n"), ensure_ascii=False)


def types_of(schema: object, root: Mapping[str, Any]) -> frozenset[str]:
    """The JSON types that a schema allows; none if it does not say."""
    types: set[str] = set()
    followed: set[str] = set()  # a reference may lead to itself
    left = [schema]
    while left:
        match left.pop():
            case {"type": str(kind)}:
                types.add(kind)
            case {"type": [*kinds]}:
                types.update(kind for kind in kinds if isinstance(kind, str))
            case {"$ref": str(reference)} if reference not in followed:
                followed.add(reference)
                left.append(_referred(reference, root))
            case {"anyOf": [*several]} | {"oneOf": [*several]} | {"allOf": [*several]}:
                left += several
            case {"enum": [*values]}:
                types.update(map(kind_of, values))
            case {"const": value}:
                types.add(kind_of(value))
    return frozenset(types)


def kind_of(value: object) -> str:
    """The JSON type of a parsed value."""
    return "null" if value is None else _KINDS.get(type(value), "object")


def _referred(reference: str, root: Mapping[str, Any]) -> object:
    found: object = root
    for key in reference.removeprefix("#/").split("/"):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")

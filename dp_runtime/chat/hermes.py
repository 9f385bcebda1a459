"""Calls as Hermes and Qwen models write them: {"name": ..., "arguments": {...}}."""

from __future__ import annotations

import json
import re
from enum import Enum, auto
from typing import Any

from dp_runtime.chat.json_extent import JsonExtent
from dp_runtime.chat.tool_calls import CLOSE, CallState

MAX_HEADER = 1024  # characters; a call with a longer one is read as a whole
_CERTAIN = re.compile(
    r'\s*\{\s*"name"\s*:\s*"([^"\\\x00-\x1f]+)"\s*,\s*"arguments"\s*:\s*(?=\{\s*["}])'
)
_BRACKETS = re.compile(r"[\s}]*")  # those of the call itself, or too many


class _Stage(Enum):
    HEADER = auto()
    ARGUMENTS = auto()
    CLOSING = auto()


class HermesCall:
    """Passes arguments on as they come; a call that begins otherwise is read as a whole."""

    def __init__(self) -> None:
        self.state = CallState.READING
        self.name: str | None = None
        self.rest = ""
        self._stage = _Stage.HEADER
        self._head = ""
        self._pieces: list[str] = []  # all text, as long as it may not be a call
        self._extent = JsonExtent()

    @property
    def is_whole(self) -> bool:
        return self._stage is _Stage.CLOSING

    def push(self, text: str) -> str:
        match self._stage:
            case _Stage.HEADER:
                return self._header(text)
            case _Stage.ARGUMENTS:
                return self._arguments(text)
            case _Stage.CLOSING:
                return self._closing(text)

    def finish(self) -> str:
        if self._stage is _Stage.HEADER:
            self._is_no_call()
        else:
            self.state, self.rest = CallState.ENDED, ""
        return ""

    def _header(self, text: str) -> str:
        self._pieces.append(text)
        if len(self._head) < MAX_HEADER:
            self._head = (self._head + text)[:MAX_HEADER]
            if found := _CERTAIN.match(self._head):
                self.name, self._stage = found[1], _Stage.ARGUMENTS
                self._extent = JsonExtent()
                return self._arguments("".join(self._pieces)[found.end() :])
        size = self._extent.scan(text)
        if self._extent.failed:
            self._is_no_call()
        elif self._extent.ended:
            return self._whole(text[size:])
        return ""

    def _whole(self, behind: str) -> str:
        text = "".join(self._pieces)
        call = _parsed(text[: len(text) - len(behind)])
        if call is None:
            self._is_no_call()
            return ""
        self.name, arguments = call
        self._stage = _Stage.CLOSING
        return arguments + self._closing(behind)

    def _arguments(self, text: str) -> str:
        size = self._extent.scan(text)
        if self._extent.ended or self._extent.failed:
            self._stage = _Stage.CLOSING
            return text[:size] + self._closing(text[size:])
        return text

    def _closing(self, text: str) -> str:
        self.rest += text
        brackets = _BRACKETS.match(self.rest)
        self.rest = self.rest[brackets.end() if brackets else 0 :]
        if self.rest.startswith(CLOSE):
            self.rest = self.rest.removeprefix(CLOSE)
            self.state = CallState.ENDED
        elif not CLOSE.startswith(self.rest):
            self.state = CallState.ENDED
        return ""

    def _is_no_call(self) -> None:
        self.state, self.rest = CallState.NOT_A_CALL, "".join(self._pieces)


def _parsed(text: str) -> tuple[str, str] | None:
    """Name and arguments of a whole call, whatever the order of its fields."""
    try:
        match json.loads(text):
            case {"name": str(name), "arguments": dict(arguments)} if _is_name(name):
                return name, json.dumps(arguments)
            case {"name": str(name), "arguments": str(arguments)} if _is_name(name):
                return name, json.dumps(_object(arguments))
            case {"name": str(name), **other} if _is_name(name) and "arguments" not in other:
                return name, "{}"
    except (ValueError, RecursionError):
        pass
    return None


def _is_name(name: str) -> bool:
    return name.isprintable() and bool(name)


def _object(text: str) -> dict[str, Any]:
    parsed = json.loads(text)
    if not isinstance(parsed, dict):
        raise ValueError("arguments are an object")
    return parsed

"""Calls as Qwen3-Coder writes them: <function=NAME><parameter=KEY>VALUE</parameter></function>."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import Enum, auto

from dp_runtime.chat.parameter_values import ParameterValue, TextValue, parameter_value
from dp_runtime.chat.tool_calls import CLOSE, CallState
from dp_runtime.chat.tools import Tool

MAX_TAG = 1024  # characters
_FUNCTION, _END_FUNCTION, _PARAMETER = "<function=", "</function>", "<parameter="
_FUNCTION_TAG = re.compile(rf"\s*{_FUNCTION}([^<>\s]+)>")
_PARAMETER_TAG = re.compile(rf"\s*{_PARAMETER}([^<>]+)>")


class _Stage(Enum):
    FUNCTION = auto()
    BETWEEN = auto()  # parameters
    VALUE = auto()
    CLOSING = auto()


class QwenXmlCall:
    """Makes JSON of the parameters, typed by the tool's schema; texts come piece by piece."""

    def __init__(self, tools: Mapping[str, Tool]) -> None:
        self.state = CallState.READING
        self.name: str | None = None
        self.rest = ""
        self._tools = tools
        self._stage = _Stage.FUNCTION
        self._separator = ""
        self._value: ParameterValue = TextValue()

    @property
    def is_whole(self) -> bool:
        return self._stage is _Stage.CLOSING

    def push(self, text: str) -> str:
        self.rest += text
        pieces: list[str] = []
        while self.state is CallState.READING and (piece := self._step()) is not None:
            pieces.append(piece)
        return "".join(pieces)

    def finish(self) -> str:
        if self._stage is _Stage.FUNCTION:
            self.state = CallState.NOT_A_CALL
            return ""
        self.state, self.rest = CallState.ENDED, ""
        return self._value.finish() if self._stage is _Stage.VALUE else ""

    def _step(self) -> str | None:
        """Read the next tag or piece of a value; None if it takes more text."""
        match self._stage:
            case _Stage.FUNCTION:
                return self._function()
            case _Stage.BETWEEN:
                return self._between()
            case _Stage.VALUE:
                return self._piece()
            case _Stage.CLOSING:
                return self._closing()

    def _function(self) -> str | None:
        if tag := _FUNCTION_TAG.match(self.rest):
            self.name, self._stage, self.rest = tag[1], _Stage.BETWEEN, self.rest[tag.end() :]
            return "{"
        if not _begins(self.rest.lstrip(), _FUNCTION) or len(self.rest) > MAX_TAG:
            self.state = CallState.NOT_A_CALL
        return None

    def _between(self) -> str | None:
        self.rest = self.rest.lstrip()
        if tag := _PARAMETER_TAG.match(self.rest):
            self._stage, self.rest = _Stage.VALUE, self.rest[tag.end() :]
            self._value = parameter_value(self._tools.get(self.name or ""), tag[1])
            separator, self._separator = self._separator, ", "
            return f"{separator}{json.dumps(tag[1], ensure_ascii=False)}: "
        if self.rest.startswith(_END_FUNCTION):
            self._stage, self.rest = _Stage.CLOSING, self.rest.removeprefix(_END_FUNCTION)
            return "}"
        tags = (_PARAMETER, _END_FUNCTION)
        if any(_begins(self.rest, tag) for tag in tags) and len(self.rest) <= MAX_TAG:
            return None
        self._stage = _Stage.CLOSING  # its end was forgotten, or it is no part of a call
        return "}"

    def _piece(self) -> str | None:
        if not self.rest:
            return None
        text, self.rest = self.rest, ""
        written = self._value.push(text)
        if self._value.rest is not None:
            self._stage, self.rest = _Stage.BETWEEN, self._value.rest
        return written

    def _closing(self) -> str | None:
        self.rest = self.rest.lstrip()
        if self.rest.startswith(CLOSE):
            self.state, self.rest = CallState.ENDED, self.rest.removeprefix(CLOSE)
        elif not CLOSE.startswith(self.rest):
            self.state = CallState.ENDED
        return None


def _begins(text: str, tag: str) -> bool:
    """Tell if a text may grow to one that starts with the tag, as far as its first `>`."""
    return tag.startswith(text) or text.startswith(tag)

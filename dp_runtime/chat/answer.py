"""What a model answers in a chat, piece by piece and as a whole."""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of a call's arguments; the first of a call names it."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None

    @classmethod
    def begin(cls, index: int, name: str, arguments: str = "") -> ToolCallDelta:
        return cls(index, arguments, f"call_{secrets.token_hex(12)}", name)


@dataclass(frozen=True)
class AnswerDelta:
    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.tool_calls)

    @classmethod
    def joined(cls, deltas: Iterable[AnswerDelta]) -> AnswerDelta:
        given = list(deltas)
        return cls(
            "".join(delta.reasoning for delta in given),
            "".join(delta.content for delta in given),
            tuple(piece for delta in given for piece in delta.tool_calls),
        )


@dataclass(frozen=True)
class ToolCall:
    id: str
    name: str
    arguments: str  # JSON, as far as the model wrote JSON


@dataclass(frozen=True)
class Answer:
    """A whole answer, which its deltas make up; what it lacks is None."""

    reasoning: str | None
    content: str | None
    tool_calls: tuple[ToolCall, ...]

    @classmethod
    def joined(cls, deltas: Iterable[AnswerDelta]) -> Answer:
        whole = AnswerDelta.joined(deltas)
        calls: dict[int, ToolCall] = {}
        arguments: defaultdict[int, list[str]] = defaultdict(list)
        for piece in whole.tool_calls:
            if piece.id is not None and piece.name is not None:
                calls[piece.index] = ToolCall(piece.id, piece.name, "")
            arguments[piece.index].append(piece.arguments)
        return cls(
            whole.reasoning or None,
            whole.content or None,
            tuple(replace(call, arguments="".join(arguments[at])) for at, call in calls.items()),
        )


class AnswerParser(Protocol):
    """Takes an answer's text in pieces; however it is split, the joined deltas are the same."""

    def push(self, text: str) -> AnswerDelta: ...

    def finish(self) -> AnswerDelta: ...


class PlainAnswer:
    """All text is content."""

    def push(self, text: str) -> AnswerDelta:
        return AnswerDelta(content=text)

    def finish(self) -> AnswerDelta:
        return AnswerDelta()

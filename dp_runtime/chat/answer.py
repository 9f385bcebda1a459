"""What a model answers in a chat, piece by piece and as a whole."""

from __future__ import annotations

import secrets
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
    cuts_call: bool = False  # the text has ended before the arguments of a call have

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.tool_calls)

    @classmethod
    def joined(cls, deltas: Iterable[AnswerDelta]) -> AnswerDelta:
        """One delta of all, with one piece for each call."""
        given = list(deltas)
        pieces: dict[int, list[ToolCallDelta]] = {}
        for delta in given:
            for piece in delta.tool_calls:
                pieces.setdefault(piece.index, []).append(piece)
        return cls(
            "".join(delta.reasoning for delta in given),
            "".join(delta.content for delta in given),
            tuple(
                replace(several[0], arguments="".join(piece.arguments for piece in several))
                for several in pieces.values()
            ),
            any(delta.cuts_call for delta in given),
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
        calls = [
            ToolCall(call.id, call.name, call.arguments)
            for call in whole.tool_calls
            if call.id is not None and call.name is not None
        ]
        return cls(whole.reasoning or None, whole.content or None, tuple(calls))


class AnswerParser(Protocol):
    """Takes an answer's text in pieces; however it is split, the joined deltas are the same."""

    def push(self, text: str) -> AnswerDelta: ...

    def finish(self, is_cut: bool = False) -> AnswerDelta: ...  # by max_tokens, say


class PlainAnswer:
    """All text is content."""

    def push(self, text: str) -> AnswerDelta:
        return AnswerDelta(content=text)

    def finish(self, is_cut: bool = False) -> AnswerDelta:
        return AnswerDelta()

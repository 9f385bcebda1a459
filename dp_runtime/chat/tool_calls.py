"""ToolCalls: tells calls between `<tool_call>` tags from the content around them."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import Protocol

from dp_runtime.chat.answer import AnswerDelta, ToolCallDelta

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class CallState(Enum):
    READING = auto()
    ENDED = auto()
    NOT_A_CALL = auto()  # only before it has a name


class CallReader(Protocol):
    """Reads one call, from behind its opening tag to its end."""

    state: CallState
    name: str | None  # known as soon as this is certain to be a call
    rest: str  # what it did not take, once it has ended

    @property
    def is_whole(self) -> bool: ...  # as far as its arguments go

    def push(self, text: str) -> str: ...  # the arguments' text that came with it

    def finish(self) -> str: ...  # the text has ended, so the call has, too


class ToolCalls:
    """Content and calls; what is not a call stays content, and white space at calls is dropped."""

    def __init__(
        self,
        new_reader: Callable[[], CallReader],
        max_calls: int | None,
        *,
        forced: bool = False,  # all that is written are calls: what is none was cut before it was
    ) -> None:
        self._new_reader, self._max_calls, self._forced = new_reader, max_calls, forced
        self._reader: CallReader | None = None
        self._num_calls = 0
        self._spaces: list[str] = []  # dropped if a call comes next
        self._tag = ""  # the beginning of one
        self._after_call = False

    def push(self, text: str) -> AnswerDelta:
        pieces = []
        while text:
            piece, text = self._content(text) if self._reader is None else self._call(text)
            pieces.append(piece)
        return AnswerDelta.joined(pieces)

    def finish(self, is_cut: bool = False) -> AnswerDelta:
        if self._reader is not None and self._reader.name is None and is_cut:
            return AnswerDelta()  # the beginning of a call is neither a call nor content
        pieces = []
        while self._reader is not None:
            begun = self._reader.name is not None and not self._reader.is_whole
            pieces.append(AnswerDelta(cuts_call=begun and not self._is_dropped))
            piece, rest = self._call(None)
            pieces += [piece, self.push(rest)]
        told = not is_cut and ("".join(self._spaces) + self._tag).strip()
        if told or not self._after_call:
            pieces.append(self._as_content(self._tag))
        return AnswerDelta.joined(pieces)

    def _content(self, text: str) -> tuple[AnswerDelta, str]:
        """Take content; what is left comes behind a tag that may open a call."""
        before, found, rest = (self._tag + text).partition(OPEN)
        self._tag = ""
        if found:
            self._reader = self._new_reader()
        else:
            size = len(before) - len_begun(before, OPEN)
            before, self._tag = before[:size], before[size:]
        shown = before.rstrip()
        delta = self._as_content(shown) if shown else AnswerDelta()
        self._spaces.append(before[len(shown) :])
        return delta, rest

    def _as_content(self, text: str) -> AnswerDelta:
        delta = AnswerDelta(content="".join(self._spaces) + text)
        self._spaces, self._after_call = [], False
        return AnswerDelta() if self._forced else delta

    def _call(self, text: str | None) -> tuple[AnswerDelta, str]:
        """Give text to the reader, or its end; what is left comes behind the call."""
        reader = self._reader
        assert reader is not None, "a call is read"
        named = reader.name is not None
        arguments = reader.finish() if text is None else reader.push(text)
        delta = AnswerDelta()
        if reader.name is not None:
            delta = self._call_delta(None if named else reader.name, arguments)
        if reader.state is CallState.READING:
            return delta, ""
        self._reader = None
        if reader.state is CallState.NOT_A_CALL:
            delta = self._as_content(OPEN)
        return delta, reader.rest

    @property
    def _is_dropped(self) -> bool:  # the last call
        return self._max_calls is not None and self._num_calls > self._max_calls

    def _call_delta(self, name: str | None, arguments: str) -> AnswerDelta:
        if name is not None:
            self._num_calls += 1
            self._spaces, self._after_call = [], True
        if self._is_dropped:
            return AnswerDelta()
        index = self._num_calls - 1
        if name is not None:
            return AnswerDelta(tool_calls=(ToolCallDelta.begin(index, name, arguments),))
        return AnswerDelta(tool_calls=(ToolCallDelta(index, arguments),) if arguments else ())


def len_begun(text: str, tag: str) -> int:
    """How many characters at the end of a text may begin a tag."""
    longest = min(len(tag) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(tag[:size])), 0)

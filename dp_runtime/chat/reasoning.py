"""ReasoningSplitter: takes what a model thinks, `<think>...</think>`, from what it answers."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto

from dp_runtime.chat.answer import AnswerDelta, AnswerParser, PlainAnswer
from dp_runtime.chat.tool_calls import len_begun
from dp_runtime.text.text_stream import TextStream

BEGIN, END = "<think>", "</think>"


class Thought(Enum):
    """What an answer may begin with, as far as the prompt says."""

    NONE = auto()  # the prompt has a thought that is closed, or the model marks none
    POSSIBLE = auto()
    OPEN = auto()  # the prompt ends within one

    @classmethod
    def at_end_of(cls, prompt: str, continued: str | None = None) -> Thought:
        """Look at a prompt's end; `continued` is the message that goes on there, if any."""
        if continued is not None:
            return cls.OPEN if continued.rfind(BEGIN) > continued.rfind(END) else cls.NONE
        end = prompt.rstrip()
        if end.endswith(BEGIN):
            return cls.OPEN
        return cls.NONE if end.endswith(END) else cls.POSSIBLE


class _Stage(Enum):
    BEFORE = auto()
    THINKING = auto()
    AFTER = auto()  # line breaks before the answer
    ANSWERING = auto()


class ReasoningSplitter:
    """Splits at the first thought only; line breaks at its ends belong to neither part."""

    def __init__(self, answer: AnswerParser, is_open: bool) -> None:
        self._answer, self._is_open = answer, is_open
        self._stage = _Stage.BEFORE
        self._spaces: list[str] = []  # at the end of what was seen
        self._tag = ""  # its beginning
        self._begun = False  # the thought has text

    @property
    def thinking(self) -> bool:
        """Whether what comes next belongs to the thought, as far as is known."""
        before = self._stage is _Stage.BEFORE and self._is_open
        return before or self._stage is _Stage.THINKING

    @property
    def answering(self) -> bool:
        return self._stage in (_Stage.AFTER, _Stage.ANSWERING)

    def push(self, text: str) -> AnswerDelta:
        pieces = []
        while text:
            piece, text = self._step(text)
            pieces.append(piece)
        return AnswerDelta.joined(pieces)

    def finish(self, is_cut: bool = False) -> AnswerDelta:
        left = "".join(self._spaces) + self._tag
        match self._stage:
            case _Stage.THINKING if self._tag:
                return AnswerDelta(reasoning=left)
            case _Stage.BEFORE if not self._is_open:
                return AnswerDelta.joined([self._answer.push(left), self._answer.finish(is_cut)])
            case _Stage.BEFORE:
                return AnswerDelta(reasoning=left.strip("\n"))
        return self._answer.finish(is_cut)

    def _step(self, text: str) -> tuple[AnswerDelta, str]:
        match self._stage:
            case _Stage.BEFORE:
                return AnswerDelta(), self._before(self._tag + text)
            case _Stage.THINKING:
                return self._think(self._tag + text)
            case _Stage.AFTER:
                text = text.lstrip("\n")
                self._stage = _Stage.ANSWERING if text else _Stage.AFTER
                return AnswerDelta(), text
            case _Stage.ANSWERING:
                return self._answer.push(text), ""

    def _before(self, text: str) -> str:
        """Decide what the text begins with, and return it once this is clear."""
        begun = text.lstrip()
        self._spaces.append(text[: len(text) - len(begun)])
        self._tag = ""
        if begun.startswith(BEGIN):
            self._stage, self._spaces = _Stage.THINKING, []
            return begun.removeprefix(BEGIN)
        if BEGIN.startswith(begun):
            self._tag = begun
            return ""
        self._stage = _Stage.THINKING if self._is_open else _Stage.ANSWERING
        spaces, self._spaces = "".join(self._spaces), []
        return spaces + begun

    def _think(self, text: str) -> tuple[AnswerDelta, str]:
        thought, found, rest = text.partition(END)
        size = len(thought) - (0 if found else len_begun(thought, END))
        self._tag = thought[size:]
        thought = thought[:size] if self._begun else thought[:size].lstrip("\n")
        shown = thought.rstrip("\n")
        delta = AnswerDelta("".join(self._spaces) + shown) if shown else AnswerDelta()
        if shown:
            self._spaces, self._begun = [], True
        if self._begun:
            self._spaces.append(thought[len(shown) :])
        if found:
            self._stage = _Stage.AFTER
        return delta, rest


class ReasoningTokens:
    """Counts the tokens of the thought, its marks included."""

    def __init__(self, text: TextStream, is_open: bool) -> None:
        self.count = 0
        self._num_tokens = 0
        self._text = text
        self._splitter = ReasoningSplitter(PlainAnswer(), is_open)

    def push(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if self._splitter.answering:
                return
            self._num_tokens += 1
            thinking = self._splitter.thinking
            self._splitter.push(self._text.step(token_id))
            if thinking or self._splitter.thinking:
                self.count = self._num_tokens

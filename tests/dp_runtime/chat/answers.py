"""Parsing answers in pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from dp_runtime.chat.answer import Answer, AnswerDelta, AnswerParser


def deltas_of(
    parser: AnswerParser, pieces: Sequence[str], is_cut: bool = False
) -> list[AnswerDelta]:
    return [*(parser.push(piece) for piece in pieces), parser.finish(is_cut)]


def parsed(new: Callable[[], AnswerParser], pieces: Sequence[str], is_cut: bool = False) -> Answer:
    """The whole answer, without the ids of its calls, which are random."""
    answer = Answer.joined(deltas_of(new(), pieces, is_cut))
    ids = [call.id for call in answer.tool_calls]
    assert len(set(ids)) == len(ids)
    return replace(answer, tool_calls=tuple(replace(call, id="") for call in answer.tool_calls))


def cut(text: str, cuts: Sequence[int]) -> list[str]:
    at = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in pairwise(at)]


def parsed_anyhow(new: Callable[[], AnswerParser], text: str) -> Answer:
    """The answer, which must be the same as a whole, by characters, and in two halves."""
    whole = parsed(new, [text])
    assert parsed(new, list(text)) == whole
    for at in range(len(text)):
        assert parsed(new, [text[:at], text[at:]]) == whole
    return whole

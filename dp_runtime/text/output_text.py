"""The text of one request, as its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dp_runtime.text.stop_strings import StopStrings
from dp_runtime.text.text_stream import text_stream
from dp_runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextStep:
    text: str  # may be shown now
    stop: str | None  # the stop string that ended the text
    num_kept: int  # tokens of this push up to the one that completed the stop string, or all


class OutputText:
    """Holds back incomplete characters, and text that may begin a stop string.

    The first complete stop string ends the text (the longest of several that end together), unless
    it ends within the first min_tokens tokens. Steps concatenate to the text of all kept tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        self._stream = text_stream(tokenizer, prompt_token_ids, skip_special_tokens)
        hidden = tokenizer.special_tokens if stop and skip_special_tokens else {}
        self._stops = StopStrings(stop, hidden.values(), include_stop)
        self._mark_of = {
            token_id: self._stops.marks[token]
            for token_id, token in hidden.items()
            if token in self._stops.marks
        }
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._ended = False

    def push(self, token_ids: Sequence[int]) -> TextStep:
        assert not self._ended, "the text has ended"
        parts = []
        for kept, token_id in enumerate(token_ids, 1):
            self._num_tokens += 1
            parts.append(self._show(self._next(token_id)))
            if self._stops.matched is not None:
                self._ended = True
                return TextStep("".join(parts), self._stops.matched, kept)
        return TextStep("".join(parts), None, len(token_ids))

    def finish(self) -> TextStep:
        """Show what was held back, which may still complete a stop string."""
        assert not self._ended, "the text has ended"
        self._ended = True
        text = self._show(self._stream.flush())
        if self._stops.matched is None:
            text += self._stops.flush()
        return TextStep(text, self._stops.matched, 0)

    def _next(self, token_id: int) -> str:
        mark = self._mark_of.get(token_id)
        return self._stream.step(token_id) if mark is None else self._stream.flush() + mark

    def _show(self, text: str) -> str:
        return self._stops.feed(text, may_match=self._num_tokens > self._min_tokens)

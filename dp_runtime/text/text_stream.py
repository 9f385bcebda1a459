"""TextStream: the text of a growing token sequence, piece by piece (docs/architecture.md)."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Protocol

from dp_runtime.text.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MAX_PROMPT_CONTEXT = 64  # tokens; more than one matters only where none has text of its own


class TextStream(Protocol):
    """Text of a growing sequence: `step`s and one `flush` concatenate to its decoded text."""

    def step(self, token_id: int) -> str: ...  # the text that no later token can change

    def flush(self) -> str: ...  # what is left, as if no token came after


def text_stream(
    tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool
) -> TextStream:
    """Decode what follows a prompt, such that both texts together are the text of all tokens."""
    if tokenizer.is_byte_level:
        return _ByteLevelStream(tokenizer, skip_special_tokens)
    return _WindowStream(tokenizer, prompt_token_ids, skip_special_tokens)


class _ByteLevelStream:
    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token_id: int) -> str:
        token = self._tokenizer.shown_token(token_id, self._skip_special_tokens)
        return "" if token is None else self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowStream:
    """Decodes new tokens together with the last one before them that has text.

    The first token of a sequence is special, hence the context. A run of byte tokens is held until
    it ends: it becomes characters as a whole, or replacement characters if any byte is wrong.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._context = self._context_of(self._last_shown(prompt_token_ids))
        self._pending: list[int] = []

    def step(self, token_id: int) -> str:
        token = self._shown(token_id)
        if token is None:
            return ""
        self._pending.append(token_id)
        return "" if _BYTE_TOKEN.fullmatch(token) else self.flush()

    def flush(self) -> str:
        window = self._context + self._pending
        before, text = self._decode(self._context), self._decode(window)
        if not text.startswith(before):  # the context is bytes, with which these have merged
            before, text = "", self._decode(self._pending)
        self._context, self._pending = self._context_of(window), []
        return text[len(before) :]

    def _context_of(self, window: list[int]) -> list[int]:
        """Return the last tokens, from one with text on; no bytes, which the next could join."""
        end = len(window)
        while end and _BYTE_TOKEN.fullmatch(self._shown(window[end - 1]) or ""):
            end -= 1
        solid = window[:end] or window
        # After a token with text no token is the first; one without may leave that to the next.
        return solid[-1:] if self._decode(solid[-1:]) else solid

    def _last_shown(self, token_ids: Sequence[int]) -> list[int]:
        shown: list[int] = []
        for token_id in reversed(token_ids):
            if len(shown) == _MAX_PROMPT_CONTEXT:
                break
            if self._shown(token_id) is not None:
                shown.append(token_id)
        return shown[::-1]

    def _shown(self, token_id: int) -> str | None:
        return self._tokenizer.shown_token(token_id, self._skip_special_tokens)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)

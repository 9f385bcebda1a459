"""Log probabilities as OpenAI's answers have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dp_runtime.core.request import TokenLogprob
from dp_runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenNames:
    """Spells tokens: by their text, or as `token_id:7` where ids are asked for or text is none."""

    tokenizer: Tokenizer | None
    as_ids: bool

    def __getitem__(self, token_id: int) -> str:
        if self.as_ids or self.tokenizer is None:
            return f"token_id:{token_id}"
        return self.text([token_id])

    def bytes_of(self, token_id: int) -> list[int]:
        """The bytes of a token, which may be a part of a character only."""
        tokenizer = self.tokenizer
        if tokenizer is None or not tokenizer.is_byte_level:
            return list(self.text([token_id]).encode())
        return list(tokenizer.token_bytes(tokenizer.shown_token(token_id, False) or ""))

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of tokens; none without a tokenizer."""
        return self.tokenizer.decode(token_ids, False) if self.tokenizer else ""


@dataclass(eq=False)
class CompletionLogprobs:
    """Builds the `logprobs` of one choice, part by part; offsets go on from part to part."""

    names: TokenNames
    num_top: int
    _offset: int = field(default=0, init=False)

    def part(
        self, token_ids: Sequence[int], entries: Sequence[TokenLogprob | None]
    ) -> dict[str, Any]:
        """The columns for some tokens; the first token of a prompt has no entry."""
        tokens = [self.names[token_id] for token_id in token_ids]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob if entry else None for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprob | None) -> dict[str, float] | None:
        if entry is None:
            return None
        # Texts of different tokens may be equal: the chosen token, then the most probable, wins.
        best = [(entry.token_id, entry.logprob), *entry.top[: self.num_top]]
        return {self.names[token_id]: logprob for token_id, logprob in reversed(best)}


def chat_logprobs(
    entries: Sequence[TokenLogprob], names: TokenNames, num_top: int
) -> dict[str, Any]:
    """The `logprobs` of a choice of a chat, for some of its tokens."""

    def spelled(token_id: int, logprob: float) -> dict[str, Any]:
        spelling = {"token": names[token_id], "bytes": names.bytes_of(token_id)}
        return spelling | {"logprob": logprob}

    content = [
        spelled(entry.token_id, entry.logprob)
        | {"top_logprobs": [spelled(*pair) for pair in entry.top[:num_top]]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def named_logprobs(
    entries: Sequence[TokenLogprob | None], names: TokenNames
) -> list[dict[str, Any] | None]:
    """Log probabilities by token id, with their texts, as the field `prompt_logprobs` has them."""
    return [None if entry is None else _named(entry, names) for entry in entries]


def _named(entry: TokenLogprob, names: TokenNames) -> dict[str, Any]:
    pairs = dict([(entry.token_id, entry.logprob), *entry.top])
    return {
        str(token_id): {"logprob": logprob, "decoded_token": names[token_id]}
        for token_id, logprob in pairs.items()
    }

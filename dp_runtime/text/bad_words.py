"""Words that an output must not have, as the sequences of tokens that spell them."""

from __future__ import annotations

from collections.abc import Sequence

from dp_runtime.errors import require
from dp_runtime.text.tokenizer import Tokenizer


def encoded_bad_words(
    words: Sequence[str], tokenizer: Tokenizer, vocab_size: int
) -> tuple[tuple[int, ...], ...]:
    """Encode each word with and without a space before it, as vLLM's bad_words are.

    A spelling with a token that the model does not have can't be generated, and is left out.
    """
    spellings: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip(" ") or word
        for text in (bare, f" {bare}"):
            tokens = tuple(tokenizer.encode(text, add_special_tokens=False, field="bad_words"))
            require(bool(tokens), "bad_words", word, "words of which the tokenizer makes tokens")
            spellings[tokens] = None
    return tuple(tokens for tokens in spellings if max(tokens) < vocab_size)

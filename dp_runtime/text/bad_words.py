"""Words that an output must not have, as the sequences of tokens that spell them."""

from __future__ import annotations

from collections.abc import Sequence

from dp_runtime.errors import require
from dp_runtime.text.tokenizer import Tokenizer

MAX_TOKENS = 16_384  # that are compared with every row: each spelling as long as the longest


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
    known = tuple(tokens for tokens in spellings if max(tokens) < vocab_size)
    size = len(known) * max(map(len, known), default=0)
    few = f"at most {MAX_TOKENS} tokens: spellings times the tokens of the longest, here {size}"
    require(size <= MAX_TOKENS, "bad_words", words, few)
    return known

"""The tiny model's vocabulary, and what masks say about it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dp_runtime.cli.model_choice import TINY_MODEL
from dp_runtime.core.structured_outputs import StructuredOutputs
from dp_runtime.structured.grammar_compiler import GrammarCompiler
from dp_runtime.text.tokenizer import Tokenizer

TOKENIZER_JSON = Path(TINY_MODEL, "tokenizer.json").read_text()
VOCAB, EOS = 3072, 0


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(TOKENIZER_JSON)


@cache
def compiler(vocab_size: int = VOCAB) -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER_JSON, vocab_size, (EOS,))


@cache
def texts() -> tuple[str, ...]:
    """The text of every token, that of end-of-text being empty."""
    return tuple(tokenizer().decode([token]) for token in range(VOCAB))


def tokens_of(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


def regex(text: str) -> StructuredOutputs:
    return StructuredOutputs(regex=text)


def token_ids(packed: NDArray[np.uint8]) -> set[int]:
    """The tokens whose bits are set."""
    return set(np.flatnonzero(np.unpackbits(packed, bitorder="little")).tolist())

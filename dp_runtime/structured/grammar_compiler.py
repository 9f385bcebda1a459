"""GrammarCompiler: from StructuredOutputs to matchers, which say what tokens may come next."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from dp_runtime.core.structured_outputs import StructuredOutputs
from dp_runtime.errors import not_allowed
from dp_runtime.structured.grammar import compilable, grammar_of, one_error
from dp_runtime.structured.matchers import new_matcher, new_vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class GrammarCompiler:
    """Compiles for one vocabulary, one grammar at a time, what passed a GrammarTrial.

    The first grammar waits for the vocabulary to be read, which takes about a second.
    """

    def __init__(
        self, tokenizer_json: str | None, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self.eos_token_ids = [token for token in eos_token_ids if token < vocab_size]
        self._compiling = threading.Lock()

    def matcher(self, wanted: StructuredOutputs) -> LLMatcher:
        """Compile a matcher, from any thread; ValueError for what is not supported."""
        compilable(wanted, self._tokenizer_json, self.eos_token_ids)
        with self._compiling:
            try:
                return new_matcher(self.vocabulary, grammar_of(wanted))
            except BaseException as error:  # a panic of the library is no Exception
                field, value = f"structured_outputs.{wanted.kind}", getattr(wanted, wanted.kind)
                raise not_allowed(field, value, one_error(str(error))) from None

    @cached_property
    def vocabulary(self) -> LLTokenizer:
        return new_vocabulary(self._tokenizer_json or "", self._vocab_size, self.eos_token_ids)

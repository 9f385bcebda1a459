"""GrammarCompiler: from StructuredOutputs to matchers, which say what tokens may come next."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from time import thread_time
from typing import TYPE_CHECKING

from dp_runtime.core.structured_outputs import MAX_BYTES, StructuredOutputs
from dp_runtime.errors import not_allowed, require
from dp_runtime.structured.grammar import grammar_of, one_error, require_installed

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

COMPILE_S = 10.0  # that a caller waits at most
MAX_WORK_S = 1.0  # a rank compiles again for each request
MAX_LEXER_STATES = 50_000  # of a request, of 1 to 2 KB each
MAX_KNOWN_BYTES = 4 * MAX_BYTES
ENTRY_BYTES = 1024  # of each known one beside its text


@dataclass(frozen=True, eq=False)
class Compiled:
    matcher: LLMatcher
    work_s: float  # of a processor


class GrammarCompiler:
    """Compiles for one vocabulary, one grammar at a time, from any thread.

    The first grammar waits for the vocabulary to be read, which takes about a second.
    """

    def __init__(
        self, tokenizer_json: str | None, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self.eos_token_ids = [token for token in eos_token_ids if token < vocab_size]
        self._lock = threading.Lock()
        self._compiling = threading.Lock()  # until a compilation ends, also if nobody waits for it
        self._checked: OrderedDict[StructuredOutputs, int] = OrderedDict()  # sizes, latest last

    def check(self, wanted: StructuredOutputs) -> None:
        """Raise ValueError for what can't be compiled; the latest that could are known."""
        if wanted not in self._checked:
            field, value = f"structured_outputs.{wanted.kind}", getattr(wanted, wanted.kind)
            allowed = f"what takes at most {MAX_WORK_S:g} s of a processor to compile"
            require(self._compile(wanted).work_s <= MAX_WORK_S, field, value, allowed)
        with self._lock:
            self._checked[wanted] = ENTRY_BYTES + len(str(getattr(wanted, wanted.kind)))
            self._checked.move_to_end(wanted)
            while sum(self._checked.values()) > MAX_KNOWN_BYTES:
                self._checked.popitem(last=False)

    def matcher(self, wanted: StructuredOutputs) -> LLMatcher:
        """Compile a matcher; ValueError for what is not supported."""
        return self._compile(wanted).matcher

    def _compile(self, wanted: StructuredOutputs) -> Compiled:
        require_installed(wanted)
        text = self._tokenizer_json
        allowed = "None: the model's directory has no tokenizer.json"
        require(text is not None, "structured_outputs", wanted.kind, allowed)
        allowed = "None: the model has no end-of-text token"
        require(bool(self.eos_token_ids), "structured_outputs", wanted.kind, allowed)
        field, value = f"structured_outputs.{wanted.kind}", getattr(wanted, wanted.kind)
        ready = self._compiling.acquire(timeout=COMPILE_S)
        require(ready, field, value, "try it later: another grammar is still being compiled")
        compiled: Future[Compiled] = Future()
        threading.Thread(
            target=self._work, args=(wanted, compiled), name="compile-grammar", daemon=True
        ).start()
        try:
            return compiled.result(COMPILE_S)
        except TimeoutError:
            reason = f"it takes more than {COMPILE_S:g} s to compile"
        except ValueError as error:
            reason = str(error)
        raise not_allowed(field, value, reason)

    def _work(self, wanted: StructuredOutputs, compiled: Future[Compiled]) -> None:
        try:
            vocabulary, started = self.vocabulary, thread_time()
            matcher = _new_matcher(vocabulary, wanted)
            compiled.set_result(Compiled(matcher, thread_time() - started))
        except BaseException as error:  # a panic of the library is no Exception
            compiled.set_exception(ValueError(one_error(str(error))))
        finally:
            self._compiling.release()

    @cached_property
    def vocabulary(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        text = (self._tokenizer_json or "").strip()  # what does not begin with a brace is a path
        eos = self.eos_token_ids
        try:
            with suppress(ValueError):
                return LLTokenizer(text, n_vocab=self._vocab_size, eos_token=eos)
            return LLTokenizer(text, eos_token=eos)  # it may have more tokens than the model
        except ValueError as error:
            raise ValueError(f"llguidance can't read tokenizer.json: {error}") from None


def _new_matcher(vocabulary: LLTokenizer, wanted: StructuredOutputs) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(  # by default a regex may take 500 MB, and a mask 50 ms
        step_lexer_fuel=100_000, step_max_items=20_000, max_lexer_states=MAX_LEXER_STATES,
        verbose_errors=False,
    )  # fmt: skip
    matcher = LLMatcher(vocabulary, grammar_of(wanted), log_level=0, limits=limits)
    matcher.compute_bitmask()  # it may fail where nothing did before
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return matcher

"""Matchers of llguidance within limits; run as a script, it tries grammars for another process.

NOTE: it imports nothing of the runtime, for which that process would wait for seconds.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_LEXER_STATES = 50_000  # of a request, of 1 to 2 KB each
TRIAL_STACK = 3 << 19  # bytes; a rank has at least a third more for the same grammar


def new_vocabulary(tokenizer_json: str, vocab_size: int, eos: Sequence[int]) -> LLTokenizer:
    from llguidance import LLTokenizer

    text = tokenizer_json.strip()  # what does not begin with a brace is a path
    try:
        with suppress(ValueError):
            return LLTokenizer(text, n_vocab=vocab_size, eos_token=list(eos))
        return LLTokenizer(text, eos_token=list(eos))  # it may have more tokens than the model
    except ValueError as error:
        raise ValueError(f"llguidance can't read tokenizer.json: {error}") from None


def new_matcher(vocabulary: LLTokenizer, grammar: str) -> LLMatcher:
    """Compile a grammar, and see that it can be followed at its beginning (ValueError)."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(  # by default a regex may take 500 MB, and a mask 50 ms
        step_lexer_fuel=100_000, step_max_items=20_000, max_lexer_states=MAX_LEXER_STATES,
        verbose_errors=False,
    )  # fmt: skip
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    matcher.compute_bitmask()  # it may fail where nothing did before
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return matcher


def follow_forced(matcher: LLMatcher) -> None:
    """Go on behind the tokens that are the only ones, as the brace of an object (ValueError)."""
    matcher.try_consume_tokens(matcher.compute_ff_tokens())  # the text of a special one may not
    if not matcher.is_stopped():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(matcher.get_error())


def _serve(channel: socket.socket) -> None:
    """Answer each grammar, a line of JSON, with why it is refused, if it is."""
    with channel.makefile("rw") as lines:
        given = json.loads(lines.readline())
        vocabulary: LLTokenizer | None = None
        for line in lines:
            wanted = json.loads(line)
            answer: dict[str, Any] = {}
            try:
                vocabulary = vocabulary or new_vocabulary(**given)
                # Its default action ends this process: nothing within could.
                signal.setitimer(signal.ITIMER_PROF, wanted["max_work_s"])
                follow_forced(new_matcher(vocabulary, wanted["grammar"]))
            except BaseException as error:  # a panic of the library is no Exception
                answer["error"] = str(error)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            lines.write(json.dumps(answer) + "\n")
            lines.flush()


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; it ends with its owner
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(TRIAL_STACK)
    serving = threading.Thread(target=_serve, args=(socket.socket(fileno=os.dup(0)),))
    serving.start()
    serving.join()


if __name__ == "__main__":
    _main()

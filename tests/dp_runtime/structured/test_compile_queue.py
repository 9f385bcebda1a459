"""The queue of requests whose grammars are compiled: its order, and what leaves it early."""

from __future__ import annotations

import threading
from time import sleep

from llguidance import LLMatcher

from dp_runtime.core.request import RankRequest
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.core.structured_outputs import StructuredOutputs
from dp_runtime.structured.compile_queue import CompileQueue
from dp_runtime.structured.grammar_compiler import GrammarCompiler
from dp_runtime.structured.structured_state import StructuredState
from tests.dp_runtime.structured.vocabulary import EOS, TOKENIZER_JSON, VOCAB


class GatedCompiler(GrammarCompiler):
    """Compiles one grammar each time it is told to."""

    def __init__(self) -> None:
        super().__init__(TOKENIZER_JSON, VOCAB, (EOS,))
        self.may, self.begun = threading.Semaphore(0), threading.Semaphore(0)

    def matcher(self, wanted: StructuredOutputs) -> LLMatcher:
        self.begun.release()
        assert self.may.acquire(timeout=60)
        return super().matcher(wanted)


def request(number: int, pattern: str) -> RankRequest:
    params = SamplingParams(structured_outputs=StructuredOutputs(regex=pattern))
    return RankRequest(number, (1,), params, 0, frozenset({EOS}))


class Queued:
    def __init__(self) -> None:
        self.compiler = GatedCompiler()
        self.structured = StructuredState(self.compiler, VOCAB)
        self.queue = CompileQueue(self.structured)
        self.forwarded: list[int] = []

    def put(self, number: int, pattern: str) -> None:
        self.queue.put(request(number, pattern), lambda it: self.forwarded.append(it.request_id))

    def compile(self, count: int) -> None:
        due = len(self.forwarded) + count
        self.compiler.may.release(count)
        while len(self.forwarded) < due:
            sleep(0.001)

    def ready(self, number: int) -> bool:
        return self.structured._ready.take(number) is not None


def test_grammars_take_turns() -> None:
    queued = Queued()
    for number in range(4):
        queued.put(number, "a")
    assert queued.compiler.begun.acquire(timeout=60)
    for number in (4, 5):
        queued.put(number, "b")
    queued.put(6, "c")
    assert len(queued.queue) == 7
    queued.compile(7)
    assert queued.forwarded == [0, 1, 4, 6, 2, 5, 3]
    assert all(map(queued.ready, range(7)))
    queued.put(7, "a")  # a new thread, for the first has ended
    queued.compile(1)
    assert queued.forwarded[-1] == 7
    assert len(queued.queue) == 0


def test_who_is_to_end_waits_for_no_grammar_and_leaves_none() -> None:
    queued = Queued()
    for number in range(4):
        queued.put(number, "ab"[number % 2])
    assert queued.compiler.begun.acquire(timeout=60)
    queued.queue.release([0, 3, 9])
    assert queued.forwarded == [0, 3]
    queued.compiler.may.release()  # the one that nobody waits for
    queued.compile(2)
    assert queued.forwarded == [0, 3, 1, 2]
    assert [number for number in range(4) if queued.ready(number)] == [1, 2]

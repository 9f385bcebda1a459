"""StructuredState: the grammars that a rank's requests follow, and the masks of a step's rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from dp_runtime.core.batch import Int32, SamplePositions
from dp_runtime.core.device_copy import HostCopy
from dp_runtime.core.request import RankRequest
from dp_runtime.sampling.draft_verification import Verification, first_positions
from dp_runtime.sampling.filters import Array
from dp_runtime.sampling.sampler import Sampled
from dp_runtime.sampling.token_masks import NO_GRAMMARS, GrammarMasks
from dp_runtime.structured.grammar_compiler import GrammarCompiler
from dp_runtime.structured.grammar_follower import GrammarFollower
from dp_runtime.structured.masked_rows import MaskedRows, RequestRows
from dp_runtime.structured.ready_matchers import ReadyMatchers

if TYPE_CHECKING:
    from llguidance import LLExecutor

Entry = TypeVar("Entry", bound=tuple[Any, ...])


class StructuredState:
    """Masks what grammars forbid; a PerRequestState of the requests that have one.

    `begin` comes before the passes of a step and `masks` after they are launched: it waits for the
    tokens of the step before, and works while the device does. Neither waits where no request of
    the step has a grammar.
    """

    def __init__(self, compiler: GrammarCompiler, vocab_size: int) -> None:
        self.compiler = compiler
        self._vocab_size = vocab_size
        self._ready = ReadyMatchers()
        self._followers: dict[int, GrammarFollower] = {}  # by row of the request table
        self._unread: MaskedRows | None = None  # sampled, and not followed yet

    def compile_early(self, request: RankRequest) -> None:
        """Compile what a request will need, in the caller's thread; `add` raises what fails."""
        wanted = request.params.structured_outputs
        if wanted is not None and not self._ready.full:
            try:
                self._ready.put(request.request_id, self.compiler.matcher(wanted))
            except Exception as error:  # of this request alone
                self._ready.put(request.request_id, error)

    def forget(self, request_ids: Sequence[int]) -> None:
        """Drop what was compiled early for requests that will not be added."""
        self._ready.drop(request_ids)

    def add(self, req_index: int, request: RankRequest, outputs: Sequence[int]) -> None:
        assert req_index not in self._followers, f"row {req_index} has a grammar already"
        if (wanted := request.params.structured_outputs) is not None:
            # Copies of a matcher share states of its lexer, and the limit of their number.
            matcher = self._ready.take(request.request_id) or self.compiler.matcher(wanted)
            follower = GrammarFollower(matcher, request)
            follower.advance(outputs)
            self._followers[req_index] = follower

    def remove(self, req_index: int) -> None:
        self._followers.pop(req_index, None)

    def check(self, req_indices: Sequence[int]) -> None:
        others = sorted({*self._followers} - {*req_indices})
        assert not others, f"grammars of rows {others}, which nobody has"

    def begin(
        self, samples: SamplePositions, verification: Verification | None = None
    ) -> MaskedRows | None:
        """Find the rows that need masks, and have their drafts copied; None if none do."""
        if not self._followers:
            return None
        drafted = verification or Verification.none(torch.device("cpu"))
        firsts = first_positions(samples, drafted)
        requests = list[RequestRows]()
        places = zip(firsts.req_indices.tolist(), firsts.output_indices.tolist())
        for number, (req_index, output_index) in enumerate(places):
            if (follower := self._followers.get(req_index)) is not None:
                span = drafted.rows_of(number)
                rows = range(span.start, span.stop)
                requests.append(RequestRows(follower, number, rows, output_index))
        if not requests:
            return None
        verified = any(request.num_drafts for request in requests)
        return MaskedRows(requests, HostCopy(drafted.drafts) if verified else None)

    def masks(self, masked: MaskedRows | None) -> GrammarMasks:
        if masked is None:
            return NO_GRAMMARS
        if self._unread is not None:
            self._unread.follow()
            self._unread = None
        live = [request for request in masked.requests if not request.follower.ended]
        for request in live:
            known, index = request.follower.num_outputs, request.output_index
            assert known == index, f"a grammar knows {known} outputs, and output {index} is sampled"
        return self._fill(live, [masked.drafts_of(request) for request in live])

    def _fill(self, requests: list[RequestRows], drafts: list[list[int]]) -> GrammarMasks:
        """Mask each request's first row, and those after drafts as long as its grammar allows them.

        Rows after a forbidden draft are not masked: what they sample is rejected with it.
        """
        *places, num_rows = accumulate((len(request.rows) for request in requests), initial=0)
        words = np.full((num_rows, -(-self.compiler.vocabulary.vocab_size // 32)), -1, np.int32)
        self._compute(requests, places, drafts, words)
        packed = words.view(np.uint8)[:, : -(-self._vocab_size // 8)]
        allowed, causes = dict[int, Array](), dict[int, str]()
        for request, place in zip(requests, places):
            error = request.follower.error
            if error:
                causes[request.rows.start] = f"structured_outputs: {error}"
                words[place] = 0
            elif request.follower.ignore_eos:
                self._hide_eos(words[place : place + len(request.rows)])
            allowed |= zip(request.rows, packed[place:])
        return GrammarMasks(allowed, causes)

    def _compute(
        self,
        requests: list[RequestRows],
        places: list[int],
        drafts: list[list[int]],
        words: Int32,
    ) -> None:
        """Fill the rows of words [rows, vocab / 32] int32, with all threads that the rank has."""
        matchers = [request.follower.matcher for request in requests]
        given = list(zip(matchers, places, drafts))
        into = words.ctypes.data, words.strides[0], len(words)
        followers = {place: request.follower for place, request in zip(places, requests)}

        def compute(work: Callable[..., object], entries: list[Entry]) -> None:
            try:
                work(entries, *into)
            except BaseException:  # of one of them; a panic of the library is no Exception
                for entry in entries:
                    followers[entry[1]].guarded(work, [entry], *into)

        for some in _at_once([(matcher, place) for matcher, place, chain in given if not chain]):
            compute(self._executor.unsafe_compute_mask_ptr, some)
        for chains in _at_once([entry for entry in given if entry[2]]):
            compute(self._executor.unsafe_compute_mask_ptr_with_draft_token, chains)

    def _hide_eos(self, words: Int32) -> None:
        """Forbid end-of-text in the rows that allow something else."""
        others = words & ~self._eos_words
        words[:] = np.where(others.any(1, keepdims=True), others, words)

    @cached_property
    def _executor(self) -> LLExecutor:
        from llguidance import LLExecutor

        return LLExecutor(torch.get_num_threads())

    @cached_property
    def _eos_words(self) -> Int32:
        eos = np.zeros(self.compiler.vocabulary.vocab_size, np.bool_)
        eos[self.compiler.eos_token_ids] = True
        words = np.zeros(-(-len(eos) // 32), np.int32)
        bits = np.packbits(eos, bitorder="little")
        words.view(np.uint8)[: len(bits)] = bits
        return words

    def sampled(self, masked: MaskedRows | None, sampled: Sampled) -> None:
        """Note what a step samples; the next one that is masked reads it."""
        if masked is not None:
            self._unread = replace(masked, sampled=sampled)


def _at_once(entries: list[Entry]) -> list[list[Entry]]:
    """Split what the executor gets: it computes one entry here, and more in threads of its own."""
    if torch.get_num_threads() > 1 and entries:
        return [entries]
    return [[entry] for entry in entries]

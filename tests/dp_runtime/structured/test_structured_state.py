"""A rank's grammars over steps, with and without drafts, against matchers that begin anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from dp_runtime.core.batch import SamplePositions
from dp_runtime.core.device_copy import HostCopy
from dp_runtime.core.request import RankRequest
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.core.structured_outputs import StructuredOutputs
from dp_runtime.sampling.draft_verification import Verification
from dp_runtime.sampling.sampler import Sampled
from dp_runtime.sampling.token_masks import GrammarMasks
from dp_runtime.structured import matchers, ready_matchers
from dp_runtime.structured.grammar_compiler import GrammarCompiler
from dp_runtime.structured.structured_state import StructuredState
from tests.dp_runtime.structured.vocabulary import (
    EOS,
    VOCAB,
    compiler,
    regex,
    token_ids,
    tokens_of,
)

WANTED = regex("(ab|cd){2,4}( the end)?")
A, B, C, D = (tokens_of(letter)[0] for letter in "abcd")


def request(
    request_id: int,
    wanted: StructuredOutputs | None = WANTED,
    stops: Sequence[int] = (EOS,),
    **more: Any,
) -> RankRequest:
    params = SamplingParams(max_tokens=99, structured_outputs=wanted, **more)
    return RankRequest(request_id, (1, 2), params, 0, frozenset(stops))


def state_of(*requests: RankRequest) -> StructuredState:
    """The requests are in the rows that their ids name."""
    state = StructuredState(compiler(), VOCAB)
    for item in requests:
        state.add(item.request_id, item, ())
    return state


def rows_of(*rows: tuple[int, int]) -> SamplePositions:
    return SamplePositions(*np.array(rows, np.int64).reshape(-1, 2).T)


def sampled_of(tokens: Sequence[int], accepted: Sequence[int] | None = None) -> Sampled:
    ids = torch.tensor(tokens, dtype=torch.int64)
    counts = [] if accepted is None else [torch.tensor(accepted, dtype=torch.int64)]
    copy = HostCopy(ids, torch.ones(len(ids), dtype=torch.bool), *counts)
    return Sampled(ids, None, (), counts[0] if counts else None, copy)


def step(
    state: StructuredState,
    rows: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    drafts: Sequence[Sequence[int]] | None = None,
    accepted: Sequence[int] | None = None,
) -> GrammarMasks:
    verification = None if drafts is None else Verification(torch.tensor(drafts))
    masked = state.begin(rows_of(*rows), verification)
    masks = state.masks(masked)
    state.sampled(masked, sampled_of(tokens, accepted))
    return masks


def due(outputs: Sequence[int], wanted: StructuredOutputs = WANTED) -> set[int]:
    """What a new matcher allows after these outputs."""
    matcher = compiler().matcher(wanted)
    assert matcher.consume_tokens(list(outputs))
    return token_ids(np.frombuffer(matcher.compute_bitmask(), np.uint8))


def shown(masks: GrammarMasks) -> dict[int, set[int]]:
    assert not masks.causes
    return {row: token_ids(mask) for row, mask in masks.allowed.items()}


def test_requests_without_a_grammar_cost_nothing() -> None:
    state = state_of(request(0, None), request(1, None))
    assert state.begin(rows_of((0, 0), (1, 0))) is None
    state.check([0, 1])
    state.add(2, request(2), ())
    assert state.begin(rows_of((0, 0), (1, 0))) is None, "the one with a grammar has no row"
    assert state.masks(None).allowed == {}
    state.remove(2)
    state.remove(1)
    assert state.begin(rows_of((0, 0))) is None
    with pytest.raises(AssertionError, match=r"grammars of rows \[3\]"):
        state_of(request(3)).check([])


def test_each_mask_follows_the_tokens_of_the_step_before() -> None:
    state, other = state_of(request(1), request(2, None), request(3)), [A, D]
    assert shown(step(state, [(2, 0), (1, 0), (3, 0)], [7, A, C])) == {1: due([]), 2: due([])}
    assert shown(step(state, [(1, 1), (2, 1)], [B, 7])) == {0: due([A])}
    assert step(state, [(2, 2)], [7]).allowed == {}
    assert shown(step(state, [(3, 1), (1, 2)], [D, A])) == {0: due([C]), 1: due([A, B])}
    assert shown(step(state, [(1, 3), (3, 2)], [B, EOS]))[1] == due([C, D])
    assert EOS in due([A, B, A, B])
    assert EOS not in due(other[:1])


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_after_drafts_are_masked_as_far_as_the_grammar_allows_them(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    state = state_of(request(1), request(2), request(3))
    step(state, [(1, 0), (2, 0)], [A, C])
    rows = [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (3, 0)]
    masks = shown(step(state, rows, [B, C, D, D, 9, 9, A], [[B, C], [D, B]], [2, 0]))
    everything = {*range(VOCAB)}
    assert masks == {
        0: due([A]), 1: due([A, B]), 2: due([A, B, C]),
        3: due([C]), 4: due([C, D]), 5: everything, 6: due([]),
    }  # fmt: skip
    rows = [(1, 4), (1, 5), (2, 2), (2, 3), (3, 1), (3, 2)]
    masks = shown(step(state, rows, [A] * 6, [[EOS], [EOS], [EOS]], [0, 0, 0]))
    assert masks[0] == due([A, B, C, D])
    assert masks[1] == {EOS}, "end-of-text is all that may follow it"
    assert (masks[2], masks[3]) == (due([C, D]), everything)
    assert (masks[4], masks[5]) == (due([A]), everything)


def test_chunks_have_a_row_beside_verifications() -> None:
    """The numbers of drafts may change from step to step, down to no request that decodes."""
    state = state_of(request(1), request(2))
    masked = state.begin(rows_of((1, 0)), Verification(torch.zeros((0, 3), dtype=torch.int64)))
    assert shown(state.masks(masked)) == {0: due([])}
    state.sampled(masked, sampled_of([A], []))
    masks = shown(step(state, [(1, 1), (1, 2), (2, 0)], [B, A, C], [[B]], [1]))
    assert masks == {0: due([A]), 1: due([A, B]), 2: due([])}
    masks = shown(step(state, [(2, 1), (2, 2), (2, 3), (1, 3)], [D, 0, 0, B], [[D, D]], [0]))
    assert masks[0] == due([C])
    assert masks[3] == due([A, B, A])


@pytest.mark.parametrize("stop", [EOS, B])
def test_nothing_is_masked_after_the_end(stop: int) -> None:
    """A step that was scheduled before the end was known is dropped."""
    state = state_of(request(1, stops=(EOS, B)), request(2))
    outputs = [A, stop] if stop == B else [C, D, C, D, EOS]
    for index, token in enumerate(outputs):
        step(state, [(1, index), (2, index)], [token, [A, B][index % 2]])
    assert shown(step(state, [(1, len(outputs)), (2, len(outputs))], [5, A])).keys() == {1}


def test_a_request_in_another_row_begins_with_its_outputs() -> None:
    """What a step sampled for the row's last owner, and nobody has read, is not the new one's."""
    state, wanted = state_of(request(1)), regex("[xyz]{5}")
    step(state, [(1, 0)], [A])
    step(state, [(1, 1)], [B])
    state.remove(1)
    state.add(1, request(7, wanted), ())
    state.add(4, request(1), [A, B])
    state.check([1, 4])
    masks = shown(step(state, [(1, 0), (4, 2)], [tokens_of("x")[0], C]))
    assert masks == {0: due([], wanted), 1: due([A, B])}
    assert shown(step(state, [(4, 3)], [D])) == {0: due([A, B, C])}


def test_ignored_end_of_text_waits_for_the_grammar_s_end() -> None:
    state = state_of(request(1, regex("ab?"), ignore_eos=True), request(2, regex("ab?")))
    step(state, [(1, 0), (2, 0)], [A, A])
    masks = shown(step(state, [(1, 1), (2, 1)], [B, EOS]))
    assert masks == {0: {B}, 1: {B, EOS}}
    assert shown(step(state, [(1, 2)], [EOS])) == {0: {EOS}}


def test_a_grammar_that_meets_a_limit_allows_nothing_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matchers, "MAX_LEXER_STATES", 2000)
    (letter,) = tokens_of("e")
    state, index = state_of(request(1, regex(r"\p{L}{1,9999}")), request(2)), 0
    while not (masks := step(state, [(1, index), (2, 0)][: 1 + (index == 0)], [letter, A])).causes:
        index += 1
    assert "too many states" in masks.causes[0]
    assert masks.causes[0].startswith("structured_outputs: ")
    assert masks.causes[0].isprintable()
    assert token_ids(masks.allowed[0]) == set()
    assert shown(step(state, [(2, 1)], [B])) == {0: due([A])}, "the other goes on"


def test_tokens_that_the_model_lacks_have_no_bit() -> None:
    state = StructuredState(compiler(600), 600)
    state.add(1, request(1), ())
    masked = state.begin(rows_of((1, 0)))
    assert [len(mask) for mask in state.masks(masked).allowed.values()] == [75]


def test_what_can_t_be_compiled_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    state = StructuredState(compiler(), VOCAB)
    for item in (request(1, regex("(")), request(2), request(3)):
        state.compile_early(item)
    state.forget([3, 99])
    monkeypatch.setattr(GrammarCompiler, "matcher", lambda self, wanted: pytest.fail("compiled"))
    with pytest.raises(ValueError, match="unclosed"):
        state.add(0, request(1, regex("(")), ())
    state.add(0, request(2), ())
    with pytest.raises(pytest.fail.Exception, match="compiled"):
        state.add(1, request(3), ())


def test_few_are_compiled_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready_matchers, "MAX_READY", 2)
    state = StructuredState(compiler(), VOCAB)
    for n in range(4):
        state.compile_early(request(n))
    monkeypatch.setattr(GrammarCompiler, "matcher", lambda self, wanted: pytest.fail("compiled"))
    for n in (0, 1):
        state.add(n, request(n), ())
    with pytest.raises(pytest.fail.Exception, match="compiled"):
        state.add(2, request(2), ())


def test_what_was_compiled_early_is_taken_once() -> None:
    state, item = StructuredState(compiler(), VOCAB), request(5)
    for each in (item, request(6, regex("(")), request(7, None)):
        state.compile_early(each)
    state.add(0, item, ())
    state.add(1, item, [A])
    assert shown(step(state, [(0, 0), (1, 1)], [A, B])) == {0: due([]), 1: due([A])}
    with pytest.raises(ValueError, match=r"structured_outputs\.regex: '\(' is not allowed"):
        state.add(2, request(6, regex("(")), ())
    state.check([0, 1])

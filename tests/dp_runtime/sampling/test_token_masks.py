"""Masks of grammars, alone and with what else keeps tokens from being chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from dp_runtime.core.batch import SamplePositions
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.core.structured_outputs import StructuredOutputs
from dp_runtime.sampling.row_logits import RowLogits
from dp_runtime.sampling.sampler import Sampled, Sampler
from dp_runtime.sampling.token_masks import GrammarMasks
from tests.dp_runtime.samplers import rows_of, sample, sampler_of
from tests.dp_runtime.sampling.test_sampler import VOCAB, logits_of, request


def grammar_of(allowed: dict[int, list[int]], cause: str = "") -> GrammarMasks:
    bits = {row: np.isin(np.arange(VOCAB), ids) for row, ids in allowed.items()}
    packed = {row: np.packbits(mask, bitorder="little") for row, mask in bits.items()}
    return GrammarMasks(packed, {0: cause} if cause else {})


def masked_sample(
    sampler: Sampler, logits: Tensor, rows: SamplePositions, grammars: GrammarMasks
) -> Sampled:
    return sampler.sample(RowLogits.from_logits(logits), rows, None, grammars)


WORD = StructuredOutputs(regex="a")
GRAMMAR: dict[str, Any] = {"structured_outputs": WORD}


@pytest.mark.parametrize("rows", [3, 150])
def test_grammars_choose_among_what_they_allow(rows: int) -> None:
    """Rows without one keep their tokens, and all the log probabilities of the model."""
    items = [
        request(i, SamplingParams(seed=i, logprobs=2, **(GRAMMAR if i % 3 else {})))
        for i in range(rows)
    ]
    logits, at = logits_of(9, rows=rows), rows_of(*((i, 4) for i in range(rows)))
    allowed = {i: [i % VOCAB, (7 * i + 3) % VOCAB] for i in range(rows) if i % 3}
    found = masked_sample(sampler_of(*items), logits, at, grammar_of(allowed)).to_host()
    free = [replace(item, params=replace(item.params, structured_outputs=None)) for item in items]
    plain = sample(sampler_of(*free), logits, at).to_host()
    logprobs = logits.log_softmax(-1)
    for row, token in enumerate(found.token_ids):
        assert token in allowed[row] if row % 3 else token == plain.token_ids[row]
        entry = found.logprobs[row]
        assert entry is not None
        assert entry.logprob == pytest.approx(float(logprobs[row, token]), abs=1e-5)
        assert entry.top == plain.logprobs[row].top  # type: ignore[union-attr]
    assert not found.invalid


def test_grammars_and_other_masks_allow_what_all_of_them_do() -> None:
    greedy: dict[str, Any] = {"temperature": 0, **GRAMMAR}
    items = [
        request(1, SamplingParams(allowed_token_ids=[4, 5], **greedy)),
        request(2, SamplingParams(min_tokens=3, **greedy), stop_ids=(6,)),
        request(3, SamplingParams(logit_bias={9: 1e9}, **greedy)),
        request(4, SamplingParams(**greedy), bad_words=((8,),)),
    ]
    grammars = grammar_of({0: [3, 5], 1: [6, 7], 2: [2], 3: [8, 1]})
    at = rows_of(*((i, 0) for i in (1, 2, 3, 4)))
    found = masked_sample(sampler_of(*items), logits_of(10, rows=4), at, grammars).to_host()
    assert (found.token_ids, found.invalid) == ((5, 7, 2, 1), {})


def test_a_row_that_may_have_no_token_is_invalid_and_others_are_not() -> None:
    greedy: dict[str, Any] = {"temperature": 0, **GRAMMAR}
    items = [
        request(1, SamplingParams(**GRAMMAR)),
        request(2, SamplingParams(min_tokens=3, **greedy), stop_ids=(6,)),
        request(3, SamplingParams(allowed_token_ids=[4, 5], top_k=3, top_p=0.5, **GRAMMAR)),
        request(4, SamplingParams(**greedy)),
    ]
    grammars = grammar_of({0: [], 1: [6], 2: [9], 3: [8]}, cause="too complex")
    at = rows_of(*((i, 0) for i in (1, 2, 3, 4)))
    sampled = masked_sample(sampler_of(*items), logits_of(11, rows=4), at, grammars)
    assert ((sampled.token_ids >= 0) & (sampled.token_ids < VOCAB)).all(), "the next step reads it"
    found = sampled.to_host()
    assert found.invalid == {0: "too complex", 1: "", 2: ""}
    assert found.token_ids[3] == 8
    assert found.valid_part(0, 1) == (slice(0, 0), "too complex")
    assert found.valid_part(2, 4) == (slice(2, 2), "")
    assert found.valid_part(3, 4) == (slice(3, 4), None)

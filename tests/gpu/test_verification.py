"""Verifications on a GPU are what sampling one by one gives there, and nothing waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from dp_runtime.core.batch import SamplePositions
from dp_runtime.core.request import RankRequest
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.sampling.draft_verification import ForcedAcceptance, Verification
from dp_runtime.sampling.sampler import Sampler
from tests.dp_runtime.samplers import sample
from tests.dp_runtime.samplers import sampler_of as rank_sampler

VOCAB, NUM, NUM_VERIFIED, NUM_DRAFTS, NUM_TABLES = 3_000, 60, 50, 3, 13
PARAMS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, logprobs=3, frequency_penalty=0.7),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, logprobs=0),
    SamplingParams(temperature=1.2, presence_penalty=1.0, repetition_penalty=1.4),
    SamplingParams(temperature=0.6, logit_bias={7: 3.0, 8: -2.0}, min_tokens=4),
    SamplingParams(temperature=2.0, allowed_token_ids=range(8)),  # with the words below
)
BAD_WORDS = ((3,), (0, 4), (4, 0), (5, 6), (6, 7, 5), (7, 7, 7, 0))


def sampler_of(plain: bool) -> Sampler:
    requests = []
    for number in range(NUM):
        params = PARAMS[0] if plain else PARAMS[number % len(PARAMS)]
        words = () if params.allowed_token_ids is None else BAD_WORDS
        requests.append(
            RankRequest(number, (number, 5), params, 3 * number, frozenset({1, 2}), bad_words=words)
        )
    return rank_sampler(*requests, vocab=VOCAB, device="cuda")


def target() -> torch.Tensor:
    """Logits [NUM_TABLES, VOCAB] of bfloat16 precision, the last token picking the row."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = NUM_TABLES, VOCAB
    return (4 * torch.randn(shape, generator=generator, device="cuda")).bfloat16()


@contextmanager
def no_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check(plain: bool) -> None:
    logits_of, alone, num_outputs = target(), sampler_of(plain), NUM_DRAFTS + 4
    ids = np.arange(NUM)
    tokens, entries = torch.zeros((NUM, 1), dtype=torch.int64, device="cuda"), []
    for index in range(num_outputs):
        rows = SamplePositions(ids, np.full(NUM, index))
        sampled = sample(alone, logits_of[tokens[:, -1] % NUM_TABLES], rows)
        tokens = torch.cat([tokens, sampled.token_ids[:, None]], 1)
        entries.append(sampled.to_host().logprobs)
    sampler, each = sampler_of(plain), NUM_DRAFTS + 1
    sample(sampler, logits_of[[0] * NUM], SamplePositions(ids, np.zeros(NUM, np.int64)))
    hits = torch.arange(NUM_VERIFIED, device="cuda") % each
    drafts = tokens[:NUM_VERIFIED, 2 : 2 + NUM_DRAFTS].clone()
    drafts += torch.arange(NUM_DRAFTS, device="cuda") >= hits[:, None]
    drafts %= VOCAB
    inputs = torch.cat([tokens[:NUM_VERIFIED, 1:2], drafts], 1).flatten()
    inputs = torch.cat([inputs, tokens[NUM_VERIFIED:, 1]])
    logits = logits_of[inputs % NUM_TABLES]
    rows = SamplePositions(
        np.concatenate([ids[:NUM_VERIFIED].repeat(each), ids[NUM_VERIFIED:]]),
        np.concatenate(
            [np.tile(np.arange(1, 1 + each), NUM_VERIFIED), np.ones(NUM - NUM_VERIFIED, np.int64)]
        ),
    )
    with no_waits():
        sampled = sample(sampler, logits, rows, Verification(drafts))
    host = sampled.to_host()
    assert host.num_accepted == tuple(hits.tolist())
    expected, lengths = tokens[:, 2:].tolist(), [*host.num_accepted, *[0] * (NUM - NUM_VERIFIED)]
    for number, more in enumerate(lengths):
        row = min(number, NUM_VERIFIED) * each + max(0, number - NUM_VERIFIED)
        for at in range(1 + more):
            assert host.token_ids[row + at] == expected[number][at], (number, at)
            assert host.logprobs[row + at] == entries[1 + at][number]
    last = torch.tensor([expected[number][more] for number, more in enumerate(lengths)])
    indices = np.array(lengths) + 2
    following = sample(sampler, logits_of[last.cuda() % NUM_TABLES], SamplePositions(ids, indices))
    found = following.to_host().token_ids
    assert found == tuple(expected[number][more + 1] for number, more in enumerate(lengths))


def test_plain_verifications_on_a_gpu() -> None:
    check(plain=True)


def test_verifications_of_every_kind_on_a_gpu() -> None:
    check(plain=False)


def test_forced_acceptance_on_a_gpu() -> None:
    sampler = sampler_of(plain=True)
    rows = SamplePositions(np.arange(NUM).repeat(4), np.tile(np.arange(4), NUM))
    logits = target()[torch.arange(4 * NUM, device="cuda") % NUM_TABLES]
    drafts = torch.zeros((NUM, 3), dtype=torch.int64, device="cuda")
    with no_waits():
        sampled = sample(sampler, logits, rows, Verification(drafts, ForcedAcceptance(3.3)))
    seeds, indices = 3 * torch.arange(NUM), torch.zeros(NUM, dtype=torch.int64)
    assert sampled.num_accepted is not None
    assert (
        sampled.num_accepted.tolist() == ForcedAcceptance(3.3).accepted(seeds, indices, 3).tolist()
    )

"""Verification: acceptance by hand, the target's distribution, and tokens as without drafts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dp_runtime.core.batch import SamplePositions
from dp_runtime.core.request import RankRequest, TokenLogprob
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.sampling import logprobs
from dp_runtime.sampling.draft_verification import (
    ForcedAcceptance,
    LastAccepted,
    Verification,
    accepted_drafts,
)
from dp_runtime.sampling.sampler import SampledTokens, Sampler, sampling_bytes
from tests.dp_runtime.live_bytes import LiveBytes
from tests.dp_runtime.samplers import rows_of, sample, sampler_of
from tests.dp_runtime.sampling.test_sampler import (
    BAD_WORDS,
    PARAMS,
    VOCAB,
    logits_of,
    request,
)

CPU = torch.device("cpu")
Entry = tuple[int, TokenLogprob | None]


def rows_from(firsts: Sequence[tuple[int, int]], num_drafts: int) -> list[tuple[int, int]]:
    """Rows of verifications of (request id, output index)."""
    return [(number, index + row) for number, index in firsts for row in range(num_drafts + 1)]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_longest_agreeing_prefix_is_accepted(data: st.DataObject) -> None:
    num, num_drafts = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 7))
    token = st.integers(0, 2)
    sampled = [[data.draw(token) for _ in range(num_drafts + 1)] for _ in range(num)]
    drafts = [[data.draw(token) for _ in range(num_drafts)] for _ in range(num)]
    expected = []
    for ours, theirs in zip(sampled, drafts, strict=True):
        count = 0
        while count < num_drafts and ours[count] == theirs[count]:
            count += 1
        expected.append(count)
    shape = num, num_drafts
    found = accepted_drafts(
        torch.tensor(sampled, dtype=torch.int64).view(num, num_drafts + 1),
        torch.tensor(drafts, dtype=torch.int64).view(shape),
    )
    assert found.dtype == torch.int64
    assert found.tolist() == expected


def test_shapes_must_fit() -> None:
    with pytest.raises(AssertionError, match=r"\(2, 4\) sampled for drafts \(2, 4\)"):
        accepted_drafts(torch.zeros(2, 4), torch.zeros(2, 4))
    items = [request(i, SamplingParams(temperature=0)) for i in range(2)]
    verification = Verification(torch.zeros(2, 1, dtype=torch.int64))
    for rows in (((0, 0), (1, 0), (0, 1), (1, 1)), ((0, 0), (0, 2), (1, 0), (1, 1))):
        with pytest.raises(AssertionError, match="the first 4 rows are 2 verifications"):
            sample(sampler_of(*items), logits_of(0, rows=4), rows_of(*rows), verification)


class Target:
    """A toy model: the logits of an output follow from its request, its index and the token before.

    Rounded as in bfloat16, so that they often tie.
    """

    def __init__(self, seed: int) -> None:
        table = logits_of(seed, rows=11 * VOCAB).bfloat16().float()
        self.table = table.view(11, VOCAB, VOCAB)

    def logits(self, number: int, index: int, before: int) -> Tensor:
        return self.table[(3 * number + index) % 11, before]


def one_by_one(target: Target, item: RankRequest, num_outputs: int) -> list[Entry]:
    sampler, number = sampler_of(item), item.request_id
    found: list[Entry] = []
    for index in range(num_outputs):
        logits = target.logits(number, index, found[-1][0] if found else 0)[None]
        host = sample(sampler, logits, rows_of((number, index))).to_host()
        found.append((host.token_ids[0], host.logprobs[0]))
    return found


def run_step(
    sampler: Sampler,
    target: Target,
    found: dict[int, list[Entry]],
    ids: Sequence[int],
    drafts: Sequence[Sequence[int]],
) -> tuple[int, ...]:
    """Verify drafts of the first requests, sample the others, and append what became outputs."""
    num_drafts = len(drafts[0]) if drafts else 0
    lengths = [1 + num_drafts if place < len(drafts) else 1 for place in range(len(ids))]
    rows, logits = [], []
    for place, (number, length) in enumerate(zip(ids, lengths)):
        some = found[number]
        inputs = [some[-1][0] if some else 0, *(drafts[place] if place < len(drafts) else ())]
        for row in range(length):
            rows.append((number, len(some) + row))
            logits.append(target.logits(number, len(some) + row, inputs[row]))
    verification = Verification(torch.tensor(drafts)) if drafts else None
    host = sample(sampler, torch.stack(logits), rows_of(*rows), verification).to_host()
    assert len(host.num_accepted) == len(drafts)
    row = 0
    for place, (number, length) in enumerate(zip(ids, lengths)):
        end = row + 1 + (host.num_accepted[place] if place < len(drafts) else 0)
        found[number] += zip(host.token_ids[row:end], host.logprobs[row:end])
        row += length
    return host.num_accepted


@settings(max_examples=30, deadline=None)
@given(many=st.lists(PARAMS, min_size=1, max_size=6), data=st.data())
def test_any_batch_gives_what_sampling_one_by_one_gives(
    many: list[SamplingParams], data: st.DataObject
) -> None:
    num_outputs, longest = 6, 4
    target = Target(len(many))
    items = [
        request(i, p, (i, 2 * i, 7), stop_ids=(3, 4), bad_words=data.draw(BAD_WORDS))
        for i, p in enumerate(many)
    ]
    alone = [one_by_one(target, item, num_outputs + longest + 1) for item in items]
    sampler = sampler_of(*items)
    found: dict[int, list[Entry]] = {i: [] for i in range(len(many))}
    while waiting := [i for i, some in found.items() if len(some) < num_outputs]:
        ids = data.draw(st.lists(st.sampled_from(waiting), unique=True, min_size=1))
        num_drafts = data.draw(st.integers(1, longest))
        drafts = [
            [
                token if data.draw(st.integers(0, 3)) else (token + 1) % VOCAB
                for token, _ in alone[i][len(found[i]) : len(found[i]) + num_drafts]
            ]
            for i in ids[: data.draw(st.integers(0, len(ids)))]
        ]
        with patch.object(logprobs, "ROWS_AT_ONCE", data.draw(st.sampled_from([3, 5, 64]))):
            run_step(sampler, target, found, ids, drafts)
    for i, some in found.items():
        assert some == alone[i][: len(some)]


@pytest.mark.parametrize("hits", [0, 2, 3])
def test_more_rows_than_are_looked_at_together(hits: int) -> None:
    params = SamplingParams(
        presence_penalty=1.5, repetition_penalty=1.3, min_tokens=3, logit_bias={5: 4.0}, logprobs=2
    )
    num, target = 40, Target(1)
    items = [request(i, params, prompt=(i,), stop_ids=(5,)) for i in range(num)]
    alone = [one_by_one(target, item, 6) for item in items]
    sampler, ids = sampler_of(*items), range(num)
    found: dict[int, list[Entry]] = {i: [] for i in ids}
    run_step(sampler, target, found, ids, ())
    drafts = [[alone[i][1 + at][0] ^ (at >= hits) for at in range(3)] for i in ids[:30]]
    assert run_step(sampler, target, found, ids, drafts) == (hits,) * 30
    run_step(sampler, target, found, ids, ())
    for i, some in found.items():
        assert some == alone[i][: len(some)]


def test_a_plain_batch_is_its_best_tokens() -> None:
    items = [request(i, SamplingParams(temperature=0)) for i in range(4)]
    logits = logits_of(3, rows=3 * 3 + 1)
    best = logits.argmax(-1)
    drafts = best[:9].view(3, 3)[:, :2].clone()
    drafts[1, 1] = drafts[2, 0] = VOCAB - 1 - drafts[1, 1]
    rows = rows_of(*rows_from([(2, 7), (0, 4), (3, 0)], 2), (1, 0))
    sampled = sample(sampler_of(*items), logits, rows, Verification(drafts))
    assert sampled.num_accepted is not None
    assert sampled.num_accepted.tolist() == [2, 1, 0]
    assert sampled.to_host() == SampledTokens(tuple(best.tolist()), (None,) * 10, (2, 1, 0))


def test_no_verification_on_an_idle_rank() -> None:
    none = Verification(torch.zeros((0, 3), dtype=torch.int64))
    sampled = sample(sampler_of(), torch.zeros(0, VOCAB), rows_of(), none)
    assert sampled.to_host() == SampledTokens((), ())
    assert sampled.num_accepted is not None
    assert sampled.num_accepted.shape == (0,)
    item = request(1, SamplingParams(presence_penalty=1.0))
    one = logits_of(0), rows_of((1, 0))
    with_none, without = sample(sampler_of(item), *one, none), sample(sampler_of(item), *one)
    assert with_none.to_host() == without.to_host()
    assert without.num_accepted is None


def test_outputs_with_penalties_go_on_after_what_was_accepted() -> None:
    sampler = sampler_of(request(1, SamplingParams(presence_penalty=1.0, temperature=0)))
    drafts = Verification(torch.zeros((1, 2), dtype=torch.int64))
    for index in (0, 2, 5):  # 2 and 3 more became outputs
        sample(sampler, logits_of(0, rows=3), rows_of(*rows_from([(1, index)], 2)), drafts)
    for index in (5, 9):
        with pytest.raises(AssertionError, match=rf"6..8 outputs, .* samples output {index}"):
            sample(sampler, logits_of(0), rows_of((1, index)))
    sample(sampler, logits_of(0), rows_of((1, 8)))


@pytest.mark.parametrize("first", [0, 60])
def test_bad_words_may_begin_among_the_drafts(first: int) -> None:
    """A row reads the drafts before it; `first` rows of others come before those of its chain."""
    words, best = [(9, 7, 3), (7, 3, 4, 5), (7, 1, 2)], [7, 3, 4, 5, 9]
    params = SamplingParams(temperature=0)
    items = [request(0, params, bad_words=words), *(request(i, params) for i in range(1, 61))]
    sampler = sampler_of()
    for item in items:
        sampler.add(item.request_id, item, [9] if item.request_id == 0 else [])
    logits = torch.zeros(first + 5, VOCAB)
    logits[range(first, first + 5), best] = 2.0  # and each row's second best is token 1
    logits[first:, 1] = 1.0
    drafts = torch.tensor([[0] * 4] * (first // 5) + [[7, 3, 4, 5]])
    firsts = [(i, 0) for i in range(1, 1 + first // 5)] + [(0, 1)]
    rows = rows_of(*rows_from(firsts, 4))
    with patch.object(logprobs, "ROWS_AT_ONCE", 3):
        host = sample(sampler, logits, rows, Verification(drafts)).to_host()
    assert host.token_ids[first:] == (7, 1, 4, 1, 9)
    assert host.num_accepted[-1] == 1
    after = torch.zeros(1, VOCAB)  # 7 and 1 became outputs
    after[0, 2], after[0, 3] = 2.0, 1.0
    assert sample(sampler, after, rows_of((0, 3))).to_host().token_ids == (3,)


@pytest.mark.parametrize("mean", [1, 1.0, 2.5, 3.3, 4])
def test_forced_means_are_reached(mean: float) -> None:
    seeds, indices = torch.arange(400).repeat(250), torch.arange(250).repeat_interleave(400)
    forced = ForcedAcceptance(mean)
    accepted = forced.accepted(seeds, indices, 3)
    assert accepted.unique().tolist() == sorted({int(mean) - 1, -int(-mean // 1) - 1})
    assert float(accepted.double().mean()) + 1 == pytest.approx(mean, rel=0.01)
    assert torch.equal(accepted.flip(0), forced.accepted(seeds.flip(0), indices.flip(0), 3))
    assert forced.accepted(seeds, indices, 1).max() <= 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forced_acceptance_in_a_batch(temperature: float) -> None:
    items = [request(i, SamplingParams(temperature=temperature, seed=9 - i)) for i in range(9)]
    drafts = torch.zeros((8, 3), dtype=torch.int64)
    rows = rows_of(*rows_from([(i, 5 * i) for i in range(8)], 3), (8, 0))
    logits = logits_of(1, rows=33)
    sampled = sample(sampler_of(*items), logits, rows, Verification(drafts, ForcedAcceptance(2.5)))
    expected = ForcedAcceptance(2.5).accepted(9 - torch.arange(8), 5 * torch.arange(8), 3).tolist()
    assert sampled.to_host().num_accepted == tuple(expected)
    assert set(expected) == {1, 2}


@pytest.mark.parametrize("mean", [0.5, float("nan"), float("inf"), "2"])
def test_forced_means_are_checked(mean: Any) -> None:
    with pytest.raises(ValueError, match="mean_tokens"):
        ForcedAcceptance(mean)


CHAIN, NUM_TOKENS, DRAWS = 3, 6, 50_000


class Markov:
    """Logits over a few tokens that follow from the two tokens before."""

    def __init__(self, seed: int) -> None:
        shape = NUM_TOKENS, NUM_TOKENS, NUM_TOKENS
        self.logits = logits_of(seed, rows=NUM_TOKENS**2, vocab=NUM_TOKENS, scale=1.2).view(shape)

    def probabilities(self, params: SamplingParams) -> np.ndarray:
        """[before, last, next], written plainly."""
        exact = np.zeros(self.logits.shape)
        for context in np.ndindex(NUM_TOKENS, NUM_TOKENS):
            weights = np.exp(self.logits[context].double().numpy() / params.temperature)
            order = np.argsort(-weights)
            keep = order[: params.top_k or NUM_TOKENS]
            sums = weights[keep].cumsum() / weights[keep].sum()
            keep = keep[: 1 + int((sums < params.top_p).sum())]
            keep = keep[weights[keep] >= params.min_p * weights.max()]
            exact[context][keep] = weights[keep] / weights[keep].sum()
        return exact


# how likely the draft is: its place among the target's tokens
DRAFTERS = {"good": 0, "bad": 2, "useless": NUM_TOKENS - 1}


def emitted(
    target: Markov,
    drafter: str,
    params: SamplingParams,
    num_outputs: int,
    forced: ForcedAcceptance | None,
) -> tuple[np.ndarray, float]:
    """The first outputs [DRAWS, num_outputs] after tokens 0, 1; and drafts accepted on average."""
    batch, rounds = 10_000, DRAWS // 10_000
    sampler = sampler_of(
        *(RankRequest(i, (0, 1), params, i, frozenset()) for i in range(batch)), vocab=NUM_TOKENS
    )
    found, num_accepted, num_verified = [], 0, 0
    for first in range(0, 100 * rounds, 100):
        tokens = torch.zeros((batch, 2 + num_outputs + CHAIN), dtype=torch.int64)
        tokens[:, 1] = 1
        lengths = torch.full((batch,), 2)
        while len(ids := (lengths < 2 + num_outputs).nonzero().squeeze(1)):
            at = lengths[ids, None]
            inputs = tokens[ids[:, None], at + torch.tensor([-2, -1])]
            for _ in range(CHAIN):
                order = target.logits[inputs[:, -2], inputs[:, -1]].argsort(descending=True)
                drafts = order[:, DRAFTERS[drafter]]
                inputs = torch.cat([inputs, drafts[:, None]], 1)
            logits = target.logits[inputs[:, :-1], inputs[:, 1:]].flatten(0, 1)
            places = torch.arange(CHAIN + 1)
            indices = (first + at - 2 + places).flatten().numpy()
            rows = SamplePositions(ids.repeat_interleave(CHAIN + 1).numpy(), indices)
            sampled = sample(sampler, logits, rows, Verification(inputs[:, 2:], forced))
            assert sampled.num_accepted is not None
            # rows behind the accepted ones leave tokens that the next verification overwrites
            tokens[ids[:, None], at + places] = sampled.token_ids.view(-1, CHAIN + 1)
            lengths[ids] += sampled.num_accepted + 1
            num_accepted += int(sampled.num_accepted.sum())
            num_verified += len(ids)
        found.append(tokens[:, 2 : 2 + num_outputs])
    return torch.cat(found).numpy(), num_accepted / num_verified


def chi_square(counts: np.ndarray, exact: np.ndarray) -> float:
    """The chance of counts as far from the exact probabilities, or farther."""
    counts, expected = counts.ravel(), exact.ravel() * counts.sum()
    assert not counts[expected == 0].any(), "a token of probability 0 was drawn"
    kept = expected > 0
    rare = expected < 5  # lumped together
    counts = np.append(counts[kept & ~rare], counts[rare].sum())
    expected = np.append(expected[kept & ~rare], expected[rare].sum())
    statistic = ((counts - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    degrees = torch.tensor((len(expected) - 1 - (expected[-1] == 0)) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, torch.tensor(statistic / 2)))


def chances(tokens: np.ndarray, exact: np.ndarray) -> list[float]:
    """Of the first two outputs together, and of the first, second and third alone."""
    one = exact[0, 1]
    two = one[:, None] * exact[1]
    three = np.einsum("ab,abc->abc", two, exact)
    pairs = np.bincount(tokens[:, 0] * NUM_TOKENS + tokens[:, 1], minlength=NUM_TOKENS**2)
    singles = (np.bincount(column, minlength=NUM_TOKENS) for column in tokens.T)
    marginals = one, two.sum(0), three.sum((0, 1))
    return [chi_square(pairs, two), *map(chi_square, singles, marginals)]


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.5, "top_p": 0.9}, {"temperature": 1.6, "min_p": 0.2, "top_k": 4}],
    ids=str,
)
@pytest.mark.parametrize(("drafter", "min_accepted", "max_accepted"), [
    ("good", 0.5, 2.5), ("bad", 0.05, 0.5), ("useless", 0.0, 0.2),
])  # fmt: skip
def test_verified_tokens_have_the_targets_distribution(
    drafter: str, min_accepted: float, max_accepted: float, params: dict[str, Any]
) -> None:
    target, sampling = Markov(3), SamplingParams(**params)
    with patch.object(logprobs, "ROWS_AT_ONCE", 10**9):
        tokens, accepted = emitted(target, drafter, sampling, 3, None)
    assert len(tokens) == DRAWS
    assert min_accepted <= accepted < max_accepted
    assert min(chances(tokens, target.probabilities(sampling))) > 1e-3


def test_the_chi_square_rejects_wrong_acceptance() -> None:
    """Taking every draft for accepted leaves the first output right, and nothing else."""
    target, sampling = Markov(3), SamplingParams()
    with patch.object(logprobs, "ROWS_AT_ONCE", 10**9):
        tokens, _ = emitted(target, "good", sampling, 3, ForcedAcceptance(CHAIN + 1.0))
    both, first, second, third = chances(tokens, target.probabilities(sampling))
    assert first > 1e-3
    assert max(both, second, third) < 1e-6


def test_what_verifications_need_is_predicted() -> None:
    vocab, num, num_drafts = 5_000, 40, 3
    params = SamplingParams(
        temperature=0.8, top_k=50, top_p=0.95, min_p=0.01, presence_penalty=0.1, logprobs=1,
        repetition_penalty=1.1, logit_bias={0: 1.0}, min_tokens=2,
        allowed_token_ids=range(0, vocab, 2),
    )  # fmt: skip
    words = [(2,), *((0, 4 * word, 2) for word in range(20))]
    items = [request(i, params, stop_ids=(3,), bad_words=words) for i in range(num)]
    sampler = sampler_of(*items, vocab=vocab)
    rows = rows_from([(i, 0) for i in range(num)], num_drafts)
    drafts = torch.arange(num * num_drafts).view(num, num_drafts)
    logits = logits_of(2, rows=len(rows), vocab=vocab)
    with LiveBytes() as live:
        sample(sampler, logits, rows_of(*rows), Verification(drafts)).to_host()
    predicted = sampling_bytes(len(rows), vocab)
    print(f"predicted {predicted / 2**20:.1f} MiB, live {live.peak / 2**20:.1f} MiB")
    assert 0.7 * predicted < live.peak <= predicted


def test_the_last_accepted_rows_are_those_of_the_picture() -> None:
    """The step that batch_builder draws: two verifications of 2 drafts, and a chunk of 3 tokens."""
    sampled = torch.arange(100, 107)
    last = LastAccepted.after_verification(
        first_rows=torch.tensor([0, 3, 8, 11]), first_samples=torch.tensor([0, 3, 6, -1]),
        known_tokens=torch.tensor([0, 0, 0, 55]), max_accepted=torch.tensor([2, 2, 0, 0]),
        sampled_tokens=sampled, num_accepted=torch.tensor([1, 2]),
    )  # fmt: skip
    assert last.rows.tolist() == [1, 5, 8, 11]
    assert last.token_ids.tolist() == [101, 105, 106, 55]
    assert last.num_rejected.tolist() == [1, 0, 0, 0]


def test_chunks_alone_accept_nothing() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    last = LastAccepted.after_verification(
        first_rows=torch.tensor([4]), first_samples=torch.tensor([-1]),
        known_tokens=torch.tensor([7]), max_accepted=torch.tensor([0]),
        sampled_tokens=none, num_accepted=none,
    )  # fmt: skip
    assert (last.rows.tolist(), last.token_ids.tolist(), last.num_rejected.tolist()) == (
        [4], [7], [0],
    )  # fmt: skip

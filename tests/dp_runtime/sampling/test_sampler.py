from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dp_runtime.core.request import RankRequest, TokenLogprob
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.sampling.filters import keep_logits, penalise
from dp_runtime.sampling.sampler import SampledTokens
from tests.dp_runtime.samplers import rows_of, sample, sampler_of

VOCAB = 50
CPU = torch.device("cpu")
INF = float("inf")


def logits_of(seed: int, rows: int = 1, vocab: int = VOCAB, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def request(
    request_id: int,
    params: SamplingParams,
    prompt: Sequence[int] = (1, 2, 3),
    stop_ids: Sequence[int] = (),
    bad_words: Sequence[tuple[int, ...]] = (),
) -> RankRequest:
    return RankRequest(
        request_id, tuple(prompt), params, params.seed or 0, frozenset(stop_ids),
        bad_words=tuple(bad_words),
    )  # fmt: skip


def tokens_of(logits: Tensor, *requests: RankRequest, index: int = 0) -> list[int]:
    rows = rows_of(*((item.request_id, index) for item in requests))
    sampler = sampler_of(*requests, vocab=logits.shape[1])
    return list(sample(sampler, logits, rows).to_host().token_ids)


def weights_of(logits: Tensor, params: SamplingParams) -> Tensor:
    """Normalised float64 weights of one row each, as the sampler sees its own parameters."""
    vocab = logits.shape[1]
    top_k = min(params.top_k, vocab) if params.top_k > 0 else vocab
    draw = [float(params.temperature), top_k, params.top_p, params.min_p]
    return keep_logits(logits, logits.amax(-1), np.array([draw] * len(logits))).double().softmax(-1)


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        ({"temperature": 0.3}, [TemperatureLogitsWarper(0.3)]),
        ({"temperature": 1.7}, [TemperatureLogitsWarper(1.7)]),
        ({"top_k": 1}, [TopKLogitsWarper(1)]),
        ({"top_k": 7}, [TopKLogitsWarper(7)]),
        ({"top_k": VOCAB}, []),
        ({"top_k": 10**6}, []),
        ({"top_p": 0.01}, [TopPLogitsWarper(0.01)]),
        ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"top_p": 0.999}, [TopPLogitsWarper(0.999)]),
        ({"min_p": 0.05}, [MinPLogitsWarper(0.05)]),
        ({"min_p": 1.0}, [MinPLogitsWarper(1.0)]),
        (
            {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.03},
            [
                TemperatureLogitsWarper(0.8),
                TopKLogitsWarper(12),
                TopPLogitsWarper(0.9),
                MinPLogitsWarper(0.03),
            ],
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",  # objects have addresses
)
def test_filters_agree_with_transformers(
    params: dict[str, Any], warpers: list[LogitsProcessor]
) -> None:
    logits = logits_of(0, rows=64)
    expected = logits
    for warper in warpers:
        expected = warper(None, expected)
    weights = weights_of(logits, SamplingParams(**params))
    assert torch.equal(weights > 0, expected > -INF)
    torch.testing.assert_close(weights, expected.double().softmax(-1), rtol=1e-5, atol=1e-8)


def test_filters_of_rows_are_their_own() -> None:
    logits = logits_of(1, rows=6)
    draws = np.array(
        [(1, 50, 1, 0), (0.5, 3, 1, 0), (1, 50, 0.5, 0), (2, 9, 0.7, 0), (1, 50, 1, 0.2),
         (3, 2, 1, 1)]
    )  # fmt: skip
    together = keep_logits(logits, logits.amax(-1), draws)
    for row in range(6):
        one = logits[row : row + 1]
        alone = keep_logits(one, one.amax(-1), draws[row : row + 1])
        assert torch.equal(together[row : row + 1], alone)


def test_ties_in_filters() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    assert weights_of(logits, SamplingParams(top_k=2)).nonzero()[:, 1].tolist() == [1, 2, 3]
    assert weights_of(logits, SamplingParams(top_p=0.3)).nonzero()[:, 1].tolist() == [1, 2]
    equal = torch.zeros(1, 8)
    # Half of the probability is reached by exactly four of eight equal tokens.
    assert weights_of(equal, SamplingParams(top_p=0.5)).nonzero()[:, 1].tolist() == [0, 1, 2, 3]


def test_extreme_temperatures() -> None:
    logits = torch.tensor([[-1e30, 3.0, 2.9, -INF]])
    assert weights_of(logits, SamplingParams(temperature=1e-30)).tolist() == [[0, 1, 0, 0]]
    cold = SamplingParams(temperature=5e-324, seed=1)
    assert tokens_of(logits, request(1, cold)) == [1]
    hot = [request(i, SamplingParams(temperature=1e300, seed=i)) for i in range(200)]
    drawn = tokens_of(torch.tensor([[5.0, 3.0, 2.9, -INF]]).repeat(200, 1), *hot)
    assert set(drawn) == {0, 1, 2}


def test_greedy_takes_the_first_maximum() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [7.0, 7.0, 7.0, 7.0]])
    params = SamplingParams(temperature=0)
    assert tokens_of(logits, request(1, params), request(2, params)) == [1, 0]


def test_repetition_penalty_agrees_with_transformers() -> None:
    logits, prompt = logits_of(2, rows=20), (4, 4, 9, 30)
    outputs: list[int] = []
    sampler = sampler_of(request(1, SamplingParams(repetition_penalty=1.8, temperature=0), prompt))
    oracle = RepetitionPenaltyLogitsProcessor(1.8)
    for index, row in enumerate(logits.split(1)):
        expected = int(oracle(torch.tensor([[*prompt, *outputs]]), row.clone()).argmax())
        sampled = sample(sampler, row, rows_of((1, index)))
        outputs.append(sampled.to_host().token_ids[0])
        assert outputs[-1] == expected
    assert outputs != logits.argmax(-1).tolist(), "the penalty changed nothing"


def test_penalties_by_their_formulas() -> None:
    row = logits_of(3)[0]
    in_prompt = torch.zeros(VOCAB, dtype=torch.bool)
    in_prompt[[1, 2, 3]] = True
    counts = torch.zeros(VOCAB)
    counts[3], counts[7] = 1, 4
    changed = penalise(row[None], in_prompt[None], counts[None], torch.tensor([[1.5, 0.25, 0.75]]))[
        0
    ].tolist()
    for token in range(VOCAB):
        value = float(row[token])
        if token in {1, 2, 3, 7}:
            value = value / 1.5 if value > 0 else value * 1.5
        count = {3: 1, 7: 4}.get(token, 0)
        value -= 0.25 * count + (0.75 if count else 0)
        assert changed[token] == pytest.approx(value, abs=1e-5)


def test_presence_and_frequency_penalties_count_outputs_only() -> None:
    logits = torch.tensor([[3.0, 2.5, 0.0]])
    presence = request(1, SamplingParams(presence_penalty=1.0, temperature=0), prompt=(0, 0))
    frequency = request(2, SamplingParams(frequency_penalty=0.3, temperature=0), prompt=(0, 0))
    sampler = sampler_of(presence, frequency, vocab=3)
    drawn = [
        sample(sampler, logits.repeat(2, 1), rows_of((1, i), (2, i))).to_host().token_ids
        for i in range(5)
    ]
    # presence: 3, 2.5 -> 2, 2.5 -> 2, 1.5, and no further; frequency alternates from the second on
    assert [first for first, _ in drawn] == [0, 1, 0, 0, 0]
    assert [second for _, second in drawn] == [0, 0, 1, 0, 1]


def test_penalty_state_needs_no_look_at_the_host() -> None:
    """Two steps in flight: the second is sampled before anyone looks at the first."""
    sampler = sampler_of(request(1, SamplingParams(presence_penalty=2.0, temperature=0)))
    logits = torch.tensor([[0.0] * (VOCAB - 2) + [1.0, 1.5]])
    steps = [sample(sampler, logits, rows_of((1, i))) for i in range(2)]
    assert [step.to_host().token_ids for step in steps] == [(VOCAB - 1,), (VOCAB - 2,)]


def test_an_output_is_sampled_once_with_penalties() -> None:
    sampler = sampler_of(request(1, SamplingParams(presence_penalty=1.0)))
    sample(sampler, logits_of(0), rows_of((1, 0)))
    with pytest.raises(AssertionError, match=r"request 1 has 1 outputs, .* samples output 0"):
        sample(sampler, logits_of(0), rows_of((1, 0)))


def test_logit_bias_forces_and_bans() -> None:
    logits = logits_of(4, rows=3)
    best = int(logits[1].argmax())
    forced = request(1, SamplingParams(logit_bias={17: 1000.0}, seed=3))
    banned = request(2, SamplingParams(logit_bias={best: -1000.0}, temperature=0))
    plain = request(3, SamplingParams(temperature=0))
    drawn = tokens_of(logits, forced, banned, plain)
    assert drawn == [17, int(logits[1].topk(2).indices[1]), int(logits[2].argmax())]


def test_min_tokens_masks_the_stop_ids() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 5], logits[:, 6], logits[:, 7] = 9, 8, 7
    params = SamplingParams(min_tokens=2, temperature=0)
    held, free = request(1, params, stop_ids=(5, 6, VOCAB + 3)), request(2, params)
    assert tokens_of(logits, held, free, index=0) == [7, 5]
    assert tokens_of(logits, held, free, index=1) == [7, 5]
    assert tokens_of(logits, held, free, index=2) == [5, 5]


def test_only_allowed_tokens_are_sampled() -> None:
    logits = logits_of(5, rows=3)
    allowed = tuple(int(token) for token in logits[0].topk(12).indices[4:])
    few = request(1, SamplingParams(allowed_token_ids=allowed, temperature=0))
    drawing = request(2, SamplingParams(allowed_token_ids=allowed, temperature=5.0, logprobs=1))
    plain = request(3, SamplingParams(temperature=0))
    sampler, rows = sampler_of(few, drawing, plain), [(number, 0) for number in (1, 2, 3)]
    found = sample(sampler, logits, rows_of(*rows)).to_host()
    assert found.token_ids[0] == int(logits[0].topk(5).indices[4])
    assert found.token_ids[2] == int(logits[2].argmax())
    entry = found.logprobs[1]
    assert entry is not None
    assert entry.token_id == found.token_ids[1]
    assert entry.logprob == pytest.approx(float(logits[1].log_softmax(-1)[entry.token_id]))
    drawn = {
        sample(sampler, logits[1:2], rows_of((2, index))).to_host().token_ids[0]
        for index in range(200)
    }
    assert drawn == set(allowed)


WORDS = [(2,), (1, 1), (0, 3), (3, 0, 1), (4, 0, 3, 1), (0, 0, 0, 0, 4)]


def test_bad_words_agree_with_transformers() -> None:
    """The oracle sees outputs alone: a prompt that ends with a word's beginning masks nothing."""
    logits = logits_of(6, rows=300, vocab=5)
    item = request(1, SamplingParams(temperature=0), prompt=(0, 0, 0, 0, 3, 0), bad_words=WORDS)
    sampler, outputs = sampler_of(item, vocab=5), list[int]()
    oracle = NoBadWordsLogitsProcessor([list(word) for word in WORDS])
    for index, row in enumerate(logits.split(1)):
        seen = torch.tensor([outputs], dtype=torch.int64)
        expected = int(oracle(seen, row.clone()).argmax())
        outputs += sample(sampler, row, rows_of((1, index))).to_host().token_ids
        assert outputs[-1] == expected
    text, best = "".join(map(str, outputs)), logits.argmax(-1).tolist()
    assert not any("".join(map(str, word)) in text for word in WORDS)
    masked = {row for row, token in enumerate(best) if token not in (2, outputs[row])}
    assert len(masked) > 10, "words of several tokens mask a few rows of these logits"


def test_bad_words_in_another_row_go_on_after_the_outputs() -> None:
    params, words = SamplingParams(temperature=0), [(5, 6, 7), (6, 8)]
    item = request(1, params, bad_words=words)
    logits = torch.zeros(1, VOCAB)
    logits[0, 7:10] = torch.tensor([3.0, 2.0, 1.0])
    for outputs, token in (([], 7), ([5], 7), ([6], 7), ([5, 6], 9), ([9, 6], 7), ([1, 5, 6], 9)):
        sampler = sampler_of()
        sampler.add(7, item, outputs)
        assert sample(sampler, logits, rows_of((7, len(outputs)))).to_host().token_ids == (token,)


def test_bad_words_of_one_token_follow_no_outputs() -> None:
    item = request(1, SamplingParams(temperature=0), bad_words=[(3,), (4,)])
    sampler, logits = sampler_of(item), torch.zeros(1, VOCAB)
    logits[0, 3:6] = torch.tensor([9.0, 8.0, 7.0])
    for index in (5, 5, 2):
        assert sample(sampler, logits, rows_of((1, index))).to_host().token_ids == (5,)
    assert not sampler.all_plain


def test_a_row_that_masks_leave_no_token_is_named_at_commit() -> None:
    params = SamplingParams(temperature=0, allowed_token_ids=[5])
    item, other = request(1, params, bad_words=[(5, 5)]), request(2, SamplingParams(temperature=0))
    sampler, logits = sampler_of(item, other), logits_of(8, rows=2)
    first = sample(sampler, logits, rows_of((1, 0), (2, 0))).to_host()
    assert (first.token_ids[0], first.invalid) == (5, {})
    assert sample(sampler, logits, rows_of((1, 1), (2, 1))).to_host().invalid == {0: ""}


def test_order_of_the_steps() -> None:
    """Bias before min_tokens before penalties before temperature; log probabilities of neither."""
    logits = torch.tensor([[1.0, 0.0, -1.0, 0.5]])
    params = SamplingParams(
        logit_bias={1: 50.0, 2: 3.0}, min_tokens=1, repetition_penalty=10.0, temperature=0,
        logprobs=1,
    )  # fmt: skip
    # Token 1 is biased but a stop id; token 2 has 2 after the bias, and 0.2 as it is in the prompt;
    # penalised before the bias it had -10 + 3. Token 0 is in the prompt too: 0.1.
    sampler = sampler_of(request(1, params, prompt=(0, 2), stop_ids=(1,)), vocab=4)
    host = sample(sampler, logits, rows_of((1, 0))).to_host()
    assert host.token_ids == (3,)
    expected = logits.log_softmax(-1)[0]
    entry = host.logprobs[0]
    assert entry is not None
    assert entry.logprob == pytest.approx(float(expected[3]))
    ((token_id, logprob),) = entry.top
    assert token_id == 0
    assert logprob == pytest.approx(float(expected[0]))


def test_logits_are_left_as_they_are() -> None:
    params = SamplingParams(
        logit_bias={1: 5.0}, min_tokens=1, presence_penalty=1.0, top_k=3, top_p=0.5, logprobs=2
    )
    logits = logits_of(5)
    before = logits.clone()
    tokens_of(logits, request(1, params, stop_ids=(2,)))
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.7, "top_k": 9},
        {"temperature": 1.5, "top_p": 0.8},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_draws_have_the_exact_distribution(params: dict[str, Any]) -> None:
    draws, batch = 50_000, 10_000
    logits = logits_of(6, vocab=40, scale=1.5)
    exact = weights_of(logits, SamplingParams(**params))[0].numpy()
    items = [request(i, SamplingParams(**params, seed=i)) for i in range(batch)]
    sampler, counts = sampler_of(*items, vocab=40), np.zeros(40)
    many = logits.expand(batch, 40).contiguous()
    for index in range(draws // batch):
        sampled = sample(sampler, many, rows_of(*((i, index) for i in range(batch))))
        counts += np.bincount(sampled.to_host().token_ids, minlength=40)
    assert counts[exact == 0].sum() == 0
    expected = exact[exact > 0] * draws
    assert (expected > 5).all(), "too rare for a chi-square"
    statistic = ((counts[exact > 0] - expected) ** 2 / expected).sum()
    degrees = len(expected) - 1
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 20]),
    top_p=st.sampled_from([1.0, 1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-9, 9), max_size=3),
    min_tokens=st.integers(0, 4),
    seed=st.integers(0, 2**63 - 1),
    logprobs=st.sampled_from([None, 0, 1, 5]),
    allowed_token_ids=st.sampled_from([None, None, range(7)]),
)
# Of range(7), tokens 5 and 6 remain when words, and 3 and 4 as stop ids, are masked.
BAD_WORDS = st.lists(
    st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), max_size=6
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(many=st.lists(PARAMS, min_size=1, max_size=8), data=st.data())
def test_any_batch_gives_the_same(many: list[SamplingParams], data: st.DataObject) -> None:
    num_outputs = 4
    items = [
        request(i, p, (i, 2 * i, 7), stop_ids=(3, 4), bad_words=data.draw(BAD_WORDS))
        for i, p in enumerate(many)
    ]
    # Rounded logits, as of a bfloat16 model, tie often.
    logits = logits_of(len(many), rows=len(many) * num_outputs).bfloat16().float()
    logits = logits.view(len(many), num_outputs, VOCAB)

    def alone(item: RankRequest) -> list[tuple[int, TokenLogprob | None]]:
        sampler, found = sampler_of(item), []
        for index in range(num_outputs):
            row = logits[item.request_id, index : index + 1]
            host = sample(sampler, row, rows_of((item.request_id, index))).to_host()
            found.append((host.token_ids[0], host.logprobs[0]))
        return found

    mixed: dict[int, list[tuple[int, TokenLogprob | None]]] = {i: [] for i in range(len(many))}
    sampler = sampler_of(*items)
    while waiting := [i for i, found in mixed.items() if len(found) < num_outputs]:
        ids = data.draw(st.lists(st.sampled_from(waiting), unique=True, min_size=1))
        rows = rows_of(*((i, len(mixed[i])) for i in ids))
        batch = logits[rows.req_indices, rows.output_indices]
        host = sample(sampler, batch, rows).to_host()
        for i, token, entry in zip(ids, host.token_ids, host.logprobs):
            mixed[i].append((token, entry))
    for item in items:
        assert mixed[item.request_id] == alone(item)


def test_seed_and_index_decide() -> None:
    logits = logits_of(7).repeat(3, 1)
    items = [request(i, SamplingParams(seed=seed)) for i, seed in enumerate((5, 5, 6))]
    sampler = sampler_of(*items)
    drawn = np.array(
        [sample(sampler, logits, rows_of(*((i, n) for i in range(3)))).to_host().token_ids
         for n in range(40)]
    )  # fmt: skip
    assert (drawn[:, 0] == drawn[:, 1]).all()
    assert (drawn[:, 0] != drawn[:, 2]).any()
    assert len(set(drawn[:, 0])) > 3


def test_logprobs_are_those_of_the_unmodified_logits() -> None:
    logits = logits_of(8, rows=4)
    counts = (None, 0, 3, 50)
    items = [
        request(i, SamplingParams(logprobs=n, temperature=0.5, top_k=2, seed=i))
        for i, n in enumerate(counts)
    ]
    rows = rows_of(*((i, 0) for i in range(4)))
    host = sample(sampler_of(*items), logits, rows).to_host()
    exact = logits.log_softmax(-1)
    assert host.logprobs[0] is None
    for row in range(1, 4):
        entry, best = host.logprobs[row], exact[row].topk(counts[row] or 0)
        assert entry is not None
        assert entry.token_id == host.token_ids[row]
        assert entry.logprob == float(exact[row, entry.token_id])
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == best.values.tolist()


def test_prompt_logprobs() -> None:
    logits = logits_of(9, rows=300)  # more than are taken at once
    targets = torch.arange(300) % VOCAB
    entries = sampler_of().prompt_logprobs(logits.__getitem__, targets, 2).to_host()
    exact = logits.log_softmax(-1)
    best = exact.topk(2)
    assert len(entries) == 300
    for row, entry in enumerate(entries):
        assert entry.token_id == row % VOCAB
        assert entry.logprob == float(exact[row, entry.token_id])
        assert entry.top == tuple(zip(best.indices[row].tolist(), best.values[row].tolist()))
    assert sampler_of().prompt_logprobs(logits[:0].__getitem__, targets[:0], 2).to_host() == ()


def test_ties_of_logprobs_go_to_the_lowest_id() -> None:
    logits = torch.tensor([[-0.0, 1.0, 0.0, 1.0, 0.0, -INF, -2.0]])
    entry = (
        sampler_of(vocab=7).prompt_logprobs(logits.__getitem__, torch.tensor([6]), 7).to_host()[0]
    )
    assert [token for token, _ in entry.top] == [1, 3, 0, 2, 4, 6, 5]
    assert entry.top[-1][1] == -INF


def test_no_rows() -> None:
    tokens = sample(sampler_of(), torch.zeros(0, VOCAB), rows_of()).to_host()
    assert tokens == SampledTokens((), ())


@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_k": 3, "top_p": 0.5}], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), INF])
def test_broken_logits_are_named_at_commit(params: dict[str, Any], bad: float) -> None:
    logits = logits_of(10, rows=3)
    logits[1, 4] = bad
    items = [request(i, SamplingParams(**params)) for i in (11, 12, 13)]
    sampler = sampler_of(*items)
    sampled = sample(sampler, logits, rows_of(*((i, 0) for i in (11, 12, 13))))
    assert ((sampled.token_ids >= 0) & (sampled.token_ids < VOCAB)).all(), "the next step reads it"
    assert sampled.to_host().invalid == {1: ""}


def test_remove_drops_the_state() -> None:
    sampler = sampler_of(request(1, SamplingParams(presence_penalty=2.0, temperature=0)))
    logits = logits_of(11)
    first = sample(sampler, logits, rows_of((1, 0))).to_host()
    sampler.remove(1)
    assert len(sampler) == 0
    with pytest.raises(KeyError):
        sample(sampler, logits, rows_of((1, 1)))
    sampler.add(1, request(1, SamplingParams(presence_penalty=2.0, temperature=0)), ())
    assert sample(sampler, logits, rows_of((1, 0))).to_host() == first


@pytest.mark.parametrize("num_before", [0, 1, 3])
def test_state_in_another_row_goes_on_after_the_outputs(num_before: int) -> None:
    """A preempted request has another row of the table later: its tokens say all."""
    params = SamplingParams(
        presence_penalty=0.5, frequency_penalty=0.8, repetition_penalty=1.4, temperature=0
    )
    item, logits = request(1, params, prompt=(4, 9)), logits_of(12).repeat(6, 1)
    staying = sampler_of(item)
    outputs: list[int] = []
    for index, row in enumerate(logits.split(1)):
        outputs += sample(staying, row, rows_of((1, index))).to_host().token_ids
    assert outputs[0] not in outputs[3:], "the outputs before make no difference"
    moving = sampler_of(item)
    for index in range(num_before):
        sample(moving, logits[index : index + 1], rows_of((1, index)))
    moving.remove(1)
    moving.add(7, item, outputs[:3])
    moving.check([7])
    again = [
        sample(moving, logits[index : index + 1], rows_of((7, index))).to_host().token_ids[0]
        for index in range(3, 6)
    ]
    assert again == outputs[3:]


def test_add_refuses_what_the_vocabulary_lacks() -> None:
    with pytest.raises(ValueError, match="logit_bias"):
        sampler_of(request(1, SamplingParams(logit_bias={VOCAB: 1.0})))
    with pytest.raises(AssertionError, match="row 1 is taken"):
        sampler_of(request(1, SamplingParams()), request(1, SamplingParams()))

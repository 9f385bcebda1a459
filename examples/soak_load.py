"""The load of the soak: heavy-tailed lengths, uneven arrival over ranks, all from one seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dp_runtime import SamplingParams, TokensPrompt

PROMPT_SIGMA = 1.0  # of the lognormal: the mean is 1.6 times the median
OUTPUT_ALPHA = 1.2  # of the Pareto: its variance, unclipped, is infinite
EMBEDS_EVERY, EMBED_SCALE = 20, 0.02
RANDOM_SHARE = 0.5  # of the requests are sampled with a seed of their own; the others are greedy


@dataclass(frozen=True)
class LoadShape:
    """How many requests, how long they are, and which share of them is pinned to a rank.

    Prompt lengths are lognormal, output lengths Pareto, both by their medians and clipped. Of the
    pinned requests rank i gets a share that falls as 1 / (i + 1).
    """

    num_requests: int = 1730
    in_flight: int = 512
    dp_size: int = 4
    prompt_len: int = 128  # median
    max_prompt_len: int = 1024
    output_len: int = 48  # median
    max_output_len: int = 512
    pinned_share: float = 0.5
    seed: int = 20261122

    @property
    def max_model_len(self) -> int:
        return self.max_prompt_len + self.max_output_len

    @property
    def doomed(self) -> int:
        """The request that is aborted in mid-flight."""
        return self.num_requests // 2


@dataclass(frozen=True, eq=False)
class SoakRequest:
    """One request, and the number of tokens that it must get."""

    index: int
    prompt: TokensPrompt
    params: SamplingParams
    dp_rank: int | None  # None: the router chooses

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.token_ids) + self.params.known_max_tokens


def make_load(shape: LoadShape, vocab_size: int, hidden_size: int) -> tuple[SoakRequest, ...]:
    """All requests of a soak; equal arguments make an equal load."""
    return tuple(_draw(shape, vocab_size, hidden_size))


def _draw(shape: LoadShape, vocab_size: int, hidden_size: int) -> Iterator[SoakRequest]:
    rng = np.random.default_rng(shape.seed)
    count = shape.num_requests
    prompts = shape.prompt_len * rng.lognormal(0.0, PROMPT_SIGMA, count)
    prompts = prompts.round().clip(1, shape.max_prompt_len).astype(int)
    outputs = shape.output_len * (1 + rng.pareto(OUTPUT_ALPHA, count)) / 2 ** (1 / OUTPUT_ALPHA)
    outputs = outputs.round().clip(1, shape.max_output_len).astype(int)
    outputs[shape.doomed] = shape.max_output_len
    share = 1 / np.arange(1, shape.dp_size + 1)
    pinned = rng.choice(shape.dp_size, count, p=share / share.sum())
    routed = rng.random(count) >= shape.pinned_share
    sampled = rng.random(count) < RANDOM_SHARE
    for index in range(count):
        params = SamplingParams(
            max_tokens=int(outputs[index]),
            temperature=0.8 if sampled[index] else 0.0,
            top_p=0.95 if sampled[index] else 1.0,
            seed=index,
            ignore_eos=True,
        )
        prompt = _prompt(rng, int(prompts[index]), vocab_size, hidden_size, index)
        rank = None if routed[index] else int(pinned[index])
        yield SoakRequest(index, prompt, params, rank)


def _prompt(
    rng: np.random.Generator, length: int, vocab_size: int, hidden_size: int, index: int
) -> TokensPrompt:
    """Random tokens; in every twentieth prompt the first half have embeddings of their own."""
    tokens = rng.integers(0, vocab_size, length).tolist()
    if index % EMBEDS_EVERY:
        return TokensPrompt(tokens)
    count = -(-length // 2)
    values = rng.normal(0.0, EMBED_SCALE, (count, hidden_size)).astype(np.float32)
    return TokensPrompt(tokens, values, range(count))


def scarce_pages(
    requests: tuple[SoakRequest, ...], shape: LoadShape, page_size: int, plenty: float
) -> int:
    """Pages of a rank, the null page included: `plenty` of what its share of the load would fill.

    Fewer than 1 make the scheduler preempt; the longest sequence always fits.
    """
    pages = [-(-request.num_tokens // page_size) for request in requests]
    mean = sum(pages) / len(pages)
    longest = -(-shape.max_model_len // page_size)
    return 1 + max(longest, int(plenty * mean * shape.in_flight / shape.dp_size))

"""What a sampled token must be, by the oracle's logits and an implementation of its own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from dp_runtime import RequestOutput, SamplingParams
from dp_runtime.core.request import FinishReason
from dp_runtime.sampling.rng import counter_bits
from tests.reference import NearTie, Reference, Tokens

MARGIN = 1e-5
EOS = 0  # of the tiny checkpoints


def draw(
    logits: np.ndarray, prompt: Tokens, outputs: Tokens, params: SamplingParams, ends: Sequence[int]
) -> tuple[int, float]:
    """The next token, written plainly in float64, and how close any decision on the way was.

    logits [vocab]. The second number is the least distance of a compared pair: of logits for
    greedy and top_k, of shares of the distribution for top_p and min_p, of logits with noise for
    the draw itself.
    """
    x = logits.astype(np.float64)
    for token, bias in params.logit_bias.items():
        x[token] += bias
    if params.allowed_token_ids is not None:
        x[[token for token in range(len(x)) if token not in params.allowed_token_ids]] = -np.inf
    if len(outputs) < params.min_tokens:
        x[list(ends)] = -np.inf
    for token in {*prompt, *outputs}:
        x[token] *= params.repetition_penalty ** (-1 if x[token] > 0 else 1)
    for token in {*outputs}:
        x[token] -= params.frequency_penalty * outputs.count(token) + params.presence_penalty
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    if params.greedy:
        return order[0], float(x[order[0]] - x[order[1]])
    margins = []
    keep = order[: params.top_k] if params.top_k > 0 else order
    if len(keep) < len(x):
        margins.append(x[keep[-1]] - x[order[len(keep)]])
    weights = np.zeros_like(x)
    weights[keep] = np.exp((x[keep] - x[keep[0]]) / params.temperature)
    weights /= weights.sum()
    if params.top_p < 1:
        sums = list(accumulate(weights[keep]))
        margins.append(min(abs(total - params.top_p) for total in sums))
        weights[keep[1 + sum(total < params.top_p for total in sums) :]] = 0
    min_weight = params.min_p * weights.max()
    margins.append(np.abs(weights[weights > 0] - min_weight).min() if params.min_p else 1.0)
    weights[weights < min_weight] = 0
    key = int(counter_bits(torch.tensor([params.seed]), torch.tensor([len(outputs)])))
    with np.errstate(divide="ignore"):
        scores = np.log(weights) - np.log(exponentials(key, len(x)))
    second, first = np.argsort(scores)[-2:]
    margins.append(scores[first] - scores[second])
    return int(first), float(min(margins))


def exponentials(key: int, vocab: int) -> np.ndarray:
    """The time at which each token comes if all are equally likely: [vocab] float64."""
    u = token_bits(key, vocab).astype(np.float32) + np.float32(0.5)
    u *= np.float32((1 - 2.0**-24) / 2**31)  # below 1
    return -np.log1p(-u.astype(np.float64))


def token_bits(key: int, vocab: int) -> np.ndarray:
    """Random integers [vocab] below 2**31, by Python's own."""
    low, high = key % 2**32, key // 2**32 % 2**32
    found = []
    for token in range(vocab):
        x = (token * 0x9E3779B9 + low) % 2**32
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32 ^ high
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        found.append((x ^ x >> 16) % 2**31)
    return np.array(found)


def check_drawn(
    reference: Reference, outputs: Sequence[RequestOutput], params: Sequence[SamplingParams]
) -> None:
    """Assert that every token is the one drawn from the oracle's logits, or level with it."""
    sequences = [(*output.prompt_token_ids, *output.token_ids) for output in outputs]
    for output, one, logits in zip(outputs, params, reference.logits(sequences), strict=True):
        prompt, tokens = output.prompt_token_ids, output.token_ids
        ends = [*one.stop_token_ids, *([] if one.ignore_eos else [EOS])]
        for index, token in enumerate(tokens):
            row = logits[len(prompt) - 1 + index].numpy()
            expected, margin = draw(row, prompt, tokens[:index], one, ends)
            if token != expected:
                where = f"request {output.request_id}, output {index}: {token}, not {expected}"
                assert margin < MARGIN, f"{where}, and nothing is closer than {margin}"
                warnings.warn(f"{where}: margin {margin:.1e}", NearTie, stacklevel=2)
        ended = bool(tokens) and tokens[-1] in ends
        assert not set(tokens[:-1]).intersection(ends)
        assert output.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
        assert ended or len(tokens) == one.max_tokens

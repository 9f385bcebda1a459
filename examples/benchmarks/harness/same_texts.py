"""Where greedy texts of two runs part, and how near to a tie the tokens were there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dp_runtime import Engine, RequestOutput, SamplingParams

NUM_BEST = 5  # tokens that are scored at each place


@dataclass(frozen=True)
class Difference:
    request: int  # its place among the requests
    token: int  # the first that is not the same
    gap: float  # in log probability, from the best token there to the other one; inf: it is low


def scored(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> list[RequestOutput]:
    """Serve requests, request n on rank n mod dp_size, with the best tokens at each place."""
    ranks = [n % engine.config.dp_size for n in range(len(prompts))]
    return engine.generate(prompts, replace(params, logprobs=NUM_BEST), ranks)


def differences(
    reference: Sequence[RequestOutput], others: Sequence[RequestOutput]
) -> list[Difference]:
    """Compare outputs with those of `scored`; from the first difference on texts are others."""
    found = []
    for number, (one, other) in enumerate(zip(reference, others, strict=True)):
        pairs = enumerate(zip(one.token_ids, other.token_ids, strict=True))
        token = next((at for at, (due, got) in pairs if due != got), None)
        if token is not None:
            found.append(Difference(number, token, _gap(one, token, other.token_ids[token])))
    return found


def _gap(reference: RequestOutput, token: int, other: int) -> float:
    assert reference.logprobs is not None, "the reference has log probabilities"
    top = dict(reference.logprobs[token].top)
    return max(top.values()) - top[other] if other in top else float("inf")

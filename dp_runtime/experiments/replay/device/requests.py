"""Requests of a recording, as ranks get them again: with their tokens, or with stand-ins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dp_runtime.core.request import RankRequest
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.experiments.replay.recorded_requests import RecordedRequest
from dp_runtime.metrics.recording import Recording

WARM_UP_REQUESTS, WARM_UP_TOKENS, WARM_UP_OUTPUTS = 2, 16, 4  # of each rank
LEAD = 8  # steps before the first recorded one, in which ranks that were started come together


class Requests:
    """Each asks for as many tokens as it got, whatever would have ended it there."""

    def __init__(self, recording: Recording, depth: int) -> None:
        """depth: 1 if the recorded ranks launched steps before the ones before were committed."""
        self._tokens = {each.request_id: each for each in recording.tokens}
        self._vocab_size, self._depth = recording.model.vocab_size, depth

    def has_tokens(self, request: RecordedRequest) -> bool:
        return request.request_id in self._tokens

    def again(self, request: RecordedRequest) -> RankRequest:
        """Return what its rank gets in its step.

        NOTE: with steps in flight a request that ends by a token has one more row than tokens.
        """
        surprises = request.output_tokens < request.max_tokens
        max_tokens = request.output_tokens + (self._depth if surprises else 0)
        kept = self._tokens.get(request.request_id)
        if kept is None:
            computed = request.prompt_tokens - request.cached_tokens
            made = self._drawn(request.request_id, computed, max_tokens)
        else:
            usual = kept.sampling
            least = min(usual.min_tokens, max_tokens)
            params = replace(usual, max_tokens=max_tokens, min_tokens=least, seed=kept.seed)
            stops = frozenset(kept.stop_token_ids)
            own = request.request_id, kept.prompt, params, kept.seed, stops
            made = RankRequest(*own, bad_words=kept.bad_words)
        return replace(made, at_step=LEAD + request.step)

    def warm_up(self, dp_size: int) -> list[list[RankRequest]]:
        """Return a few for each rank, so that what is done once only is done."""
        ids = np.arange(dp_size * WARM_UP_REQUESTS).reshape(dp_size, -1)
        return [
            [self._drawn(each, WARM_UP_TOKENS, WARM_UP_OUTPUTS) for each in of_rank]
            for of_rank in ids.tolist()
        ]

    def by_rank(
        self, requests: Sequence[RecordedRequest], dp_size: int
    ) -> dict[int, list[RankRequest]]:
        """Return what each rank gets, in the order of steps."""
        found: dict[int, list[RankRequest]] = {rank: [] for rank in range(dp_size)}
        for request in sorted(requests, key=lambda each: each.step):
            found[request.dp_rank].append(self.again(request))
        return found

    def _drawn(self, request_id: int, num_tokens: int, max_tokens: int) -> RankRequest:
        rng = np.random.default_rng(request_id)
        prompt = tuple(rng.integers(0, self._vocab_size, num_tokens).tolist())
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        return RankRequest(request_id, prompt, params, 0, frozenset())

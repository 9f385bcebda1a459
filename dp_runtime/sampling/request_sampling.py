"""RequestSampling: what the sampler keeps of one request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dp_runtime.core.request import RankRequest
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.sampling.filters import Array
from dp_runtime.sampling.penalties import Penalties

_FLOAT32 = np.finfo(np.float32)


@dataclass(frozen=True, eq=False, kw_only=True)
class RequestSampling:
    """A request's parameters in the form that a batch of them needs."""

    params: SamplingParams
    draw: tuple[float, int, float, float]  # temperature, top_k, top_p, min_p
    stop_ids: Array  # [stops] int64
    bias_ids: Array  # [biases] int64
    biases: Array  # [biases] float32
    penalties: Penalties | None
    plain: bool  # nothing but the argmax is asked for

    @classmethod
    def from_request(
        cls, request: RankRequest, outputs: Sequence[int], vocab_size: int, device: torch.device
    ) -> RequestSampling:
        """Raise ValueError if the request's parameters do not fit the vocabulary."""
        params = request.params
        params.check_vocabulary(vocab_size, request.stop_token_ids)
        top_k = min(params.top_k, vocab_size) if params.top_k > 0 else vocab_size
        # (logits - max) / temperature must neither become 0 / 0 nor -inf / inf in float32
        temperature = 0.0
        if not params.greedy:
            temperature = float(np.clip(params.temperature, _FLOAT32.tiny, _FLOAT32.max))
        penalised = params.has_penalties
        return cls(
            params=params,
            draw=(temperature, top_k, float(params.top_p), float(params.min_p)),
            stop_ids=np.array([i for i in request.stop_token_ids if i < vocab_size], np.int64),
            bias_ids=np.array(list(params.logit_bias), np.int64),
            biases=np.array(list(params.logit_bias.values()), np.float32),
            penalties=Penalties.after_outputs(request, outputs, device) if penalised else None,
            plain=params.greedy
            and params.logprobs is None
            and not (params.logit_bias or params.min_tokens or penalised),
        )

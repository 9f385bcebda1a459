"""RequestSampling: what the sampler keeps of one request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.request import RankRequest
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.sampling.bad_words import BadWords
from dp_runtime.sampling.filters import Array
from dp_runtime.sampling.output_order import OutputOrder
from dp_runtime.sampling.penalties import Penalties
from dp_runtime.sampling.token_masks import token_mask

_FLOAT32 = np.finfo(np.float32)


@dataclass(frozen=True, eq=False, kw_only=True)
class RequestSampling:
    """A request's parameters in the form that a batch of them needs."""

    params: SamplingParams
    draw: tuple[float, int, float, float]  # temperature, top_k, top_p, min_p
    stop_ids: Array  # [stops] int64
    bias_ids: Array  # [biases] int64
    biases: Array  # [biases] float32
    mask: Array | None  # [vocab / 8] uint8
    penalties: Penalties | None
    bad_words: BadWords | None
    order: OutputOrder | None  # where one of these two follows the outputs
    plain: bool  # nothing but the argmax is asked for

    @classmethod
    def from_request(
        cls, request: RankRequest, outputs: Sequence[int], vocab_size: int, device: torch.device
    ) -> RequestSampling:
        """Raise ValueError if the request's parameters do not fit the vocabulary."""
        params = request.params
        params.check_vocabulary(vocab_size, request.stop_token_ids, request.bad_words)
        top_k = min(params.top_k, vocab_size) if params.top_k > 0 else vocab_size
        # (logits - max) / temperature must neither become 0 / 0 nor -inf / inf in float32
        temperature = 0.0
        if not params.greedy:
            temperature = float(np.clip(params.temperature, _FLOAT32.tiny, _FLOAT32.max))
        penalised = params.has_penalties
        words = [word for word in request.bad_words if len(word) > 1]
        mask = token_mask(request, vocab_size)
        return cls(
            params=params,
            draw=(temperature, top_k, float(params.top_p), float(params.min_p)),
            stop_ids=np.array([i for i in request.stop_token_ids if i < vocab_size], np.int64),
            bias_ids=np.array(list(params.logit_bias), np.int64),
            biases=np.array(list(params.logit_bias.values()), np.float32),
            mask=mask,
            penalties=Penalties.after_outputs(request, outputs, device) if penalised else None,
            bad_words=BadWords.after_outputs(words, outputs, device) if words else None,
            order=OutputOrder(len(outputs)) if penalised or words else None,
            plain=params.greedy
            and params.logprobs is None
            and mask is None
            and params.structured_outputs is None
            and request.replay is None  # which goes by positions, so the host has to know them
            and not (params.logit_bias or params.min_tokens or penalised or words),
        )

    def begin(self, request_id: int, index: int, num_rows: int, vocab_size: int) -> None:
        """Expect output `index` and, in num_rows - 1 further rows, drafted ones after it."""
        assert self.order is not None, f"request {request_id} has its outputs in any order"
        self.order.advance(request_id, index, num_rows)
        if self.penalties is not None:
            self.penalties.begin(vocab_size)

    def take(self, token_ids: Tensor, emitted: Tensor) -> None:
        """Take over the tokens [n] int64 that became outputs: where emitted [n] float32 is 1."""
        if self.penalties is not None:
            self.penalties.count(token_ids, emitted)
        if self.bad_words is not None:
            self.bad_words.append(token_ids, emitted)

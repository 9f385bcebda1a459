"""Requests and their outputs, as users, the driver and ranks see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dp_runtime.core.sampling_params import SamplingParams


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-text token, a stop token or a stop string
    LENGTH = "length"  # max_tokens
    ABORT = "abort"
    TIMEOUT = "timeout"  # timeout_s
    ERROR = "error"  # the request failed; nobody else's did


@dataclass(frozen=True, eq=False)
class PromptEmbeds:
    positions: NDArray[np.int64]  # [embeds]
    values: NDArray[np.float32]  # [embeds, hidden]


@dataclass(frozen=True, eq=False)
class TokensPrompt:
    """A prompt of token ids, some of which embeddings (of an image, say) may replace."""

    token_ids: Sequence[int]
    prompt_embeds: NDArray[np.float32] | None = None  # [embeds, hidden]
    embed_positions: Sequence[int] = ()  # [embeds]


Prompt = str | Sequence[int] | TokensPrompt


@dataclass(frozen=True, eq=False)
class RankRequest:
    """A request as a rank gets it: plain data that can be replayed."""

    request_id: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]  # end-of-text ids included, unless ignored
    embeds: PromptEmbeds | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences of tokens that its output never has
    outputs: tuple[int, ...] = ()  # made before its rank was lost
    num_scored: int = 0  # prompt positions whose log probabilities were reported before that

    @property
    def num_reserved_tokens(self) -> int:
        """The tokens that it may take at most, prompt included."""
        return len(self.prompt_token_ids) + self.params.known_max_tokens


@dataclass(frozen=True)
class TokenLogprob:
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


class RequestUpdate(NamedTuple):
    """The progress of one request in one step."""

    request_id: int
    first_index: int  # of token_ids, in the output
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None  # the stop token
    error: str = ""  # why the rank could not go on with the request, which has ended
    given_back: bool | None = None  # the answer to a recall; False: it has begun, or ended

    @classmethod
    def failed(cls, request_id: int, num_outputs: int, error: Exception | str) -> RequestUpdate:
        """A request that has ended for a reason of its own."""
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        return cls(request_id, num_outputs, finish_reason=FinishReason.ERROR, error=text)


@dataclass(frozen=True)
class RequestDelta:
    request_id: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprob, ...] | None = None  # one for each token, if asked for


@dataclass(frozen=True)
class RequestOutput:
    request_id: int
    prompt_token_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: int | str | None  # the stop token or string
    dp_rank: int
    logprobs: tuple[TokenLogprob, ...] | None = None  # one per output token, if asked for
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None  # one per prompt token after the first

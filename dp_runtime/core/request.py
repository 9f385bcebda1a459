"""Requests and their outputs, as users, the driver and ranks see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

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
    # [positions, layers with experts, top_k] ids that tokens go to, from the first on; -1: free
    replay_routed_experts: NDArray[np.integer[Any]] | None = None


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """A text in which the model's image token stands for each image, in their order."""

    text: str | Sequence[int]  # or its token ids
    images: Sequence[object]  # PIL images, the bytes of image files, their paths, or PromptImages


Prompt = str | Sequence[int] | TokensPrompt | ImagePrompt


@dataclass(frozen=True)
class ImageFormat:
    """How a model wants the images of its prompts."""

    image_token_ids: tuple[int, int, int]  # before an image in a text, for it, and after it
    patch_size: int  # pixels of a side
    merge_size: int  # patches of a token's side
    min_pixels: int  # images are resized to at least and at most so many
    max_pixels: int
    rescale_factor: float
    mean: tuple[float, ...]  # by channel, of rescaled values
    std: tuple[float, ...]

    @property
    def image_token_id(self) -> int:
        return self.image_token_ids[1]

    @property
    def max_tokens(self) -> int:
        return self.max_pixels // (self.patch_size * self.merge_size) ** 2


@dataclass(frozen=True, eq=False)
class PromptImage:
    """An image, resized and cut into patches, and its place in a prompt: a token per cell."""

    start: int  # position of its first token
    rows: int  # of tokens
    columns: int
    patches: NDArray[np.uint8]  # [patches, channels * patch_size^2], those of a token adjacent
    digest: bytes  # of the above but its place; equal images have equal features

    @property
    def num_tokens(self) -> int:
        return self.rows * self.columns

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, eq=False)
class RankRequest:
    """A request as a rank gets it: plain data that can be replayed."""

    request_id: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]  # end-of-text ids included, unless ignored
    embeds: PromptEmbeds | None = None
    images: tuple[PromptImage, ...] = ()  # by place
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences of tokens that its output never has
    outputs: tuple[int, ...] = ()  # made before its rank was lost
    num_scored: int = 0  # prompt positions whose log probabilities were reported before that
    replay: NDArray[np.int16] | None = None  # [positions, layers, top_k]; -1: routed as usual
    num_routed: int = 0  # positions whose experts were reported before that
    at_step: int = 0  # of its epoch, before which its rank holds it: for replays

    @property
    def computes_all(self) -> bool:
        """Tell whether it takes nothing from a prefix cache."""
        told = self.params.prompt_logprobs is not None or self.params.return_routed_experts
        return told or self.replay is not None

    @property
    def num_reserved_tokens(self) -> int:
        """The tokens that it may take at most, prompt included."""
        return len(self.prompt_token_ids) + self.params.known_max_tokens


RoutedExperts = NDArray[Any]  # [tokens, layers with experts, top_k] expert ids


@dataclass(frozen=True)
class RoutingShape:
    """What a model's routers choose for one token."""

    num_layers: int  # those with experts
    top_k: int
    num_experts: int
    may_replay: bool = False  # routers take experts that tokens bring

    @property
    def of_token(self) -> tuple[int, int]:
        return self.num_layers, self.top_k

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return uint8 where every expert id fits, else int16; int32 beyond 32,768 experts."""
        if self.num_experts <= 2**8:
            return np.dtype(np.uint8)
        return np.dtype(np.int16 if self.num_experts <= 2**15 else np.int32)

    @property
    def token_bytes(self) -> int:
        return self.num_layers * self.top_k * self.dtype.itemsize


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
    num_cached_tokens: int = 0  # of its prompt, in the rank's cache when it first ran there
    routed_experts: RoutedExperts | None = None  # of the next positions, from the first on
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
    # [prompt + output tokens - 1, layers with experts, top_k], if asked for and any token ran
    routed_experts: RoutedExperts | None = field(default=None, compare=False)
    num_cached_tokens: int = 0  # of the prompt, which were not computed for it

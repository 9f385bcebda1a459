"""Fields that all generating endpoints share, and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Header
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.core.structured_outputs import StructuredOutputs
from dp_runtime.server.errors import ApiError, refuse
from dp_runtime.server.protocol.forms import about_form, read_form

SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "min_tokens", "seed", "stop", "stop_token_ids", "ignore_eos",
    "skip_special_tokens", "prompt_logprobs", "logit_bias", "include_stop_str_in_output",
    "bad_words", "allowed_token_ids", "truncate_prompt_tokens", "priority", "timeout_s",
    "return_routed_experts", "cache_salt",
)  # fmt: skip

MAX_STOPS, MAX_STOP_LENGTH = 64, 1024  # each is looked for at every character
MAX_BAD_WORDS = 256
MAX_TOKENS_OF_PARAMETER = 4096
MAX_ALLOWED_TOKENS = 262_144  # as many as a vocabulary may have
MAX_FIELDS = 1024  # of an object


def _few(given: Any, most: int = MAX_TOKENS_OF_PARAMETER) -> Any:
    """Refuse a large object before its entries are looked at, and each gets an error."""
    if isinstance(given, dict) and len(given) > most:
        raise ValueError(f"it has more than {most} entries")
    return given


TokenIds = Annotated[list[int], Field(fail_fast=True)]
TextOrTokens = str | Sequence[int]
Texts = Annotated[list[str], Field(fail_fast=True)]
Stop = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]


RANK_HEADER = "X-data-parallel-rank"  # as vLLM's routers send it
RankHeader = Annotated[int | None, Header(alias=RANK_HEADER, description="as dp_rank")]
NOT_USED: Any = Field(None, description="accepted, and not used: no answer depends on it")


class Body(BaseModel):
    """A JSON object of strict types, in which null is as good as absent."""

    model_config = ConfigDict(strict=True, extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        _few(given, MAX_FIELDS)
        return {name: value for name, value in given.items() if value is not None}

    def unknown_fields(self) -> list[str]:
        """The fields, also of objects within, that nobody reads."""
        found = sorted(self.model_extra or ())
        for name in type(self).model_fields:
            entries = getattr(self, name)
            for entry in entries if isinstance(entries, list) else [entries]:
                if isinstance(entry, Body):
                    found += [f"{name}.{inner}" for inner in entry.unknown_fields()]
        return found

    def check_fields(self, policy: str) -> None:
        unknown = self.unknown_fields()
        if unknown and policy == "refuse":
            names = ", ".join(unknown[:20])
            raise ApiError(400, f"unknown fields: {names}", unknown[0], "unknown_field")


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationBody(Body):
    """What completions and chat completions have in common."""

    model: str | None = None
    n: int = 1
    best_of: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = NOT_USED
    metadata: dict[str, Any] | None = NOT_USED
    service_tier: str | None = NOT_USED
    safety_identifier: str | None = NOT_USED
    prompt_cache_key: str | None = NOT_USED
    prompt_cache_retention: str | None = NOT_USED
    store: bool | None = NOT_USED
    session_id: str | None = NOT_USED
    spaces_between_special_tokens: bool | None = NOT_USED
    request_id: str | None = None
    dp_rank: int | None = Field(None, description="the rank that serves the request")
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stop_token_ids: TokenIds | None = Field(None, max_length=MAX_TOKENS_OF_PARAMETER)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    logit_bias: Annotated[dict[str, float], BeforeValidator(_few)] | None = None
    include_stop_str_in_output: bool | None = None
    bad_words: Annotated[list[Stop], Field(max_length=MAX_BAD_WORDS, fail_fast=True)] | None = None
    allowed_token_ids: TokenIds | None = Field(None, max_length=MAX_ALLOWED_TOKENS)
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = Field(
        None, description="false for a chat unless set: its template writes them; else true"
    )
    cache_salt: Annotated[str, Field(max_length=MAX_STOP_LENGTH)] | None = None
    priority: int | None = None
    timeout_s: float | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    return_routed_experts: bool = Field(False, description="base64 of a .npy file, with the end")
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False

    @property
    def params(self) -> SamplingParams:
        """The sampling parameters, without those that the server adds (ValueError)."""
        raise NotImplementedError

    @property
    def num_listed(self) -> int:
        """Count what is in the lists, and characters to stop at: each choice has a copy."""
        tokens = (self.logit_bias, self.stop_token_ids, self.allowed_token_ids)
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return sum(map(len, (*filter(None, tokens), *texts, *(self.bad_words or ()))))

    @property
    def with_usage(self) -> bool:
        options = self.stream_options
        return options is not None and (options.include_usage or options.continuous_usage_stats)

    @property
    def with_usage_in_each_chunk(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def pin(self, dp_rank: int | None) -> None:
        """Take the rank of the header, which must not contradict the body."""
        if dp_rank is not None and self.dp_rank not in (None, dp_rank):
            raise refuse("dp_rank", self.dp_rank, f"the header {RANK_HEADER} says {dp_rank}")
        self.dp_rank = self.dp_rank if dp_rank is None else dp_rank

    def check_choices(self, num_prompts: int, max_choices: int) -> None:
        if self.best_of not in (None, self.n):
            raise refuse("best_of", self.best_of, "leave it out: nothing ranks choices")
        fits = self.n >= 1 and self.n * num_prompts <= max_choices
        if not fits:
            raise refuse("n", self.n, f"1 or more, at most {max_choices} choices for all prompts")
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options", {}, "only with stream true")

    @property
    def form(self) -> StructuredOutputs | None:
        """The form that the answer must have (ValueError)."""
        try:
            return read_form(self.response_format, self.structured_outputs)
        except ValueError as error:
            raise self.as_given(error) from None

    def as_given(self, error: ValueError) -> ValueError:
        """Name this request's own field in an error about what the engine got for it."""
        if self.response_format is None:
            return error
        return about_form(error, "response_format", self.response_format)

    def sampling(self, **own: object) -> SamplingParams:
        """The parameters given here, where None is a default, and by the endpoint (ValueError)."""
        given = {name: getattr(self, name) for name in SAMPLING_FIELDS}
        known = {name: value for name, value in given.items() if value is not None}
        return SamplingParams.from_fields(known | own)

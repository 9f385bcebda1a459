"""SamplingParams: how the tokens of one request are chosen, and when it ends."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from dp_runtime.core.settings import check_settings, setting
from dp_runtime.errors import is_finite, is_int, require

MAX_LOGPROBS = 64
MAX_LOGIT_BIAS = 1e9  # added to a float32 logit, it stays finite
SURROGATES = re.compile("[\ud800-\udfff]")  # no text has them


@dataclass(frozen=True)
class SamplingParams:
    """How a request samples, with other engines' defaults; docs/settings.md explains each field."""

    max_tokens: int = setting(16, "output tokens", at_least=1)
    min_tokens: int = setting(0, "output tokens before anything may end the request", at_least=0)
    temperature: float = setting(1.0, "divides the logits; 0 is greedy", at_least=0)
    top_k: int = setting(0, "sample from the k most probable tokens; 0 and -1: all", at_least=-1)
    top_p: float = setting(
        1.0, "sample from the most probable tokens of this total probability", above=0, at_most=1
    )
    min_p: float = setting(
        0.0, "sample from tokens with at least this share of the best one's probability",
        at_least=0, at_most=1,
    )  # fmt: skip
    presence_penalty: float = setting(
        0.0, "subtracted from the logits of tokens that the output has", at_least=-2, at_most=2
    )
    frequency_penalty: float = setting(
        0.0, "subtracted for each time that the output has a token", at_least=-2, at_most=2
    )
    repetition_penalty: float = setting(
        1.0, "divides the logits of tokens that prompt or output have", at_least=1e-3, at_most=1e3
    )
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = setting(
        None, "makes the tokens a pure function of the request", at_least=0, at_most=2**63 - 1,
        allowed="an integer in 0..2**63-1", shown_default="one that the engine chooses",
    )  # fmt: skip
    stop: Sequence[str] | str = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = setting(False, "go on after an end-of-text token")
    skip_special_tokens: bool = setting(True, "leave special tokens out of the text")
    logprobs: int | None = setting(
        None, "report the chosen token's and the n best log probabilities of the unmodified "
        "distribution at every output position", at_least=0, at_most=MAX_LOGPROBS,
        shown_default="no report",
    )  # fmt: skip
    prompt_logprobs: int | None = setting(
        None, "the same for the prompt", at_least=0, at_most=MAX_LOGPROBS,
        shown_default="no report",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self)
        require(
            self.min_tokens <= self.max_tokens,
            "min_tokens", self.min_tokens, f"at most max_tokens {self.max_tokens}",
        )  # fmt: skip
        self._check_logit_bias()
        self._check_ends()

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Read a JSON object; an unknown field is an error."""
        require(isinstance(values, Mapping), "sampling parameters", values, "a mapping")
        known = {item.name for item in fields(cls)}
        for name, value in values.items():
            require(name in known, name, value, f"known fields: {', '.join(sorted(known))}")
        values = dict(values)
        if isinstance(bias := values.get("logit_bias"), Mapping):
            try:
                values["logit_bias"] = {
                    int(token) if isinstance(token, str) else token: value
                    for token, value in bias.items()
                }
            except ValueError:
                raise ValueError(
                    f"logit_bias: {bias!r} is not allowed; keys are token ids"
                ) from None
        return cls(**values)

    def check_vocabulary(self, vocab_size: int, stop_token_ids: Collection[int]) -> None:
        """Raise ValueError for a token outside the vocabulary."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            ok = all(token < vocab_size for token in ids)
            require(ok, name, getattr(self, name), f"token ids below {vocab_size}")
        ok = (
            self.min_tokens == 0
            or sum(token < vocab_size for token in set(stop_token_ids)) < vocab_size
        )
        require(ok, "min_tokens", self.min_tokens, "0 where every token is a stop token")

    def _check_logit_bias(self) -> None:
        ok = isinstance(self.logit_bias, Mapping) and all(
            is_int(token) and token >= 0 and is_finite(bias) and abs(bias) <= MAX_LOGIT_BIAS
            for token, bias in self.logit_bias.items()
        )
        require(
            ok, "logit_bias", self.logit_bias,
            f"a mapping from token id to a number from {-MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g}",
        )  # fmt: skip

    def _check_ends(self) -> None:
        ok = isinstance(self.stop, str | Sequence) and all(
            isinstance(text, str) and text and not SURROGATES.search(text)
            for text in self.stop_strings
        )
        require(ok, "stop", self.stop, "a non-empty string or a list of them, without surrogates")
        ok = isinstance(self.stop_token_ids, Sequence) and not isinstance(self.stop_token_ids, str)
        ok = ok and all(is_int(token) and token >= 0 for token in self.stop_token_ids)
        require(ok, "stop_token_ids", self.stop_token_ids, "a list of token ids")

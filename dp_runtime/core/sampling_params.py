"""SamplingParams: how the tokens of one request are chosen, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from dp_runtime.errors import is_finite, is_int, require

MAX_LOGPROBS = 64
MAX_LOGIT_BIAS = 1e9  # added to a float32 logit, it stays finite


@dataclass(frozen=True)
class SamplingParams:
    """Per-request sampling; the defaults follow the other engines' (temperature 1, 16 tokens).

    temperature 0 is greedy. top_k 0 and -1 keep all tokens. `logprobs=n` reports the chosen
    token's and the n best log probabilities of the unmodified distribution at every output
    position, `prompt_logprobs=n` the same of the prompt. `seed` makes the tokens a pure function
    of the request; None lets the engine choose one. Raises ValueError naming the field.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] | str = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        self._check_lengths()
        self._check_distribution()
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
        """SamplingParams of a mapping, such as a JSON object; an unknown field is an error."""
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
        """ValueError unless every token named here is one of a vocabulary of that size.

        stop_token_ids: all ids that end the request, the end-of-text ids included.
        """
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            ok = all(token < vocab_size for token in ids)
            require(ok, name, getattr(self, name), f"token ids below {vocab_size}")
        ok = (
            self.min_tokens == 0
            or sum(token < vocab_size for token in set(stop_token_ids)) < vocab_size
        )
        require(ok, "min_tokens", self.min_tokens, "0 where every token is a stop token")

    def _check_lengths(self) -> None:
        for name, least in (("max_tokens", 1), ("min_tokens", 0)):
            value = getattr(self, name)
            require(is_int(value) and value >= least, name, value, f"an integer >= {least}")
        require(
            self.min_tokens <= self.max_tokens,
            "min_tokens", self.min_tokens, f"at most max_tokens {self.max_tokens}",
        )  # fmt: skip
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            ok = value is None or (is_int(value) and 0 <= value <= MAX_LOGPROBS)
            require(ok, name, value, f"None or an integer in 0..{MAX_LOGPROBS}")

    def _check_distribution(self) -> None:
        limits = {
            "temperature": (0.0, math.inf), "min_p": (0.0, 1.0), "top_p": (0.0, 1.0),
            "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0),
            "repetition_penalty": (1e-3, 1e3),
        }  # fmt: skip
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            ok = is_finite(value) and low <= value <= high
            require(ok, name, value, f"a number from {low:g} to {high:g}")
        require(self.top_p > 0, "top_p", self.top_p, "a number above 0")
        require(is_int(self.top_k) and self.top_k >= -1, "top_k", self.top_k, "an integer >= -1")
        ok = isinstance(self.logit_bias, Mapping) and all(
            is_int(token) and token >= 0 and is_finite(bias) and abs(bias) <= MAX_LOGIT_BIAS
            for token, bias in self.logit_bias.items()
        )
        require(
            ok, "logit_bias", self.logit_bias,
            f"a mapping from token id to a number from {-MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g}",
        )  # fmt: skip
        ok = self.seed is None or (is_int(self.seed) and 0 <= self.seed < 2**63)
        require(ok, "seed", self.seed, "None or an integer in 0..2**63-1")

    def _check_ends(self) -> None:
        ok = isinstance(self.stop, str | Sequence) and all(
            isinstance(text, str) and text for text in self.stop_strings
        )
        require(ok, "stop", self.stop, "a non-empty string or a list of them")
        ok = isinstance(self.stop_token_ids, Sequence) and not isinstance(self.stop_token_ids, str)
        ok = ok and all(is_int(token) and token >= 0 for token in self.stop_token_ids)
        require(ok, "stop_token_ids", self.stop_token_ids, "a list of token ids")
        for name in ("ignore_eos", "skip_special_tokens"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "a bool")

"""SamplingParams: how the tokens of one request are chosen, and when it ends."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dp_runtime.core.plain_values import (
    SURROGATES,
    plain_float,
    plain_int,
    plain_items,
    plain_list,
    plain_str,
)
from dp_runtime.core.settings import MAX_INT, check_settings, setting
from dp_runtime.core.structured_outputs import StructuredOutputs
from dp_runtime.errors import require, shown

MAX_LOGPROBS = 64
MAX_BAD_WORDS = 1000  # each is compared with every row
MAX_LOGIT_BIAS = 1e9  # added to a float32 logit, it stays finite
DECIMAL = re.compile("0|[1-9][0-9]{0,18}")  # as JSON writes a number


def _token_id(value: object) -> int | None:
    token = plain_int(value)
    return token if token is not None and 0 <= token <= MAX_INT else None


def _logit_bias(given: object) -> dict[int, float] | None:
    items = plain_items(given)
    biases: dict[int, float] = {}
    for key, value in items or ():
        token, bias = _token_id(key), plain_float(value)
        if token is not None and bias is not None and abs(bias) <= MAX_LOGIT_BIAS:
            biases[token] = bias
    return biases if items is not None and len(biases) == len(items) else None


def _texts(given: object) -> tuple[str, ...] | None:
    entries = plain_list(given)
    texts = [plain_str(entry) for entry in entries or ()]
    kept = tuple(text for text in texts if text and not SURROGATES.search(text))
    return kept if entries is not None and len(kept) == len(texts) else None


def _stop(given: object) -> tuple[str, ...] | str | None:
    one = plain_str(given)
    stops = _texts(given if one is None else [one])
    return stops if one is None or stops is None else one


def _bad_words(given: object) -> tuple[str, ...] | None:
    words = _texts(given)
    return words if words is not None and len(words) <= MAX_BAD_WORDS else None


def _token_ids(given: object) -> tuple[int, ...] | None:
    entries = plain_list(given)
    tokens = tuple(token for token in map(_token_id, entries or ()) if token is not None)
    return tokens if entries is not None and len(tokens) == len(entries) else None


def _allowed_token_ids(given: object) -> tuple[int, ...] | None:
    return _token_ids(given) or None


def _truncation(given: object) -> int | None:
    count = plain_int(given)
    return count if count is not None and (count == -1 or 1 <= count <= MAX_INT) else None


def _salt(given: object) -> str | None:
    salt = plain_str(given)
    return None if not salt or SURROGATES.search(salt) else salt


@dataclass(frozen=True)
class SamplingParams:
    """How a request samples, with other engines' defaults; docs/settings.md explains each field.

    What is given is copied: fields hold numbers, texts, tuples and dicts of Python's own types.
    """

    max_tokens: int | None = setting(
        16, "output tokens; None: as many as max_model_len has room for", at_least=1
    )
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
    logit_bias: Mapping[int, float] = setting(
        {}, "numbers that are added to the logits of tokens", read=_logit_bias,
        allowed="a mapping from token id, each once, "
        f"to a number from {-MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g}", shown_default="none",
    )  # fmt: skip
    seed: int | None = setting(
        None, "makes the tokens a pure function of the request", at_least=0, at_most=2**63 - 1,
        allowed="an integer in 0..2**63-1", shown_default="one that the engine chooses",
    )  # fmt: skip
    stop: Sequence[str] | str = setting(
        (), "texts that end the request, special tokens among them",
        read=_stop, allowed="a non-empty string or a list of them, without surrogates",
        shown_default="none",
    )  # fmt: skip
    stop_token_ids: Sequence[int] = setting(
        (), "tokens that end the request", read=_token_ids, allowed="a list of token ids",
        shown_default="none",
    )  # fmt: skip
    include_stop_str_in_output: bool = setting(
        False, "end the text with the stop string or the stop token that ended the request; a "
        "special token is there as skip_special_tokens has it",
    )  # fmt: skip
    bad_words: Sequence[str] = setting(
        (), "words that the output must not have, with or without a space before them; a word of "
        "several tokens is kept from its last one", read=_bad_words,
        allowed=f"a list of at most {MAX_BAD_WORDS} non-empty strings, without surrogates",
        shown_default="none",
    )  # fmt: skip
    allowed_token_ids: Sequence[int] | None = setting(
        None, "choose from these tokens alone", read=_allowed_token_ids,
        allowed="a list of token ids that is not empty", shown_default="all",
    )  # fmt: skip
    structured_outputs: StructuredOutputs | None = setting(
        None, "the form that the text must have: a JSON schema, any JSON object, a regex, one of "
        "some choices or a grammar", read=StructuredOutputs.read,
        allowed="a StructuredOutputs or its fields", shown_default="any",
    )  # fmt: skip
    ignore_eos: bool = setting(False, "go on after an end-of-text token")
    skip_special_tokens: bool = setting(True, "leave special tokens out of the text")
    priority: int = setting(
        0, "requests with a lower one are served first, in order of arrival among equals; those "
        "that run go on", at_least=-MAX_INT,
    )  # fmt: skip
    timeout_s: float | None = setting(
        None, "seconds from its submission until the request ends with the tokens that it has, "
        "wherever it is", above=0, at_most=MAX_INT, shown_default="no end",
    )  # fmt: skip
    logprobs: int | None = setting(
        None, "report the chosen token's and the n best log probabilities of the unmodified "
        "distribution at every output position", at_least=0, at_most=MAX_LOGPROBS,
        shown_default="no report",
    )  # fmt: skip
    prompt_logprobs: int | None = setting(
        None, "the same for the prompt", at_least=0, at_most=MAX_LOGPROBS,
        shown_default="no report",
    )  # fmt: skip
    return_routed_experts: bool = setting(
        False, "return the experts that each of its tokens went to in every layer; the engine "
        "needs enable_return_routed_experts",
    )  # fmt: skip
    truncate_prompt_tokens: int | None = setting(
        None, "keep so many of the prompt's last tokens; -1: as many as leave room for max_tokens",
        read=_truncation, allowed="-1 or an integer >= 1", shown_default="all of them",
    )  # fmt: skip
    cache_salt: str | None = setting(
        None, "share cached pages with requests of the same salt alone, so that nobody else's can "
        "find out by their speed what this one's prompt is", read=_salt,
        allowed="a non-empty string, without surrogates", shown_default="with those without one",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self)
        require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens", self.min_tokens, f"at most max_tokens {self.max_tokens}",
        )  # fmt: skip

    @property
    def known_max_tokens(self) -> int:
        assert self.max_tokens is not None, "an engine sets it as it takes a request"
        return self.max_tokens

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
        items = plain_items(values)
        require(items is not None, "sampling parameters", values, "a mapping")
        known = {item.name for item in fields(cls)}
        given: dict[str, Any] = {}
        for key, value in items or ():
            name = plain_str(key)
            ok = name is not None and name in known
            require(ok, name or shown(key), value, f"known fields: {', '.join(sorted(known))}")
            given[str(name)] = value
        if "logit_bias" in given:
            given["logit_bias"] = _with_token_ids(given["logit_bias"])
        return cls(**given)

    def copied(self) -> SamplingParams:
        """The parameters as they are now, checked again; a subclass is left behind."""
        return SamplingParams(**{item.name: getattr(self, item.name) for item in fields(self)})

    def check_vocabulary(
        self,
        vocab_size: int,
        stop_token_ids: Collection[int],
        bad_words: Collection[Sequence[int]] = (),
    ) -> None:
        """Raise ValueError for a token outside the vocabulary, or if none is left to choose."""
        for name in ("logit_bias", "stop_token_ids", "allowed_token_ids"):
            ids = getattr(self, name) or ()
            given = list(ids) if isinstance(ids, tuple) else ids
            ok = all(token < vocab_size for token in ids)
            require(ok, name, given, f"token ids below {vocab_size}")
        allowed = self.allowed_token_ids
        choices = range(vocab_size) if allowed is None else frozenset(allowed)
        bad = {word[0] for word in bad_words if len(word) == 1 and word[0] in choices}
        few = "words that leave a token to choose"
        require(len(bad) < len(choices), "bad_words", self.bad_words, few)
        stops = {token for token in stop_token_ids if token in choices}
        ok = self.min_tokens == 0 or len(bad | stops) < len(choices)
        require(ok, "min_tokens", self.min_tokens, "0 where every token is a stop token")


def _with_token_ids(given: object) -> object:
    """A bias of JSON, whose keys are texts: `"12"`, never `"012"`, `"+12"` or `"1_2"`."""
    items = plain_items(given)
    if items is None:
        return given
    biases: dict[int, object] = {}
    for key, bias in items:
        text = plain_str(key)
        number = int(text) if text is not None and DECIMAL.fullmatch(text) else plain_int(key)
        if number is not None:
            biases[number] = bias
    require(len(biases) == len(items), "logit_bias", given, "keys are token ids, each once")
    return biases

"""RequestFactory: makes what a rank gets from what a user submits, checked against the model."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from math import inf
from time import monotonic
from typing import Protocol, cast

import numpy as np

from dp_runtime.core.membership import Membership
from dp_runtime.core.plain_values import (
    plain_bool,
    plain_int,
    plain_ints,
    plain_list,
    plain_str,
    plain_timeout,
)
from dp_runtime.core.request import PromptEmbeds, PromptImage, RankRequest
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.engine.prompts.context_length import check_context
from dp_runtime.engine.prompts.embeds import copied_embeds
from dp_runtime.engine.prompts.given_prompt import GivenPrompt, unreadable
from dp_runtime.engine.prompts.replays import copied_replay
from dp_runtime.errors import RankMissing, one_line, require, shown
from dp_runtime.metrics.status import ModelInfo
from dp_runtime.sampling.rng import derive_seed
from dp_runtime.structured.grammar_trial import GrammarTrial
from dp_runtime.text.bad_words import encoded_bad_words
from dp_runtime.text.tokenizer import Tokenizer
from dp_runtime.vision.image_processor import ImageProcessor
from dp_runtime.vision.placeholders import expanded


@dataclass(frozen=True, eq=False)
class NewRequest:
    """A request that was checked, and the rank that it is pinned to, if any."""

    request: RankRequest
    dp_rank: int | None
    deadline: float = inf  # time.monotonic()

    @property
    def seconds_left(self) -> float | None:
        return None if self.deadline == inf else max(0.0, self.deadline - monotonic())


class RanksToServe(Protocol):
    @property
    def members(self) -> Membership: ...  # who does

    @property
    def wanted(self) -> Membership: ...  # who is to


@dataclass(frozen=True, eq=False)
class RequestFactory:
    """Makes complete requests; every mistake is a ValueError that names field and value.

    Whatever a caller gives is copied into plain values, which are then checked.
    """

    model: ModelInfo
    tokenizer: Tokenizer | None
    seed: int
    ranks: RanksToServe
    _ids: Iterator[int] = field(default_factory=count)

    def make(self, prompt: object, params: object, dp_rank: object) -> NewRequest:
        own = SamplingParams() if params is None else copied_params(params)
        return self._make(prompt, own, dp_rank)

    def close(self) -> None:
        self._grammars.close()

    def make_all(self, prompts: object, params: object, dp_ranks: object) -> list[NewRequest]:
        """A request for each prompt; `params` are for all of them or one for each."""
        given = _entries("prompts", prompts)
        size = len(given)
        shared = SamplingParams() if params is None else None
        if isinstance(params, SamplingParams):
            shared = copied_params(params)
        each = [None] * size if shared else _entries("params", params, size)
        ranks = [None] * size if dp_ranks is None else _entries("dp_ranks", dp_ranks, size)
        made = []
        for index, (prompt, one, rank) in enumerate(zip(given, each, ranks)):
            try:
                made.append(self._make(prompt, shared or copied_params(one), rank))
            except ValueError as error:
                raise ValueError(one_line(f"prompts[{index}]: {error}")) from None
        return made

    def _make(self, prompt: object, params: SamplingParams, dp_rank: object) -> NewRequest:
        """The request as a rank gets it."""
        deadline = inf if params.timeout_s is None else monotonic() + params.timeout_s
        given = GivenPrompt.read(prompt)
        tokens = self._truncated(given, self._tokens(given), params)
        self._check_tokens(given.field, tokens)
        tokens, images = self._with_images(given, tokens)
        if params.max_tokens is None:
            params = replace(params, max_tokens=self.model.max_model_len - len(tokens))
        eos = () if params.ignore_eos else self.model.eos_token_ids
        ends = frozenset((*eos, *params.stop_token_ids))
        if params.structured_outputs is not None:
            self._grammars.check(params.structured_outputs)
            ends |= {*self.model.eos_token_ids}  # what ends a text that can't go on
        require(
            not params.stop_strings or self.tokenizer is not None, "stop", params.stop,
            "stop_token_ids: the model's directory has no tokenizer.json",
        )  # fmt: skip
        longest = len(tokens) + params.known_max_tokens - 1
        replay = copied_replay(given.replay, self.model.routing, longest, params)
        bad_words = self._bad_words(params.bad_words)
        params.check_vocabulary(self.model.vocab_size, ends, bad_words)
        rank = self._pinned(dp_rank)
        embeds = self._embeds(given, len(tokens))
        request_id = next(self._ids)
        seed = derive_seed(self.seed, request_id) if params.seed is None else params.seed
        own = request_id, tokens, params, seed, ends, embeds, images, bad_words
        request = RankRequest(*own, replay=replay)
        return NewRequest(request, rank, deadline)

    @cached_property
    def _grammars(self) -> GrammarTrial:
        model = self.model
        return GrammarTrial(model.tokenizer_json, model.vocab_size, model.eos_token_ids)

    def _tokens(self, given: GivenPrompt) -> tuple[int, ...]:
        text = plain_str(given.tokens)
        if text is not None:
            require(
                self.tokenizer is not None, "prompt", _short(text),
                "token ids: the model's directory has no tokenizer.json",
            )  # fmt: skip
            assert self.tokenizer is not None, "checked above"
            return tuple(self.tokenizer.encode(text))
        entries = plain_list(given.tokens)
        require(entries is not None, given.field, _short(given.tokens), "text or token ids")
        return tuple(_token(given.field, entry) for entry in entries or ())

    def _truncated(
        self, given: GivenPrompt, tokens: tuple[int, ...], params: SamplingParams
    ) -> tuple[int, ...]:
        count = params.truncate_prompt_tokens
        if count is None:
            return tokens
        alone = "None with prompt_embeds or images, whose positions would move"
        require(not given.has_places, "truncate_prompt_tokens", count, alone)
        if count == -1:
            longest = self.model.max_model_len
            count = longest - (params.max_tokens or 1)
            few = f"less than max_model_len {longest}: truncate_prompt_tokens -1 leaves the rest"
            require(count > 0, "max_tokens", params.max_tokens, few)
        return tokens[-count:]

    def _with_images(
        self, given: GivenPrompt, tokens: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[PromptImage, ...]]:
        """Prepare a prompt's images, and give each as many tokens as it has features."""
        entries, wants = plain_list(given.images), self.model.images
        require(entries is not None, "images", _short(given.images), "a list of images")
        if not entries:
            return tokens, ()
        require(wants is not None, "images", len(entries), "none: the model takes no images")
        assert wants is not None, "checked above"
        count, token = tokens.count(wants.image_token_id), wants.image_token_id
        many = f"{count}: as often as token {token}, which stands for an image, is in the text"
        require(count == len(entries), "images", len(entries), many)
        images = [self._prepared(f"images[{i}]", entry) for i, entry in enumerate(entries)]
        tokens, placed = expanded(tokens, images, token)
        self._check_tokens(given.field, tokens)
        return tokens, placed

    def _prepared(self, field: str, given: object) -> PromptImage:
        return given if isinstance(given, PromptImage) else self._processor(field, given)

    @cached_property
    def _processor(self) -> ImageProcessor:
        assert self.model.images is not None, "the model takes images"
        return ImageProcessor(self.model.images)

    def _check_tokens(self, field: str, tokens: tuple[int, ...]) -> None:
        require(len(tokens) > 0, field, "", "at least one token")
        check_context(field, len(tokens), self.model.max_model_len)
        size = self.model.vocab_size
        for token in tokens:
            require(0 <= token < size, field, token, f"token ids are in 0..{size - 1}")

    def _pinned(self, dp_rank: object) -> int | None:
        if dp_rank is None:
            return None
        rank = plain_int(dp_rank)
        members = self.ranks.members
        if rank not in members and rank in self.ranks.wanted:
            others = f"ranks {members} serve until it is back"
            raise RankMissing(f"dp_rank: rank {rank} was lost; {others}")
        require(rank in members, "dp_rank", dp_rank, f"None or a rank in {members}")
        return rank

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        if not words:
            return ()
        allowed = "none: the model's directory has no tokenizer.json"
        require(self.tokenizer is not None, "bad_words", words, allowed)
        assert self.tokenizer is not None, "checked above"
        return encoded_bad_words(words, self.tokenizer, self.model.vocab_size)

    def _embeds(self, given: GivenPrompt, length: int) -> PromptEmbeds | None:
        positions = plain_ints(given.positions)
        shown = plain_list(given.positions) or given.positions
        if given.embeds is None:
            require(positions == [], "embed_positions", shown, "none without prompt_embeds")
            return None
        require(
            positions is not None
            and all(0 <= at < length for at in positions)
            and len(set(positions)) == len(positions),
            "embed_positions", shown, f"distinct positions of the prompt, 0..{length - 1}",
        )  # fmt: skip
        assert positions is not None, "checked above"
        values = copied_embeds(given.embeds, (len(positions), self.model.hidden_size))
        return PromptEmbeds(np.asarray(positions, np.int64), values)


def copied_params(params: object) -> SamplingParams:
    """The engine's own copy, which nobody changes; ValueError if they are not, or changed badly."""
    try:
        ok = isinstance(params, SamplingParams)
        require(ok, "params", params, "an instance of SamplingParams")
        return SamplingParams.copied(cast(SamplingParams, params))
    except ValueError:
        raise
    except Exception as error:  # of a user's own kind
        raise unreadable("params", params, error) from None


def checked_seconds(field: str, given: object) -> float:
    seconds = plain_timeout(given)
    require(seconds is not None, field, given, "seconds >= 0")
    assert seconds is not None, "checked above"
    return min(seconds, threading.TIMEOUT_MAX)


def checked_flag(field: str, given: object) -> bool:
    flag = plain_bool(given)
    require(flag is not None, field, given, "a bool")
    return bool(flag)


def checked_requests(given: object) -> list[NewRequest]:
    entries = plain_list(given)
    made = [entry for entry in entries or () if isinstance(entry, NewRequest)]
    ok = entries is not None and len(made) == len(entries)
    require(ok, "requests", given, "a list of what `checked` returned")
    return made


def _token(field: str, entry: object) -> int:
    if type(entry) is int:
        return entry
    token = plain_int(entry)
    require(token is not None, field, _short(entry), "text or token ids")
    assert token is not None, "checked above"
    return token


def _entries(field: str, given: object, length: int | None = None) -> list[object]:
    """The entries of a list, of one per prompt if a length is given."""
    entries = plain_list(given)
    ok = entries is not None and length in (None, len(entries))
    allowed = "a list of prompts" if length is None else f"a list, one per prompt ({length})"
    require(ok, field, given, allowed)
    return entries or []


def _short(value: object) -> str:
    return one_line(value, 43) if type(value) is str else shown(value, 43)

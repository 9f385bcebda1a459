"""RequestFactory: makes what a rank gets from what a user submits, checked against the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dp_runtime.core.request import Prompt, PromptEmbeds, RankRequest, TokensPrompt
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.engine.tokenizer import Tokenizer
from dp_runtime.errors import is_int, require
from dp_runtime.metrics.status import ModelInfo
from dp_runtime.sampling.rng import derive_seed


@dataclass(frozen=True, eq=False)
class RequestFactory:
    """Makes complete requests; every mistake is a ValueError that names field and value."""

    model: ModelInfo
    tokenizer: Tokenizer | None
    seed: int

    def make(self, request_id: int, prompt: Prompt, params: SamplingParams) -> RankRequest:
        require(
            isinstance(params, SamplingParams), "params", params, "an instance of SamplingParams"
        )
        tokens = self._tokens(prompt)
        self._check_tokens(tokens)
        eos = () if params.ignore_eos else self.model.eos_token_ids
        ends = frozenset((*eos, *params.stop_token_ids))
        self._check_params(params, ends)
        return RankRequest(
            request_id=request_id,
            prompt_token_ids=tokens,
            params=params,
            seed=derive_seed(self.seed, request_id) if params.seed is None else params.seed,
            stop_token_ids=ends,
            embeds=self._embeds(prompt, len(tokens)) if isinstance(prompt, TokensPrompt) else None,
        )

    def _tokens(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            require(
                self.tokenizer is not None, "prompt", _short(prompt),
                "token ids: the model's directory has no tokenizer.json",
            )  # fmt: skip
            assert self.tokenizer is not None, "checked above"
            return tuple(self.tokenizer.encode(prompt))
        ids = prompt.token_ids if isinstance(prompt, TokensPrompt) else prompt
        require(isinstance(ids, Sequence | np.ndarray), "prompt", _short(ids), "text or token ids")
        for token in ids:
            require(is_int(token), "prompt", _short(token), "text or token ids")
        return tuple(int(token) for token in ids)

    def _check_tokens(self, tokens: tuple[int, ...]) -> None:
        require(len(tokens) > 0, "prompt", "", "at least one token")
        max_tokens = self.model.max_model_len - 1
        require(
            len(tokens) <= max_tokens, "prompt", f"{len(tokens)} tokens",
            f"at max_tokens {max_tokens} tokens: max_model_len is {self.model.max_model_len}",
        )  # fmt: skip
        size = self.model.vocab_size
        for token in tokens:
            require(0 <= token < size, "prompt", token, f"token ids are in 0..{size - 1}")

    def _check_params(self, params: SamplingParams, ends: frozenset[int]) -> None:
        require(
            not params.stop_strings or self.tokenizer is not None, "stop", params.stop,
            "stop_token_ids: the model's directory has no tokenizer.json",
        )  # fmt: skip
        params.check_vocabulary(self.model.vocab_size, ends)

    def _embeds(self, prompt: TokensPrompt, length: int) -> PromptEmbeds | None:
        if prompt.prompt_embeds is None:
            given = list(prompt.embed_positions)
            require(not given, "embed_positions", given, "none without prompt_embeds")
            return None
        positions = list(prompt.embed_positions)
        ok = all(is_int(at) and 0 <= at < length for at in positions)
        require(
            ok and len(set(positions)) == len(positions), "embed_positions", positions,
            f"distinct positions of the prompt, 0..{length - 1}",
        )  # fmt: skip
        values, shape = _floats(prompt.prompt_embeds), (len(positions), self.model.hidden_size)
        require(
            values.shape == shape, "prompt_embeds", values.shape,
            f"shape {shape}: one row of hidden_size per embed position",
        )  # fmt: skip
        require(bool(np.isfinite(values).all()), "prompt_embeds", "NaN or inf", "finite values")
        return PromptEmbeds(np.asarray(positions, np.int64), values)


def _floats(values: object) -> NDArray[np.float32]:
    try:
        return np.asarray(values, np.float32)
    except (TypeError, ValueError):
        raise ValueError(
            f"prompt_embeds: {_short(values)!r} is not allowed; an array of floats"
        ) from None


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:40] + "..."

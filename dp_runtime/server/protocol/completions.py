"""The body of /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.server.config import MAX_CHOICES
from dp_runtime.server.errors import refuse
from dp_runtime.server.protocol.fields import GenerationBody, TextOrTokens, Texts, TokenIds

DEFAULT_MAX_TOKENS = 16
Many = Field(fail_fast=True, max_length=MAX_CHOICES)


class CompletionBody(GenerationBody):
    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Many]
    max_tokens: int = DEFAULT_MAX_TOKENS
    logprobs: int | None = None
    echo: bool = False

    @property
    def prompts(self) -> Sequence[TextOrTokens]:
        match self.prompt:
            case str() as text:
                return [text]
            case [int(), *_] as token_ids:
                return [token_ids]  # type: ignore[list-item]
            case []:
                raise refuse("prompt", [], "text, token ids, or a list of either")
            case batch:
                return batch  # type: ignore[return-value]

    @property
    def only_scores(self) -> bool:
        """Whether the prompt's log probabilities are wanted, and no new token."""
        return self.echo and self.max_tokens == 0

    @property
    def params(self) -> SamplingParams:
        """One token is made even where only the prompt is scored; nobody is shown it."""
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return self.sampling(
            max_tokens=1 if self.only_scores else self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=max((n for n in asked if n is not None), default=None),
        )

"""Bodies of the endpoints that generate nothing."""

from __future__ import annotations

from pydantic import Field

from dp_runtime.server.protocol.chat import Objects, TemplateFields
from dp_runtime.server.protocol.fields import Body, Texts, TokenIds


class TokenizeBody(TemplateFields):
    """Either a text, or a chat as /v1/chat/completions takes it."""

    prompt: str | None = None
    messages: Objects | None = None
    model: str | None = None
    return_token_strs: bool = False


class DetokenizeBody(Body):
    tokens: TokenIds
    model: str | None = None


class AbortBody(Body):
    request_id: str | None = None
    request_ids: Texts = Field(default_factory=list)
    abort_all: bool = False


class ResizeBody(Body):
    dp_size: int


class DrainBody(Body):
    dp_rank: int
    timeout_s: float = 0.0

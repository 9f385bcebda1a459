"""Bodies of the endpoints that generate nothing."""

from __future__ import annotations

from pydantic import Field

from dp_runtime.server.protocol.fields import Body, Texts, TokenIds


class TokenizeBody(Body):
    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Body):
    tokens: TokenIds
    model: str | None = None


class AbortBody(Body):
    request_id: str | None = None
    request_ids: Texts = Field(default_factory=list)
    abort_all: bool = False

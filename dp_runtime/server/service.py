"""Endpoints beside generation: the model, its tokens, aborts, health, metrics."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from dp_runtime.chat.tools import ToolUse
from dp_runtime.metrics.prometheus.page import CONTENT_TYPE
from dp_runtime.metrics.status import DEFAULT_TEMPLATE
from dp_runtime.server.answers import as_json
from dp_runtime.server.chat.chats import Chats
from dp_runtime.server.errors import refuse
from dp_runtime.server.protocol.service import AbortBody, DetokenizeBody, TokenizeBody
from dp_runtime.server.state import ServerState
from dp_runtime.text.tokenizer import Tokenizer

Content = dict[str, Any]


def model_routes(state: ServerState) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/models")
    async def list_models() -> Content:
        """List the one model that this server has."""
        return {"object": "list", "data": [_card(state)]}

    @routes.get("/v1/models/{name:path}")
    async def show_model(name: str) -> Content:
        """Describe the model."""
        state.check_model(name)
        return _card(state)

    return routes


def token_routes(state: ServerState) -> APIRouter:
    routes = APIRouter()
    policy = state.config.unknown_fields

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Response:
        """Return the token ids of a text, or of a chat."""
        body.check_fields(policy)
        state.check_model(body.model)
        max_model_len = state.engine.model.max_model_len
        tokenize = partial(_tokenized, state.chats, body, max_model_len)
        content = await state.render(tokenize, body.messages or ())
        return Response(content, media_type="application/json")

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Response:
        """Return the text of token ids."""
        body.check_fields(policy)
        state.check_model(body.model)
        work = (state.needed_tokenizer, body.tokens, state.engine.model.vocab_size)
        text = await state.in_thread(partial(_text, *work))
        return Response(as_json({"prompt": text}), media_type="application/json")

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> Content:
        """Tell clients without the tokenizer its special tokens and chat template."""
        model, tokenizer = state.engine.model, state.needed_tokenizer
        ends = (tokenizer.shown_token(token_id, False) for token_id in model.eos_token_ids)
        tokens = {"eos_token": next(ends, None), **model.chat.special_tokens}
        return {**tokens, "chat_template": model.chat.templates.get(DEFAULT_TEMPLATE)}

    return routes


def control_routes(state: ServerState) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/abort")
    async def abort(body: AbortBody) -> Content:
        """End running requests, by the ids in their answers or all of them."""
        body.check_fields(state.config.unknown_fields)
        if body.abort_all:
            return {"aborted": state.jobs.abort_all()}
        ids = [*body.request_ids, *([body.request_id] if body.request_id else [])]
        if not ids:
            raise refuse("request_id", None, "an id, request_ids, or abort_all true")
        return {"aborted": state.jobs.abort(ids)}

    @routes.get("/health")
    async def health() -> JSONResponse:
        """Tell of each rank its state, last finished step and its age; 200 while it may go on."""
        return _told(await state.health(), ("ok", "paused"))

    @routes.get("/ready")
    async def ready() -> JSONResponse:
        """Tell the same; 200 only while all ranks serve."""
        return _told(await state.health(), ("ok",))

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Export the metrics of every rank in Prometheus' text format."""
        return Response(await state.metrics(), media_type=CONTENT_TYPE)

    @routes.get("/flight_record")
    async def flight_record() -> Response:
        """Return the last steps of every rank, for `dp-runtime doctor`, as lines of JSON."""
        return Response(await state.flight_record(), media_type="application/x-ndjson")

    @routes.get("/recording")
    async def recording() -> Response:
        """Return the steps that the ranks remember, for `dp-runtime replay`."""
        return Response(await state.recording(), media_type="application/gzip")

    return routes


def _told(health: Content, well: Collection[str]) -> JSONResponse:
    ok = health["status"] in well
    return JSONResponse(health, HTTPStatus.OK if ok else HTTPStatus.SERVICE_UNAVAILABLE)


def _tokenized(chats: Chats, body: TokenizeBody, max_model_len: int) -> bytes:
    tokens = _tokens(chats, body)
    content: Content = {
        "tokens": tokens, "count": len(tokens), "max_model_len": max_model_len
    }  # fmt: skip
    if body.return_token_strs:
        content["token_strs"] = [chats.tokenizer.shown_token(each, False) for each in tokens]
    return as_json(content, len(tokens))


def _text(tokenizer: Tokenizer, tokens: Sequence[int], vocab_size: int) -> str:
    for token_id in tokens:
        if not 0 <= token_id < vocab_size:
            raise refuse("tokens", token_id, f"token ids are in 0..{vocab_size - 1}")
    return tokenizer.decode(tokens, skip_special_tokens=False)


def _tokens(chats: Chats, body: TokenizeBody) -> Sequence[int]:
    match body.prompt, body.messages:
        case str(text), None:
            return chats.tokenizer.encode(text, body.add_special_tokens is not False)
        case None, [*messages]:
            prompt = chats.prompt(messages, ToolUse.read(body.tools, None), body)
            return chats.expanded(prompt)
    raise refuse("prompt", body.prompt, "a text, or messages instead")


def _card(state: ServerState) -> Content:
    card: Content = {
        "id": state.model_name, "object": "model", "created": state.created,
        "owned_by": "dp-runtime",
    }  # fmt: skip
    if not state.starting:
        card["max_model_len"] = state.engine.model.max_model_len
    return card

"""/v1/chat/completions: the assistant's next message."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter
from fastapi.responses import Response

from dp_runtime.server.answers import EventStream, JsonAnswer
from dp_runtime.server.chat.answer import ChatAnswer
from dp_runtime.server.protocol.chat import ChatBody
from dp_runtime.server.protocol.fields import RankHeader
from dp_runtime.server.state import ServerState


def chat_routes(state: ServerState) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def create_chat_completion(body: ChatBody, dp_rank: RankHeader = None) -> Response:
        """Answer a chat."""
        body.pin(dp_rank)
        body.check_fields(state.config.unknown_fields)
        state.check_model(body.model)
        body.check_choices(1, state.config.max_choices)
        body.check_answer()
        chats = state.chats
        prompt = await state.render(partial(chats.prompt_of, body), body.messages)
        job = await state.start(body, "chatcmpl", [prompt.for_engine], prompt.form)
        answer = ChatAnswer(state, chats, body, prompt, job)
        if body.stream:
            return EventStream(answer.events(), state.client_of(job))
        return JsonAnswer(answer.whole, state.client_of(job))

    return routes

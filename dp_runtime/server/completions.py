"""/v1/completions: prompts continued as they are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from dp_runtime.core.request import FinishReason, Prompt, RequestDelta, RequestOutput, TokenLogprob
from dp_runtime.engine.async_handle import AsyncRequestHandle
from dp_runtime.server.answers import EventStream, JsonAnswer, as_json
from dp_runtime.server.jobs import Job, stop_reason
from dp_runtime.server.logprobs import CompletionLogprobs, TokenNames, named_logprobs
from dp_runtime.server.protocol.completions import CompletionBody
from dp_runtime.server.protocol.fields import RankHeader
from dp_runtime.server.routed_experts import encoded_experts
from dp_runtime.server.state import ServerState
from dp_runtime.server.usage import Usage

Content = dict[str, Any]


def completion_routes(state: ServerState) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def create_completion(body: CompletionBody, dp_rank: RankHeader = None) -> Response:
        """Continue a prompt, or each of several."""
        body.pin(dp_rank)
        body.check_fields(state.config.unknown_fields)
        state.check_model(body.model)
        body.check_choices(len(body.prompts), state.config.max_choices)
        job = await state.start(body, "cmpl", body.prompts, body.form)
        answer = CompletionAnswer(state, body, job)
        if body.stream:
            return EventStream(answer.events(), state.client_of(job))
        return JsonAnswer(answer.whole, state.client_of(job))

    return routes


@dataclass(frozen=True, eq=False)
class CompletionAnswer:
    """Turns the outputs of a job into the answer, as a whole or chunk by chunk."""

    state: ServerState
    body: CompletionBody
    job: Job

    async def whole(self) -> bytes:
        outputs = await self.job.outputs()
        lengths = enumerate(len(output.token_ids) for output in outputs)
        num_entries = sum(self.job.num_entries(*each, True) for each in lengths)
        return await self.state.encoded(partial(self._whole, outputs), num_entries)

    def _whole(self, outputs: Sequence[RequestOutput]) -> Content:
        choices = [self.choice(index).whole(output) for index, output in enumerate(outputs)]
        num_tokens = 0 if self.body.only_scores else sum(len(each.token_ids) for each in outputs)
        return self._envelope(choices) | {"usage": self._usage(num_tokens)}

    async def events(self) -> AsyncIterator[bytes]:
        choices = [self.choice(index) for index in range(len(self.job.handles))]
        num_tokens = 0
        async for index, delta in self.job.deltas():
            num_tokens += 0 if self.body.only_scores else len(delta.token_ids)
            first = not choices[index].begun
            num_entries = self.job.num_entries(index, len(delta.token_ids), first)
            make = partial(self._event, choices[index], delta, num_tokens)
            yield await self.state.encoded(make, num_entries)
        if self.body.with_usage:
            yield as_json(self._envelope([]) | {"usage": self._usage(num_tokens)})

    def _event(self, choice: CompletionChoice, delta: RequestDelta, num_tokens: int) -> Content:
        content = self._envelope([choice.chunk(delta)])
        if self.body.with_usage:
            content["usage"] = None
        if self.body.with_usage_in_each_chunk:
            content["usage"] = self._usage(num_tokens)
        return content

    def _usage(self, num_tokens: int) -> Content:
        return Usage(self.job.num_prompt_tokens, num_tokens, self.job.num_cached_tokens).body

    def _envelope(self, choices: list[Content]) -> Content:
        return {
            "id": self.job.id, "object": "text_completion", "created": self.job.created,
            "model": self.state.model_name, "choices": choices,
        }  # fmt: skip

    def choice(self, index: int) -> CompletionChoice:
        number = index // self.job.choices_per_prompt
        return CompletionChoice(
            index, self.body, self.job.handles[index], self.body.prompts[number],
            TokenNames(self.state.tokenizer, self.body.return_tokens_as_token_ids),
        )  # fmt: skip


class CompletionChoice:
    """One choice, delta by delta; the first brings the prompt where that is wanted."""

    def __init__(
        self,
        index: int,
        body: CompletionBody,
        handle: AsyncRequestHandle,
        prompt: Prompt,
        names: TokenNames,
    ) -> None:
        self._index, self._body, self._handle = index, body, handle
        self._prompt, self._names = prompt, names
        self._logprobs = CompletionLogprobs(names, body.logprobs or 0)
        self.begun = False

    def whole(self, output: RequestOutput) -> Content:
        delta = RequestDelta(
            output.request_id, output.text, output.token_ids, output.finish_reason, output.logprobs
        )
        return self.chunk(delta)

    def chunk(self, delta: RequestDelta) -> Content:
        first, self.begun = not self.begun, True
        body, reason = self._body, delta.finish_reason
        if body.only_scores:
            delta = replace(delta, text="", token_ids=(), logprobs=())
            reason = FinishReason.LENGTH if reason is FinishReason.STOP else reason
        echoes = first and body.echo
        content = {
            "index": self._index,
            "text": self._prompt_text + delta.text if echoes else delta.text,
            "logprobs": self._logprobs_of(delta, echoes),
            "finish_reason": reason,
            "stop_reason": stop_reason(self._handle) if reason else None,
        }
        if body.return_token_ids:
            content["token_ids"] = delta.token_ids
            if first:
                content["prompt_token_ids"] = self._handle.request.prompt_token_ids
        if reason and body.return_routed_experts:
            content["routed_experts"] = encoded_experts(self._handle)
        if first and body.prompt_logprobs is not None:
            content["prompt_logprobs"] = named_logprobs(self._prompt_entries, self._names)
        return content

    @property
    def _prompt_text(self) -> str:
        token_ids = self._handle.request.prompt_token_ids
        return self._prompt if isinstance(self._prompt, str) else self._names.text(token_ids)

    @property
    def _prompt_entries(self) -> list[TokenLogprob | None]:
        return [None, *self._handle.prompt_logprobs]

    def _logprobs_of(self, delta: RequestDelta, echoes: bool) -> Content | None:
        if self._body.logprobs is None:
            return None
        entries = [*self._prompt_entries] if echoes else []
        token_ids = self._handle.request.prompt_token_ids if echoes else ()
        return self._logprobs.part(
            (*token_ids, *delta.token_ids), [*entries, *(delta.logprobs or ())]
        )

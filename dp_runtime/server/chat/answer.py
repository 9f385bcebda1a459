"""ChatAnswer: the outputs of a chat's job as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from dp_runtime.core.request import RequestDelta, RequestOutput, TokenLogprob
from dp_runtime.server.answers import as_json
from dp_runtime.server.chat.chats import ChatPrompt, Chats
from dp_runtime.server.chat.choice import ChatChoice
from dp_runtime.server.jobs import Job
from dp_runtime.server.logprobs import TokenNames, named_logprobs
from dp_runtime.server.protocol.chat import ChatBody
from dp_runtime.server.state import ServerState
from dp_runtime.server.usage import Usage

Content = dict[str, Any]


@dataclass(frozen=True, eq=False)
class ChatAnswer:
    state: ServerState
    chats: Chats  # the state's own, which it does not give away while the server drains
    body: ChatBody
    prompt: ChatPrompt
    job: Job

    async def whole(self) -> bytes:
        outputs = await self.job.outputs()
        lengths = enumerate(len(output.token_ids) for output in outputs)
        num_entries = sum(self.job.num_entries(*each, True) for each in lengths)
        return await self.state.encoded(partial(self._whole, outputs), num_entries)

    def _whole(self, outputs: Sequence[RequestOutput]) -> Content:
        choices = self._choices()
        contents = [choice.whole(output) for choice, output in zip(choices, outputs)]
        envelope = self._envelope("chat.completion", contents)
        return envelope | self._of_prompt(0) | {"usage": self._usage(choices)}

    async def events(self) -> AsyncIterator[bytes]:
        choices = self._choices()
        begun = False
        async for index, delta in self.job.deltas():
            num_entries = self.job.num_entries(index, len(delta.token_ids), not begun)
            make = partial(self._events, choices, index, delta, not begun)
            for event in await self.state.off_loop(make, num_entries):
                yield event
                begun = True
        if self.body.with_usage:
            yield as_json(self._chunk([]) | {"usage": self._usage(choices)})

    def _events(
        self, choices: Sequence[ChatChoice], index: int, delta: RequestDelta, first: bool
    ) -> list[bytes]:
        events: list[bytes] = []
        # Clients that join deltas expect all choices at first, in order.
        begins = (choice.begin() for choice in choices if first)
        for content in chain(begins, choices[index].chunks(delta)):
            chunk = self._chunk([content])
            if self.body.with_usage:
                chunk["usage"] = None
            if self.body.with_usage_in_each_chunk:
                chunk["usage"] = self._usage(choices)
            if first and not events:
                chunk |= self._of_prompt(index)
            events.append(as_json(chunk))
        return events

    def _choices(self) -> list[ChatChoice]:
        return [
            ChatChoice(index, self.body, self.prompt, self.chats, handle, self._names)
            for index, handle in enumerate(self.job.handles)
        ]

    @property
    def _names(self) -> TokenNames:
        return TokenNames(self.chats.tokenizer, self.body.return_tokens_as_token_ids)

    def _chunk(self, choices: list[Content]) -> Content:
        return self._envelope("chat.completion.chunk", choices)

    def _envelope(self, kind: str, choices: list[Content]) -> Content:
        return {
            "id": self.job.id, "object": kind, "created": self.job.created,
            "model": self.state.model_name, "choices": choices,
        }  # fmt: skip

    def _of_prompt(self, index: int) -> Content:
        """What was asked to be told of the prompt, which the choices share, by one that has it."""
        content: Content = {}
        handle = self.job.handles[index]
        if self.body.return_token_ids:
            content["prompt_token_ids"] = handle.request.prompt_token_ids
        if self.body.prompt_logprobs is not None:
            entries: list[TokenLogprob | None] = [None, *handle.prompt_logprobs]
            content["prompt_logprobs"] = named_logprobs(entries, self._names)
        return content

    def _usage(self, choices: Sequence[ChatChoice]) -> Content:
        reasoning = sum(choice.num_reasoning_tokens for choice in choices)
        return Usage(
            self.job.num_prompt_tokens,
            sum(choice.num_tokens for choice in choices),
            self.job.num_cached_tokens,
            reasoning if self.chats.reasons else None,
        ).body

"""ChatChoice: one choice of a chat, as a whole or delta by delta."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dp_runtime.chat.answer import Answer, AnswerDelta, ToolCallDelta
from dp_runtime.chat.reasoning import ReasoningTokens, Thought
from dp_runtime.core.request import FinishReason, RequestDelta, RequestOutput, TokenLogprob
from dp_runtime.engine.async_handle import AsyncRequestHandle
from dp_runtime.server.chat.chats import ChatPrompt, Chats
from dp_runtime.server.jobs import stop_reason
from dp_runtime.server.logprobs import TokenNames, chat_logprobs
from dp_runtime.server.protocol.chat import ChatBody
from dp_runtime.server.routed_experts import encoded_experts
from dp_runtime.text.text_stream import text_stream

Content = dict[str, Any]


class ChatChoice:
    """Reads the text of one output: what is thought, said and called."""

    def __init__(
        self,
        index: int,
        body: ChatBody,
        prompt: ChatPrompt,
        chats: Chats,
        handle: AsyncRequestHandle,
        names: TokenNames,
    ) -> None:
        self.num_tokens = 0
        self._index, self._body, self._handle, self._names = index, body, handle, names
        self._parser = chats.parser(prompt)
        self._echo = prompt.continued if body.echo else None
        self._reasoning = _counter(chats, prompt, handle) if chats.reasons else None
        self._calls = self._cuts_call = False

    @property
    def num_reasoning_tokens(self) -> int:
        return self._reasoning.count if self._reasoning else 0

    def whole(self, output: RequestOutput) -> Content:
        self._count(output.token_ids)
        end = self._parser.push(output.text), self._parser.finish(_is_cut(output.finish_reason))
        answer = Answer.joined(end)
        self._calls, self._cuts_call = bool(answer.tool_calls), end[1].cuts_call
        choice = {"index": self._index, "message": self._message(answer)}
        choice |= self._of_tokens(output.token_ids, output.logprobs)
        return choice | self._end(output.finish_reason)

    def begin(self) -> Content:
        """The chunk before all others."""
        return self._chunk({"role": "assistant", "content": self._echo or ""})

    def chunks(self, delta: RequestDelta) -> Iterator[Content]:
        """Yield what a delta brings, and the reason of the end after it."""
        self._count(delta.token_ids)
        piece = self._parser.push(delta.text)
        if delta.finish_reason is not None:
            end = self._parser.finish(_is_cut(delta.finish_reason))
            self._cuts_call = end.cuts_call
            piece = AnswerDelta.joined([piece, end])
        self._calls = self._calls or bool(piece.tool_calls)
        of_tokens = self._of_tokens(delta.token_ids, delta.logprobs)
        told = of_tokens.get("logprobs") or "token_ids" in of_tokens
        if piece or (told and delta.token_ids):
            yield self._chunk(_delta(piece)) | of_tokens
        if delta.finish_reason is not None:
            yield self._chunk({}) | self._end(delta.finish_reason)

    def _count(self, token_ids: Sequence[int]) -> None:
        self.num_tokens += len(token_ids)
        if self._reasoning is not None:
            self._reasoning.push(token_ids)

    def _chunk(self, delta: Content) -> Content:
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _message(self, answer: Answer) -> Content:
        content = answer.content if self._echo is None else self._echo + (answer.content or "")
        message: Content = {"role": "assistant", "content": content, "refusal": None}
        if answer.reasoning is not None:
            message |= {"reasoning": answer.reasoning, "reasoning_content": answer.reasoning}
        if answer.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id, "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in answer.tool_calls
            ]  # fmt: skip
        return message

    def _of_tokens(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None
    ) -> Content:
        content: Content = {"logprobs": None}
        if logprobs is not None and self._body.logprobs:
            content["logprobs"] = chat_logprobs(logprobs, self._names, self._body.top_logprobs or 0)
        if self._body.return_token_ids:
            content["token_ids"] = token_ids
        return content

    def _end(self, reason: FinishReason) -> Content:
        stop = stop_reason(self._handle)
        called = self._calls and reason is FinishReason.STOP
        called = called and not (self._cuts_call and stop is not None)  # which was asked for there
        content: Content = {
            "finish_reason": "tool_calls" if called else reason,
            "stop_reason": stop,
        }
        if self._body.return_routed_experts:
            content["routed_experts"] = encoded_experts(self._handle)
        return content


def _is_cut(reason: FinishReason) -> bool:
    return reason is not FinishReason.STOP


def _counter(chats: Chats, prompt: ChatPrompt, handle: AsyncRequestHandle) -> ReasoningTokens:
    request = handle.request
    skips = request.params.skip_special_tokens
    text = text_stream(chats.tokenizer, request.prompt_token_ids, skips)
    return ReasoningTokens(text, prompt.thought is Thought.OPEN)


def _delta(piece: AnswerDelta) -> Content:
    delta: Content = {}
    if piece.reasoning:
        delta |= {"reasoning": piece.reasoning, "reasoning_content": piece.reasoning}
    if piece.content:
        delta["content"] = piece.content
    if piece.tool_calls:
        delta["tool_calls"] = [_call(call) for call in piece.tool_calls]
    return delta


def _call(piece: ToolCallDelta) -> Content:
    if piece.name is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": function}

"""The body of /v1/chat/completions, and what it shares with /tokenize."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from dp_runtime.chat.messages import MAX_ENTRIES
from dp_runtime.core.sampling_params import MAX_LOGPROBS, SamplingParams
from dp_runtime.errors import ContextExceeded
from dp_runtime.server.errors import refuse
from dp_runtime.server.protocol.fields import Body, GenerationBody
from dp_runtime.server.protocol.forms import about_form

MADE_OF_MESSAGES = {"prompt": "messages", "text": "messages"}
Objects = Annotated[list[dict[str, Any]], Field(max_length=MAX_ENTRIES, fail_fast=True)]


class TemplateFields(Body):
    """What becomes of messages on their way to a prompt."""

    tools: Objects | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    reasoning_effort: str | None = Field(None, description="for templates that read it")
    add_generation_prompt: bool | None = Field(None, description="true unless a message goes on")
    continue_final_message: bool = False
    add_special_tokens: bool | None = Field(
        None, description="false for a chat unless set: its template writes them"
    )


class ChatBody(GenerationBody, TemplateFields):
    messages: Objects
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    modalities: list[Literal["text"]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    echo: bool = Field(False, description="repeat the message that goes on")

    def check_answer(self) -> None:
        top, most = self.top_logprobs, MAX_LOGPROBS
        if top is not None and not 0 <= top <= (most if self.logprobs else 0):
            raise refuse("top_logprobs", top, f"an integer in 0..{most}, 0 without logprobs true")
        if self.echo and not self.continue_final_message:
            raise refuse("echo", True, "false unless continue_final_message is true")

    def as_given(self, error: ValueError) -> ValueError:
        if isinstance(error, ContextExceeded):
            return replace(error, field=MADE_OF_MESSAGES.get(error.field, error.field))
        if self.tool_choice not in (None, "auto", "none"):
            return about_form(error, "tools", [tool.get("function") for tool in self.tools or ()])
        return super().as_given(error)

    @property
    def params(self) -> SamplingParams:
        """The sampling parameters; without a limit, the answer may take all the room there is."""
        limit = (
            self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        )
        return self.sampling(
            max_tokens=limit,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )

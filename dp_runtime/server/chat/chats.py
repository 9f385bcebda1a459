"""Chats: how this server's model is talked to."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dp_runtime.chat.answer import AnswerParser
from dp_runtime.chat.forced_calls import after_thought, forced_calls
from dp_runtime.chat.messages import read_messages
from dp_runtime.chat.parsers import Parsers, ReasoningParser, ToolParser
from dp_runtime.chat.reasoning import BEGIN, END, Thought
from dp_runtime.chat.template import ChatTemplate, ChatTemplates, RenderOptions
from dp_runtime.chat.tool_calls import CLOSE, OPEN
from dp_runtime.chat.tools import ToolUse
from dp_runtime.core.request import ImagePrompt, PromptImage
from dp_runtime.core.structured_outputs import StructuredOutputs
from dp_runtime.metrics.status import ModelInfo
from dp_runtime.server.chat.images import ChatImages
from dp_runtime.server.config import ServerConfig
from dp_runtime.server.errors import refuse
from dp_runtime.server.protocol.chat import ChatBody, Objects, TemplateFields
from dp_runtime.structured.grammar import rule_of
from dp_runtime.text.tokenizer import Tokenizer
from dp_runtime.vision.placeholders import expanded

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ChatPrompt:
    """A rendered chat, and how its answers are read."""

    token_ids: Sequence[int]  # with one for each image
    images: Sequence[PromptImage]
    tools: ToolUse
    thought: Thought  # that its end leaves open, or that may follow
    continued: str | None  # the final message's text, which goes on
    form: StructuredOutputs | None = None  # of all that the model writes

    @property
    def for_engine(self) -> Sequence[int] | ImagePrompt:
        return ImagePrompt(self.token_ids, self.images) if self.images else self.token_ids


@dataclass(frozen=True, eq=False)
class Chats:
    """Makes prompts of chats, and parsers of answers to them."""

    templates: ChatTemplates
    parsers: Parsers
    tokenizer: Tokenizer
    config: ServerConfig
    images: ChatImages | None  # None: the model takes none

    @classmethod
    def of(
        cls, model: ModelInfo, instead: str | None, tokenizer: Tokenizer, config: ServerConfig
    ) -> Chats:
        """Compile the templates (ValueError), and choose the parsers."""
        templates = ChatTemplates.read(model.chat, instead)
        parsers = Parsers.choose(config.tool_parser, config.reasoning_parser, templates.text)
        images = ChatImages.of(model, config)
        chats = cls(templates, parsers, tokenizer, config, images)
        chats._warn_of_hidden_tags()
        return chats

    @property
    def reasons(self) -> bool:
        return self.parsers.reasoning is not ReasoningParser.NONE

    def parser(self, prompt: ChatPrompt) -> AnswerParser:
        return self.parsers.new(prompt.tools, prompt.thought is Thought.OPEN)

    def prompt_of(self, body: ChatBody) -> ChatPrompt:
        """Read and render a request's chat (ValueError); it may take a while."""
        tools = ToolUse.read(body.tools, body.tool_choice, body.parallel_tool_calls)
        self.parsers.check(tools)
        if tools.forced and body.form is not None:
            raise refuse("tool_choice", body.tool_choice, "none or auto where text has a form")
        prompt = self.prompt(body.messages, tools, body)
        wanted = body.form
        try:
            return replace(prompt, form=_form(prompt, wanted))
        except ValueError as error:
            raise body.as_given(error) from None

    def prompt(self, messages: Objects, tools: ToolUse, fields: TemplateFields) -> ChatPrompt:
        chat = read_messages(messages, self.config.unknown_fields == "ignore")
        given = [image for message in chat for image in message.images]
        if given and self.images is None:
            raise ValueError(f"{given[0].field}: an image is not allowed; the model reads none")
        template = self._template(fields.chat_template, bool(tools.offered))
        text = template.render(chat, [tool.given for tool in tools.offered], _options(fields))
        continued = chat[-1].text if fields.continue_final_message else None
        thought = Thought.at_end_of(text, continued) if self.reasons else Thought.NONE
        tokens = self.tokenizer.encode(text, fields.add_special_tokens or False)
        images = () if self.images is None else self.images.prepare(given, tokens)
        return ChatPrompt(tokens, images, tools, thought, continued)

    def expanded(self, prompt: ChatPrompt) -> Sequence[int]:
        """Return the tokens that the model gets: as many for an image as it has features."""
        if self.images is None:
            return prompt.token_ids
        return expanded(tuple(prompt.token_ids), prompt.images, self.images.token_id)[0]

    def _template(self, given: str | None, has_tools: bool) -> ChatTemplate:
        if given is None:
            return self.templates.choose(has_tools)
        if not self.config.trust_request_chat_template:
            allowed = "absent: a template is a program, and only --trust-request-chat-template"
            raise refuse("chat_template", given, f"{allowed} lets clients bring one")
        return ChatTemplate.read(given, self.templates.special_tokens, "chat_template")

    @property
    def description(self) -> str:
        names, parsers = ", ".join(self.templates.by_name), self.parsers
        where = "the checkpoint's" if self.config.chat_template is None else "--chat-template"
        told = f"tool calls are read as {parsers.tools}, thoughts as {parsers.reasoning}"
        return f"{where} template ({names}); {told}" if names else f"no template; {told}"

    def _warn_of_hidden_tags(self) -> None:
        parsers = self.parsers
        tags = [OPEN, CLOSE] if parsers.tools is not ToolParser.NONE else []
        tags += [BEGIN, END] if self.reasons else []
        if hidden := set(tags) & set(self.tokenizer.special_tokens.values()):
            logger.warning(
                "%s are special tokens here: they are read with skip_special_tokens false only",
                ", ".join(sorted(hidden)),
            )


def _form(prompt: ChatPrompt, wanted: StructuredOutputs | None) -> StructuredOutputs | None:
    """That of forced calls, or the wanted one, which begins behind a thought."""
    if prompt.tools.forced:
        return StructuredOutputs(grammar=forced_calls(prompt.tools, prompt.thought))
    if wanted is None or prompt.thought is Thought.NONE:
        return wanted
    return StructuredOutputs(grammar=after_thought(rule_of(wanted, "answer"), prompt.thought))


def _options(fields: TemplateFields) -> RenderOptions:
    add, goes_on = fields.add_generation_prompt, fields.continue_final_message
    effort = fields.reasoning_effort
    variables = {} if effort is None else {"reasoning_effort": effort}
    return RenderOptions(
        not goes_on if add is None else add, goes_on, variables | fields.chat_template_kwargs
    )

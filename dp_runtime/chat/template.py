"""ChatTemplate: renders a chat to a prompt, as `apply_chat_template` of transformers does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jinja2 import Template, TemplateError

from dp_runtime.chat.messages import Message
from dp_runtime.chat.sandbox import compile_template
from dp_runtime.core.plain_values import SURROGATES
from dp_runtime.errors import not_allowed, one_line, require, shown
from dp_runtime.metrics.status import DEFAULT_TEMPLATE, TOOL_TEMPLATE, ChatFiles

MAX_CHARS = 64 << 20  # of a prompt
_OWN_VARIABLES = ("messages", "tools", "add_generation_prompt", "continue_final_message")
_OPEN_END = "CONTINUES_FROM_HERE "  # stands where the final message ends; its space may be stripped


@dataclass(frozen=True)
class RenderOptions:
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)  # chat_template_kwargs

    def __post_init__(self) -> None:
        require(
            not (self.add_generation_prompt and self.continue_final_message),
            "continue_final_message", True, "false where add_generation_prompt is true",
        )  # fmt: skip
        for name in _OWN_VARIABLES:
            ok, allowed = name not in self.variables, "a field of its own has this"
            require(ok, f"chat_template_kwargs.{name}", self.variables.get(name), allowed)


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """One template, and the variables that its tokenizer gives to it."""

    source: str
    compiled: Template
    special_tokens: Mapping[str, str]
    in_parts: bool = False  # it reads contents only as lists of parts

    @classmethod
    def read(cls, source: str, special_tokens: Mapping[str, str], where: str) -> ChatTemplate:
        template = cls(source, compile_template(source, where), special_tokens)
        return replace(template, in_parts=template._shows_parts_only())

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        options: RenderOptions | None = None,
    ) -> str:
        """Return the prompt; ValueError if the template does not take the messages."""
        options = options or RenderOptions()
        chat = [self._renamed(message).for_template(self.in_parts) for message in messages]
        if not options.continue_final_message:
            return self._generate(chat, tools, options)
        open_end = isinstance(next(reversed(messages[-1].parts), None), str)
        allowed = "false where the last message has no text at its end"
        require(open_end, "continue_final_message", True, allowed)
        final = _opened(chat[-1])
        return _cut(self._generate(chat, tools, options), final)

    def _renamed(self, message: Message) -> Message:
        """Developers took the place of the system, and most templates don't know of them."""
        if message.role == "developer" and "developer" not in self.source:
            return replace(message, role="system")
        return message

    def _generate(
        self,
        chat: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        options: RenderOptions,
    ) -> str:
        variables = {"documents": None, **self.special_tokens, **options.variables}
        variables |= {"messages": chat, "tools": list(tools) or None}
        variables["add_generation_prompt"] = options.add_generation_prompt
        pieces: list[str] = []
        length = 0
        try:
            for piece in self.compiled.generate(variables):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_CHARS:
                    break
        except Exception as error:  # a template may fail in any way at what it did not expect
            raise _refused(error) from None
        require(length <= MAX_CHARS, "messages", f"{length:,} characters", f"at most {MAX_CHARS:,}")
        text = "".join(pieces)
        require(not SURROGATES.search(text), "messages", text[:40], "no half of a surrogate pair")
        return text

    def _shows_parts_only(self) -> bool:
        probe = Message("user", ("PROBE",), {})
        return not self._shows(probe.for_template(False)) and self._shows(probe.for_template(True))

    def _shows(self, message: Mapping[str, Any]) -> bool:
        try:
            return "PROBE" in self._generate([message], (), RenderOptions())
        except ValueError:
            return False


@dataclass(frozen=True, eq=False)
class ChatTemplates:
    """The templates of a checkpoint, or the one that is used instead."""

    by_name: Mapping[str, ChatTemplate]
    special_tokens: Mapping[str, str]

    @classmethod
    def read(cls, files: ChatFiles, instead: str | None = None) -> ChatTemplates:
        """Compile all templates; ValueError for one that is not Jinja."""
        sources = files.templates if instead is None else {DEFAULT_TEMPLATE: instead}
        tokens = files.special_tokens
        read = {
            name: ChatTemplate.read(source, tokens, "chat_template")
            for name, source in sources.items()
        }
        return cls(read, tokens)

    @property
    def text(self) -> str:
        return "\n".join(template.source for template in self.by_name.values())

    def choose(self, has_tools: bool) -> ChatTemplate:
        if has_tools and TOOL_TEMPLATE in self.by_name:
            return self.by_name[TOOL_TEMPLATE]
        if DEFAULT_TEMPLATE in self.by_name:
            return self.by_name[DEFAULT_TEMPLATE]
        allowed = (
            "a model with a chat template: this one's tokenizer_config.json has "
            f"{', '.join(self.by_name) or 'none'}; serve it with --chat-template FILE, or use "
            "/v1/completions"
        )
        raise not_allowed("messages", "a chat", allowed)


def _opened(final: dict[str, Any]) -> str:
    """Mark the end of the final message in place, and return its text."""
    content = final["content"]
    if isinstance(content, str):
        final["content"] = content + _OPEN_END
        return content
    text: str = content[-1]["text"]
    content[-1]["text"] = text + _OPEN_END
    return text


def _cut(rendered: str, final: str) -> str:
    """Cut a prompt where its final message ends, also where the template strips messages."""
    end = rendered.rfind(_OPEN_END.strip())
    allowed = "false: the chat template does not show the last message as it is"
    require(end >= 0 and final.strip() in rendered, "continue_final_message", True, allowed)
    kept = rendered[:end]
    return kept if rendered.startswith(_OPEN_END, end) else kept.rstrip()


def _refused(error: Exception) -> ValueError:
    if type(error) is TemplateError:  # from its raise_exception
        return ValueError(one_line(f"messages: the chat template refuses them: {error}"))
    reason = f"{type(error).__name__}: {shown(str(error), 400)}"
    return ValueError(one_line(f"messages: the chat template can't render them: {reason}"))

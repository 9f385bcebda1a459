"""Which parsers a model's answers need: by name, or as its chat template writes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from dp_runtime.chat.answer import AnswerParser, PlainAnswer
from dp_runtime.chat.hermes import HermesCall
from dp_runtime.chat.qwen_xml import QwenXmlCall
from dp_runtime.chat.reasoning import BEGIN, ReasoningSplitter
from dp_runtime.chat.tool_calls import OPEN, ToolCalls
from dp_runtime.chat.tools import ToolUse
from dp_runtime.errors import require


class ToolParser(StrEnum):
    NONE = "none"
    HERMES = "hermes"
    QWEN_XML = "qwen_xml"


class ReasoningParser(StrEnum):
    NONE = "none"
    THINK = "think"


@dataclass(frozen=True)
class Parsers:
    tools: ToolParser
    reasoning: ReasoningParser

    @classmethod
    def choose(cls, tools: str, reasoning: str, template: str) -> Parsers:
        """Take the named ones; "auto" is what the text of the chat template shows."""
        return cls(
            _tools_of(template) if tools == "auto" else ToolParser(tools),
            _reasoning_of(template) if reasoning == "auto" else ReasoningParser(reasoning),
        )

    def check(self, use: ToolUse) -> None:
        """Raise ValueError if the model may call tools, and no parser would see it."""
        ok = bool(use.forced) or not use.offered or self.tools is not ToolParser.NONE
        allowed = "none or required: no --tool-parser is set, and the chat template shows none"
        require(ok, "tool_choice", "auto", allowed)

    def new(self, use: ToolUse, in_reasoning: bool) -> AnswerParser:
        """A parser for one answer; forced calls are written as Hermes', whatever the model's."""
        answer: AnswerParser = PlainAnswer()
        if use.forced or (use.offered and self.tools is ToolParser.HERMES):
            answer = ToolCalls(HermesCall, use.max_calls, forced=bool(use.forced))
        elif use.offered and self.tools is ToolParser.QWEN_XML:
            tools = {tool.name: tool for tool in use.offered}
            answer = ToolCalls(lambda: QwenXmlCall(tools), use.max_calls)
        if self.reasoning is ReasoningParser.THINK:
            return ReasoningSplitter(answer, in_reasoning)
        return answer


def _tools_of(template: str) -> ToolParser:
    if "<function=" in template and "<parameter=" in template:
        return ToolParser.QWEN_XML
    hermes = OPEN in template and "arguments" in template
    return ToolParser.HERMES if hermes else ToolParser.NONE


def _reasoning_of(template: str) -> ReasoningParser:
    return ReasoningParser.THINK if BEGIN in template else ReasoningParser.NONE

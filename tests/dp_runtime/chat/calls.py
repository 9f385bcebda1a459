"""Answers with calls in both formats."""

from __future__ import annotations

from dp_runtime.chat.answer import Answer, AnswerParser, ToolCall
from dp_runtime.chat.parsers import Parsers, ReasoningParser, ToolParser
from dp_runtime.chat.tools import ToolUse

PARAMETERS = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "ratio": {"type": "number"},
        "flag": {"type": "boolean"},
        "items": {"type": "array"},
        "either": {"anyOf": [{"type": "string"}, {"type": "null"}, {"type": "integer"}]},
        "color": {"$ref": "#/$defs/Color"},
        "loop": {"$ref": "#/properties/loop"},
        "size": {"enum": [1, 2]},
        "any": {},
    },
    "$defs": {"Color": {"enum": ["red", "5"]}},
}
USE = ToolUse.read(
    [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}], "auto"
)


def hermes() -> AnswerParser:
    return Parsers(ToolParser.HERMES, ReasoningParser.NONE).new(USE, False)


def qwen_xml() -> AnswerParser:
    return Parsers(ToolParser.QWEN_XML, ReasoningParser.NONE).new(USE, False)


def answer(content: str | None, *calls: tuple[str, str]) -> Answer:
    return Answer(None, content, tuple(ToolCall("", name, text) for name, text in calls))


def xml(**parameters: str) -> str:
    inner = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in parameters.items())
    return f"<tool_call>\n<function=f>\n{inner}</function>\n</tool_call>"


A_CALL = '<tool_call>\n{"name": "f", "arguments": {"a": [1, {"b": "}\\""}]}}\n</tool_call>'
ARGUMENTS = '{"a": [1, {"b": "}\\""}]}'

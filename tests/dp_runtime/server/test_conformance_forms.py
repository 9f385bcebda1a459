"""Forms, tool calls and thoughts through the openai client, in every way that it has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field

from tests.dp_runtime.server.openai_calls import ChatCompletions, Completions, Content
from tests.dp_runtime.server.served import MODEL, Served, serving
from tests.structured_cases import chain

TEMPLATE = """\
{%- for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}
{{- 'assistant: <think></think>' }}{#- <tool_call> with arguments #}"""
CHAT: Any = [{"role": "user", "content": "Where?"}]


class City(StrEnum):
    KOELN = "Köln"
    ULM = "Ulm"


class Forecast(BaseModel):
    """Tell the weather."""

    city: City
    days: int = Field(ge=0, le=9)


SCHEMA = {
    "type": "object", "properties": {"days": {"type": "integer", "maximum": 9, "minimum": 0}},
    "required": ["days"], "additionalProperties": False,
}  # fmt: skip
FORMS: dict[str, tuple[Content, str]] = {
    "json_object": (
        {"response_format": {"type": "json_object"}, "logit_bias": {"93": 50}}, r"\{.*\}",
    ),
    "json_schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        r'\{\s*"days"\s*:\s*[0-9]\s*\}',
    ),
    "text": ({"response_format": {"type": "text"}, "max_tokens": 4, "ignore_eos": True}, r".*"),
    "json": ({"structured_outputs": {"json": SCHEMA}}, r'\{\s*"days"\s*:\s*[0-9]\s*\}'),
    "regex": ({"structured_outputs": {"regex": "[0-9]{3}-[a-f]{2}"}}, "[0-9]{3}-[a-f]{2}"),
    "choice": ({"structured_outputs": {"choice": ["yes", "nö"]}}, "yes|nö"),
    "grammar": ({"structured_outputs": {"grammar": 'start: "x" ("y" | "z")'}}, "x[yz]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    template: Path = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    with serving({"chat_template": str(template)}, dp_size=1) as running:
        yield running
        running.check_idle()


@pytest.fixture(scope="module")
def calls(served: Served) -> ChatCompletions:
    return ChatCompletions(served)


@pytest.fixture(scope="module")
def texts(calls: ChatCompletions) -> dict[str, list[tuple[str, str]]]:
    """In each form a chat's and a completion's text, and the reason of its end."""
    common = {"max_tokens": 100, "seed": 1, "temperature": 0.5}
    fields = {name: common | own for name, (own, _) in FORMS.items()}
    chats = calls.all_in_every_way({n: {"messages": CHAT} | own for n, own in fields.items()})
    prompts = {n: {"prompt": "Where? "} | own for n, own in fields.items()}
    plain = Completions(calls.served).all_in_every_way(prompts)
    found: dict[str, list[tuple[str, str]]] = {}
    for name in FORMS:
        chat, text = chats[name]["choices"][0], plain[name]["choices"][0]
        found[name] = [
            (chat["message"]["content"], chat["finish_reason"]),
            (text["text"], text["finish_reason"]),
        ]
    return found


@pytest.mark.parametrize("name", FORMS)
def test_a_text_has_the_form_that_was_asked_for(
    texts: dict[str, list[tuple[str, str]]], name: str
) -> None:
    for text, reason in texts[name]:
        assert re.fullmatch(FORMS[name][1], text, re.DOTALL)
        assert reason == ("length" if name == "text" else "stop")
        if name.startswith("json"):
            assert isinstance(json.loads(text), dict)


def test_the_client_parses_answers_and_calls(calls: ChatCompletions) -> None:
    request: Content = {"model": MODEL, "messages": CHAT, "max_tokens": 100, "temperature": 0}
    chats = calls.client.chat.completions
    answer: Any = chats.parse(**request, response_format=Forecast).choices[0].message
    assert isinstance(answer.parsed, Forecast)
    tools = [openai.pydantic_function_tool(Forecast)]
    forced: Content = request | {"tools": tools, "tool_choice": "required"}
    forced["parallel_tool_calls"] = False
    with chats.stream(**forced) as stream:
        streamed: Any = stream.get_final_completion().choices[0]
    parsed: Any = chats.parse(**forced).choices[0]
    for choice in (parsed, streamed):
        assert choice.finish_reason == "tool_calls"
        [call] = choice.message.tool_calls
        assert (call.type, call.function.name) == ("function", "Forecast")
        assert isinstance(call.function.parsed_arguments, Forecast)


def test_calls_are_the_same_in_every_way(calls: ChatCompletions) -> None:
    tool: Any = openai.pydantic_function_tool(Forecast)
    request: Content = {
        "messages": CHAT, "tools": [tool], "max_tokens": 200, "seed": 2, "n": 2, "logprobs": True,
        "parallel_tool_calls": False,
    }  # fmt: skip
    named = {"type": "function", "function": {"name": "Forecast"}}
    requests = {str(choice): request | {"tool_choice": choice} for choice in ("required", named)}
    for answer in calls.all_in_every_way(requests).values():
        for each in answer["choices"]:
            [call] = each["message"]["tool_calls"]
            Forecast.model_validate_json(call["function"]["arguments"])
            assert (each["message"]["content"], each["finish_reason"]) == (None, "tool_calls")


def test_thoughts_have_both_of_their_names_and_are_counted(calls: ChatCompletions) -> None:
    form = {"structured_outputs": {"choice": ["<think>hm, I</think>Yes"]}}
    answer = calls.in_every_way({"messages": CHAT, "max_tokens": 50} | form)
    message = answer["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] == "hm, I"
    assert message["content"] == "Yes"
    details = answer["usage"]["completion_tokens_details"]
    assert 0 < details["reasoning_tokens"] < answer["usage"]["completion_tokens"]


def schema_of(schema: Content) -> Content:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


BAD: dict[str, tuple[Content, str]] = {
    "type": ({"response_format": {"type": "xml"}}, "response_format"),
    "schema": (
        {"response_format": schema_of({"type": "cat"})},
        "response_format",
    ),
    "large schema": ({"response_format": schema_of(chain(9000))}, "response_format"),
    "schema that crashes": ({"response_format": schema_of(chain(2000))}, "response_format"),
    "regex": ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    "two": ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    "unknown": ({"structured_outputs": {"yaml": "a"}}, "structured_outputs"),
    "tool": ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    "no such tool": (
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tool_choice.function.name",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_form_that_can_not_be_had_is_refused(calls: ChatCompletions, name: str) -> None:
    fields, param = BAD[name]
    with pytest.raises(openai.BadRequestError) as caught:
        calls.whole(messages=CHAT, max_tokens=5, **fields)
    assert caught.value.param == param

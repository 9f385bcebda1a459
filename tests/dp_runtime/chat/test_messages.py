"""What a chat may hold, and what the error says where it may not."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_runtime.chat.messages import MAX_ENTRIES, read_messages
from dp_runtime.chat.template import ChatTemplate
from dp_runtime.chat.tools import ToolUse, read_tools
from tests.dp_runtime.chat.templates import QWEN3

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
DEEP = "[" * 100_000


def in_template(message: dict[str, Any], in_parts: bool = False) -> dict[str, Any]:
    return read_messages([message])[0].for_template(in_parts)


def test_nulls_are_as_absent() -> None:
    given = {"role": "user", "content": "x", "name": None, "tool_calls": None, "refusal": None}
    assert in_template(given) == {"role": "user", "content": "x"}


def test_content_is_a_text_or_a_list_of_parts() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "x"}]}
    assert in_template(message)["content"] == "x"
    assert in_template(message, in_parts=True)["content"] == [{"type": "text", "text": "x"}]
    assert in_template({"role": "assistant", "content": None})["content"] == ""
    assert in_template({"role": "assistant", "content": None}, in_parts=True)["content"] == []


def test_images_are_parts_of_their_own() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": "data:1"},
        {"type": "image_url", "image_url": {"url": "data:2", "detail": "low"}},
        {"type": "text", "text": "b"},
    ]
    (message,) = read_messages([{"role": "user", "content": parts}])
    assert [(one.field, one.url) for one in message.images] == [
        ("messages[0].content[1]", "data:1"), ("messages[0].content[2]", "data:2"),
    ]  # fmt: skip
    assert message.text == "a\nb"
    shown = [{"type": "image"}, {"type": "image"}]
    assert message.for_template(False)["content"] == [parts[0], *shown, parts[3]]


def test_arguments_are_objects_if_they_can_be() -> None:
    def arguments(given: object) -> object:
        call = {"function": {"name": "f", "arguments": given}}
        shown = in_template({"role": "assistant", "tool_calls": [call]})
        return shown["tool_calls"][0]["function"]["arguments"]

    assert arguments('{"a": [1]}') == arguments({"a": [1]}) == {"a": [1]}
    assert arguments("") == {}
    assert [arguments(text) for text in ('{"a": ', "[1]", DEEP)] == ['{"a": ', "[1]", DEEP]


def test_what_the_assistant_thought_has_the_names_that_templates_read() -> None:
    for name in ("reasoning", "reasoning_content"):
        shown = in_template({"role": "assistant", "content": "x", name: "hm"})
        assert shown["reasoning_content"] == shown["thinking"] == "hm"


def test_answers_can_be_sent_back() -> None:
    """As the openai client dumps them."""
    answer = {
        "role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None,
        "function_call": None, "tool_calls": [CALL], "reasoning": "hm", "reasoning_content": "hm",
    }  # fmt: skip
    call = CALL | {"function": {"name": "f", "arguments": {"a": [1]}}}
    assert in_template(answer)["tool_calls"] == [call]


BAD_MESSAGES: dict[str, tuple[Any, str]] = {
    "not a list": ("hi", r"messages: 'hi' .* a list"),
    "empty": ([], "messages: .* at least one"),
    "too many": ([{}] * (MAX_ENTRIES + 1), f"messages: '{MAX_ENTRIES + 1} entries' .* at most"),
    "not an object": (["hi"], r"messages\[0\]: 'hi' .* an object"),
    "role": ([{"role": "king", "content": ""}], r"messages\[0\]\.role: 'king' .* system, dev"),
    "unhashable role": ([{"role": [], "content": ""}], r"messages\[0\]\.role: \[\] "),
    "no role": ([{"content": ""}], r"messages\[0\]\.role: None "),
    "no content": ([{"role": "user"}], r"messages\[0\]\.content: None "),
    "number": ([{"role": "user", "content": 5}], r"messages\[0\]\.content: 5 "),
    "unknown field": ([{"role": "user", "content": "", "x": 1}], r"messages\[0\]\.x: 1 .* known"),
    "sound": (
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
        r"messages\[0\]\.content\[0\]: 'input_audio' is not supported: parts are text, and image",
    ),
    "image without url": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        r"messages\[0\]\.content\[0\]\.image_url\.url: None ",
    ),
    "part without type": ([{"role": "user", "content": [{}]}], r"messages\[0\]\.content\[0\]: "),
    "part without text": (
        [{"role": "user", "content": [{"type": "text"}]}],
        r"messages\[0\]\.content\[0\]\.text: ",
    ),
    "calls": ([{"role": "assistant", "tool_calls": {}}], r"messages\[0\]\.tool_calls: "),
    "call without function": (
        [{"role": "assistant", "tool_calls": [{}]}],
        r"messages\[0\]\.tool_calls\[0\]\.function: None ",
    ),
    "id": ([{"role": "tool", "content": "", "tool_call_id": 5}], r"messages\[0\]\.tool_call_id"),
    "reasoning": ([{"role": "assistant", "reasoning": []}], r"messages\[0\]\.reasoning"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MESSAGES)
def test_mistakes_name_message_and_part(case: str) -> None:
    given, words = BAD_MESSAGES[case]
    with pytest.raises(ValueError, match=f"^{words}"):
        read_messages(given)


def test_unknown_fields_can_be_ignored() -> None:
    message = read_messages([{"role": "user", "content": "", "x": 1}], ignore_unknown=True)[0]
    assert message.for_template(False) == {"role": "user", "content": ""}


def tool(name: object, **function: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def test_choices_of_tools() -> None:
    tools = [tool("f", description=None, strict=True), tool("g", parameters={"type": "object"})]
    names = {
        str(choice): [[one.name for one in part] for part in (use.offered, use.forced)]
        for choice in (None, "auto", "none", "required", tool("g"))
        if (use := ToolUse.read(tools, choice))
    }
    both = ["f", "g"]
    assert names == {
        "None": [both, []], "auto": [both, []], "none": [[], []], "required": [both, both],
        str(tool("g")): [both, ["g"]],
    }  # fmt: skip
    assert read_tools(tools)[0].given == tool("f", strict=True)
    assert ToolUse.read(tools, tool("g")).max_calls == 1
    assert ToolUse.read(tools, "auto", parallel=False).max_calls == 1
    assert ToolUse.read(None, None).offered == ToolUse.read([], "auto").offered == ()


BAD_TOOLS: dict[str, tuple[Any, Any, str]] = {
    "not a list": ({}, None, "tools: "),
    "kind": ([{"type": "retrieval"}], None, r"tools\[0\]\.type: 'retrieval' .* function"),
    "no function": ([{"type": "function"}], None, r"tools\[0\]\.function: None"),
    "name": ([tool("<x>")], None, r"tools\[0\]\.function\.name: '<x>'"),
    "same name": ([tool("f"), tool("f")], None, "tools: .* each name once"),
    "parameters": ([tool("f", parameters=[])], None, r"tools\[0\]\.function\.parameters: "),
    "choice": ([tool("f")], "any", "tool_choice: 'any' .* none, auto, required or"),
    "other tool": ([tool("f")], tool("g"), r"tool_choice\.function\.name: 'g' .* one of f"),
    "required without tools": ([], "required", "tool_choice: 'required' .* without tools"),
    "named without tools": (None, tool("g"), r"tool_choice\.function\.name: 'g'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TOOLS)
def test_mistakes_in_tools_are_named(case: str) -> None:
    tools, choice, words = BAD_TOOLS[case]
    with pytest.raises(ValueError, match=f"^{words}"):
        ToolUse.read(tools, choice)


KEYS = st.sampled_from(
    ["role", "content", "type", "text", "name", "function", "arguments", "parameters", "tool_calls"]
)
WORDS = st.sampled_from(
    ["user", "assistant", "tool", "text", "function", "f", "{}", "required", ""]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=100, deadline=None)
@given(messages=ANYTHING | st.lists(ANYTHING), tools=ANYTHING | st.lists(ANYTHING), choice=ANYTHING)
def test_whatever_is_given_is_read_or_refused(messages: Any, tools: Any, choice: Any) -> None:
    with suppress(ValueError):
        chat = read_messages(messages)
        ChatTemplate.read(QWEN3, {}, "chat_template").render(chat)
    with suppress(ValueError):
        use = ToolUse.read(tools, choice)
        assert len(use.forced) <= len(use.offered)

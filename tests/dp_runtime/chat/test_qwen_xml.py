"""Calls of Qwen3-Coder."""

from __future__ import annotations

import pytest

from dp_runtime.chat.answer import Answer
from tests.dp_runtime.chat.answers import parsed_anyhow
from tests.dp_runtime.chat.calls import answer, qwen_xml, xml

QWEN_XML: dict[str, tuple[str, Answer]] = {
    "text": (
        "Let's see.\n" + xml(text=' one\n<b>"two"\\n 😀 '),
        answer("Let's see.", ("f", '{"text": " one\\n<b>\\"two\\"\\\\n 😀 "}')),
    ),
    "types": (
        xml(count="5", ratio="5", flag="True", items='["a", {}]', size="2"),
        answer(
            None,
            ("f", '{"count": 5, "ratio": 5, "flag": true, "items": ["a", {}], "size": 2}'),
        ),
    ),
    "either": (
        xml(either="five") + xml(either="5") + xml(either="null") + xml(either="[5]"),
        answer(
            None, ("f", '{"either": "five"}'), ("f", '{"either": 5}'), ("f", '{"either": null}'),
            ("f", '{"either": "[5]"}'),
        ),
    ),
    "texts that look like numbers": (
        xml(text="5", color="5", any="5", other="5", loop="5"),
        answer(None, ("f", '{"text": "5", "color": "5", "any": "5", "other": "5", "loop": "5"}')),
    ),
    "not of its type": (
        xml(count="five", items="[1", ratio="NaN"),
        answer(None, ("f", '{"count": "five", "items": "[1", "ratio": "NaN"}')),
    ),
    "no parameters": (xml(), answer(None, ("f", "{}"))),
    "empty": (xml(text=""), answer(None, ("f", '{"text": ""}'))),
    "line breaks of its own": (xml(text="\n\n"), answer(None, ("f", '{"text": "\\n\\n"}'))),
    "one line": (
        "<tool_call><function=f><parameter=text>a</parameter></function></tool_call>",
        answer(None, ("f", '{"text": "a"}')),
    ),
    "one line break": (
        "<tool_call><function=f><parameter=text>\n</parameter></function></tool_call>",
        answer(None, ("f", '{"text": ""}')),
    ),
    "unknown function": (
        xml(text="5", a="<b>").replace("=f>", "=g>"),
        answer(None, ("g", '{"text": "5", "a": "<b>"}')),
    ),
    "two calls": (
        f"{xml(count='1')}\n{xml(count='2')} so",
        answer(" so", ("f", '{"count": 1}'), ("f", '{"count": 2}')),
    ),
    "tag in prose": ("Write <tool_call> first", answer("Write <tool_call> first")),
    "no function": ("<tool_call>\n<fun>", answer("<tool_call>\n<fun>")),
    "no name": ("<tool_call><function=></tool_call>", answer("<tool_call><function=></tool_call>")),
    "text between": (
        "<tool_call><function=f>oh <parameter=text>a</parameter>",
        answer("oh <parameter=text>a</parameter>", ("f", "{}")),
    ),
    "no end of the function": (
        "<tool_call><function=f><parameter=count>1</parameter></tool_call>",
        answer(None, ("f", '{"count": 1}')),
    ),
    "cut in a text": (
        "<tool_call><function=f><parameter=text>\nab</para",
        answer(None, ("f", '{"text": "ab</para')),
    ),
    "cut in a number": (
        "<tool_call><function=f><parameter=count>\n12</par",
        answer(None, ("f", '{"count": 12</par')),
    ),
    "cut in the function": ("<tool_call>\n<function=f", answer("<tool_call>\n<function=f")),
    "cut between": (
        "<tool_call><function=f><parameter=count>1</parameter><param",
        answer(None, ("f", '{"count": 1')),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", QWEN_XML)
def test_calls_of_qwen_coder(case: str) -> None:
    text, expected = QWEN_XML[case]
    assert parsed_anyhow(qwen_xml, text) == expected

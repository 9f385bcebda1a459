"""Calls of Hermes and Qwen models."""

from __future__ import annotations

import pytest

from dp_runtime.chat.answer import Answer
from tests.dp_runtime.chat.answers import parsed_anyhow
from tests.dp_runtime.chat.calls import A_CALL, ARGUMENTS, answer, hermes

HERMES: dict[str, tuple[str, Answer]] = {
    "text only": ("just <b>text</b>\n", answer("just <b>text</b>\n")),
    "nothing": ("", answer(None)),
    "one call": (A_CALL, answer(None, ("f", ARGUMENTS))),
    "text before": (f"Let's see.\n\n{A_CALL}", answer("Let's see.", ("f", ARGUMENTS))),
    "two calls": (f"{A_CALL}\n{A_CALL}\n", answer(None, ("f", ARGUMENTS), ("f", ARGUMENTS))),
    "text between": (
        f"a {A_CALL} b {A_CALL} c",
        answer("a b c", ("f", ARGUMENTS), ("f", ARGUMENTS)),
    ),
    "no white space": (
        '<tool_call>{"name":"g","arguments":{}}</tool_call>',
        answer(None, ("g", "{}")),
    ),
    "other order": (
        '<tool_call>{"arguments": {"é": "</tool_call>"}, "name": "g"}</tool_call>',
        answer(None, ("g", '{"\\u00e9": "</tool_call>"}')),
    ),
    "arguments in a text": (
        '<tool_call>{"name": "g", "arguments": "{\\"a\\": 1}"}</tool_call>',
        answer(None, ("g", '{"a": 1}')),
    ),
    "no arguments": ('<tool_call>{"name": "g"}</tool_call>', answer(None, ("g", "{}"))),
    "tag in a text": (
        '<tool_call>{"name": "g", "arguments": {"a": "</tool_call><tool_call>"}}</tool_call>',
        answer(None, ("g", '{"a": "</tool_call><tool_call>"}')),
    ),
    "too many brackets": (A_CALL.replace("}}\n", "}}}\n"), answer(None, ("f", ARGUMENTS))),
    "no closing tag": (
        f"{A_CALL.removesuffix('</tool_call>')}{A_CALL}",
        answer(None, ("f", ARGUMENTS), ("f", ARGUMENTS)),
    ),
    "tag in prose": ("Write <tool_call> first, ", answer("Write <tool_call> first, ")),
    "not JSON": ("<tool_call>f(1)</tool_call>", answer("<tool_call>f(1)</tool_call>")),
    "no object": ("<tool_call>[{}]</tool_call>", answer("<tool_call>[{}]</tool_call>")),
    "no name": ('<tool_call>{"a": 1}</tool_call>', answer('<tool_call>{"a": 1}</tool_call>')),
    "name of no text": (
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        answer('<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
    ),
    "arguments of another kind": (
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        answer('<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ),
    "quotes of Python": (
        "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>",
        answer("<tool_call>{'name': 'f', 'arguments': {}}</tool_call>"),
    ),
    "a call in a malformed one": (
        f"x\n<tool_call>{{{A_CALL}",
        answer("x\n<tool_call>{", ("f", ARGUMENTS)),
    ),
    "cut in the tag": ("a <tool_ca", answer("a <tool_ca")),
    "cut in the name": ('a <tool_call>{"name": "f', answer('a <tool_call>{"name": "f')),
    "cut in arguments": (
        A_CALL[: A_CALL.index(ARGUMENTS) + 9],
        answer(None, ("f", ARGUMENTS[:9])),
    ),
    "cut in the closing tag": (A_CALL[:-5], answer(None, ("f", ARGUMENTS))),
    "malformed arguments": (
        '<tool_call>{"name": "f", "arguments": {"a": <b>}}</tool_call>',
        answer("<b>}}</tool_call>", ("f", '{"a": ')),
    ),
    "text behind the arguments": (
        '<tool_call>{"name": "f", "arguments": {"a": 1}, "id": 1}</tool_call>',
        answer(', "id": 1}</tool_call>', ("f", '{"a": 1}')),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HERMES)
def test_calls_of_hermes(case: str) -> None:
    text, expected = HERMES[case]
    assert parsed_anyhow(hermes, text) == expected

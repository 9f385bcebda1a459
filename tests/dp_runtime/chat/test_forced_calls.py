"""What the grammars of forced calls allow, and how it is read."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from dp_runtime.chat.forced_calls import after_thought, forced_calls
from dp_runtime.chat.parsers import Parsers, ReasoningParser, ToolParser
from dp_runtime.chat.reasoning import Thought
from dp_runtime.chat.tools import ToolUse
from dp_runtime.core.structured_outputs import StructuredOutputs
from dp_runtime.structured.grammar import rule_of
from tests.dp_runtime.chat.answers import parsed

TOKENIZER = LLTokenizer(
    Path("examples/tiny_moe/checkpoint/tokenizer.json").read_text(), eos_token=[0]
)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/$defs/B"}},
    "$defs": {"B": {"enum": ["x", 'start: ::= "y\n']}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOLS = [
    {"function": {"name": "f", "parameters": SCHEMA}},
    {"function": {"name": "g.h", "parameters": {"properties": {"c": {"type": "string"}}}}},
    {"function": {"name": "none"}},
]


def allows(grammar: str, text: str) -> bool:
    matcher = LLMatcher(TOKENIZER, LLMatcher.grammar_from_lark(grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    token_ids = TOKENIZER.tokenize_str(text)
    complete: bool = matcher.validate_tokens(token_ids) == len(token_ids)
    return complete and matcher.consume_tokens(token_ids) and matcher.is_accepting()


def call(name: str, **arguments: Any) -> str:
    inner = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{inner}\n</tool_call>"


F, G, NONE = call("f", a=1, b='start: ::= "y\n'), call("g.h", c="</tool_call>"), call("none")
ALLOWED = {
    "required": ("required", True, [F, G, NONE, f"{F}\n{G}\n{F}"]),
    "one": ("required", False, [F, G]),
    "named": ({"type": "function", "function": {"name": "f"}}, True, [F]),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_calls_of_the_chosen_tools_are_all_that_is_allowed(case: str) -> None:
    choice, parallel, texts = ALLOWED[case]
    use = ToolUse.read(TOOLS, choice, parallel)
    grammar = forced_calls(use, Thought.NONE)
    for text in texts:
        assert allows(grammar, text)
        parsers = Parsers(ToolParser.NONE, ReasoningParser.NONE)
        answer = parsed(partial(parsers.new, use, False), [text])
        assert answer.content is None
        assert len(answer.tool_calls) == text.count("<tool_call>\n")
    others = {"", "hi", f"hi {F}", call("f", a=1), call("f", a="1", b="x"), call("none", x=1)}
    others |= {F, G, f"{F}\n{G}\n{F}"} - {*texts}
    assert [text for text in others if allows(grammar, text)] == []


def test_forced_calls_have_no_content_wherever_they_are_cut() -> None:
    new = partial(
        Parsers(ToolParser.NONE, ReasoningParser.NONE).new, ToolUse.read(TOOLS, "required"), False
    )
    text, seen = f"{F}\n{G}", set()
    for size in range(len(text)):
        short = parsed(new, [text[:size]], is_cut=True)
        assert short == parsed(new, list(text[:size]), is_cut=True)
        assert short.content is None
        seen.add(len(short.tool_calls))
        assert [call.name for call in short.tool_calls] == ["f", "g.h"][: len(short.tool_calls)]
    assert seen == {0, 1, 2}


@pytest.mark.parametrize(
    ("thought", "allowed"),
    [
        (Thought.NONE, [F]),
        (Thought.POSSIBLE, [F, f"<think>\nhm {{<b>\n</think>\n\n{F}", f"<think></think>{F}"]),
        (Thought.OPEN, [f"hm\n<think></think>\n{F}", f"</think>{F}"]),
    ],
)
def test_thoughts_come_before(thought: Thought, allowed: list[str]) -> None:
    grammar = forced_calls(ToolUse.read(TOOLS, "required"), thought)
    texts = [F, f"<think>\nhm {{<b>\n</think>\n\n{F}", f"hm\n<think></think>\n{F}", f"</think>{F}"]
    texts.append(f"<think></think>{F}")
    assert {text for text in texts if allows(grammar, text)} >= {*allowed}
    assert not allows(grammar, "hm")


FORMS = {
    "json": (StructuredOutputs(json=SCHEMA), '{"a": 1,\n "b": "x"}'),
    "json_object": (StructuredOutputs(json_object=True), '{"a": []}'),
    "regex": (StructuredOutputs(regex=r"a/b\/c\\d[\n]e{2}|^x"), "a/b/c\\d\nee"),
    "choice": (StructuredOutputs(choice=["yes", 'no"\n']), 'no"\n'),
    "lark": (StructuredOutputs(grammar='start: "a" b\nb: /[0-9]{2}/ "}" '), "a12}"),
    "gbnf": (StructuredOutputs(grammar='root ::= "a" [0-9]+'), "a12"),
}
THOUGHTS = {
    Thought.NONE: "", Thought.POSSIBLE: "<think>\n{</think>\n\n", Thought.OPEN: "a </think>\n",
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("thought", THOUGHTS)
def test_any_form_can_come_behind_a_thought(form: str, thought: Thought) -> None:
    wanted, text = FORMS[form]
    grammar = after_thought(rule_of(wanted, "answer"), thought)
    assert allows(grammar, THOUGHTS[thought] + text)
    assert not allows(grammar, THOUGHTS[thought] + "?")
    assert not allows(grammar, text + "</think>")
    assert allows(grammar, text) == (thought is not Thought.OPEN)

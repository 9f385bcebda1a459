"""Thoughts before an answer, and where a prompt already opens one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_runtime.chat.answer import Answer, AnswerParser, PlainAnswer
from dp_runtime.chat.messages import read_messages
from dp_runtime.chat.parsers import Parsers, ReasoningParser, ToolParser
from dp_runtime.chat.reasoning import ReasoningSplitter, ReasoningTokens, Thought
from dp_runtime.chat.template import ChatTemplate, RenderOptions
from dp_runtime.chat.tools import ToolUse
from dp_runtime.text.text_stream import text_stream
from dp_runtime.text.tokenizer import Tokenizer
from tests.dp_runtime.chat.answers import cut, parsed, parsed_anyhow
from tests.dp_runtime.chat.templates import CHATML, LLAMA3, QWEN3

TOKENIZER = Path("examples/tiny_moe/checkpoint/tokenizer.json")


def closed() -> AnswerParser:
    return ReasoningSplitter(PlainAnswer(), is_open=False)


def opened() -> AnswerParser:
    return ReasoningSplitter(PlainAnswer(), is_open=True)


CLOSED: dict[str, tuple[str, str | None, str | None]] = {
    "thought and answer": ("<think>\nhm, <b>\n\nso\n</think>\n\nYes.\n", "hm, <b>\n\nso", "Yes.\n"),
    "white space before": (" \n<think>hm</think>Yes", "hm", "Yes"),
    "no thought": (" \nYes <think>no</think>", None, " \nYes <think>no</think>"),
    "empty thought": ("<think>\n\n</think>\n\nYes", None, "Yes"),
    "only a thought": ("<think>\nhm\n", "hm", None),
    "nothing": ("", None, None),
    "white space": (" \n", None, " \n"),
    "cut in the first tag": (" <thi", None, " <thi"),
    "cut in the last tag": ("<think>hm\n</thi", "hm\n</thi", None),
    "cut before the answer": ("<think>hm</think>\n\n", "hm", None),
    "only the first": ("<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),
}
OPENED: dict[str, tuple[str, str | None, str | None]] = {
    "thought and answer": ("hm\n</think>\n\nYes", "hm", "Yes"),
    "opened again": ("\n<think>\nhm</think>Yes", "hm", "Yes"),
    "never closed": ("hm <b>\n", "hm <b>", None),
    "white space": ("\n \n", " ", None),
    "cut": ("hm</thin", "hm</thin", None),
}


@pytest.mark.parametrize("case", CLOSED)
def test_a_thought_comes_first(case: str) -> None:
    text, reasoning, content = CLOSED[case]
    assert parsed_anyhow(closed, text) == Answer(reasoning, content, ())


@pytest.mark.parametrize("case", OPENED)
def test_a_thought_that_the_prompt_opened(case: str) -> None:
    text, reasoning, content = OPENED[case]
    assert parsed_anyhow(opened, text) == Answer(reasoning, content, ())


WORDS = ["<think>", "</think>", "<tool_call>", '{"name": "f", "arguments": {}}', "</tool_call>"]


@settings(max_examples=100, deadline=None)
@given(
    text=st.lists(st.sampled_from([*WORDS, "<", "\n", " ", "x", "/"]), max_size=20).map("".join),
    is_open=st.booleans(), cuts=st.lists(st.integers(0, 200), max_size=8),
)  # fmt: skip
def test_pieces_make_no_difference(text: str, is_open: bool, cuts: list[int]) -> None:
    use = ToolUse.read([{"function": {"name": "f"}}], "auto")
    parsers = Parsers(ToolParser.HERMES, ReasoningParser.THINK)
    assert parsed(lambda: parsers.new(use, is_open), cut(text, cuts)) == parsed(
        lambda: parsers.new(use, is_open), [text]
    )


def test_calls_come_after_the_thought() -> None:
    use = ToolUse.read([{"function": {"name": "f"}}], "auto")
    parsers = Parsers(ToolParser.HERMES, ReasoningParser.THINK)
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    answer = parsed(lambda: parsers.new(use, True), [f"{call}?</think>\n{call}"])
    assert (answer.reasoning, answer.content) == (f"{call}?", None)
    assert [one.name for one in answer.tool_calls] == ["f"]


def test_prompts_that_open_or_close_a_thought() -> None:
    ends = {
        "<|im_start|>assistant\n<think>\n": Thought.OPEN,
        "<|im_start|>assistant\n<think>\n\n</think>\n\n": Thought.NONE,
        "<|im_start|>assistant\n": Thought.POSSIBLE,
        "user: what does <think> mean?\nassistant:": Thought.POSSIBLE,
    }
    assert {prompt: Thought.at_end_of(prompt) for prompt in ends} == ends
    continued = {"<think> hm": Thought.OPEN, "<think>a</think> b": Thought.NONE, "a": Thought.NONE}
    assert {text: Thought.at_end_of(f"a: {text}", text) for text in continued} == continued


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        (CHATML, "none", "none"),
        (LLAMA3, "none", "none"),
        (QWEN3, "hermes", "think"),
        ("<tool_call>\n<function=f>\n<parameter=arguments>", "qwen_xml", "none"),
    ],
)
def test_parsers_are_chosen_by_the_template(template: str, tools: str, reasoning: str) -> None:
    assert Parsers.choose("auto", "auto", template) == Parsers(
        ToolParser(tools), ReasoningParser(reasoning)
    )
    given = Parsers.choose("none", "think", template)
    assert given == Parsers(ToolParser.NONE, ReasoningParser.THINK)


def test_tools_that_no_parser_would_see_are_refused() -> None:
    tools = [{"function": {"name": "f"}}]
    parsers = Parsers(ToolParser.NONE, ReasoningParser.NONE)
    with pytest.raises(ValueError, match=r"^tool_choice: 'auto' .*no --tool-parser is set"):
        parsers.check(ToolUse.read(tools, None))
    for choice in ("none", "required"):
        parsers.check(ToolUse.read(tools, choice))
    Parsers(ToolParser.HERMES, ReasoningParser.NONE).check(ToolUse.read(tools, None))


def test_what_was_parsed_renders_as_what_the_model_wrote() -> None:
    """An answer that comes back in the history gives the prompt that its text would give."""
    template = ChatTemplate.read(QWEN3, {}, "chat_template")
    call = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'
    written = f"<think>\nhm\n</think>\n\nSo:\n{call}"
    use = ToolUse.read([{"function": {"name": "f"}}], "auto")
    parsers = Parsers(ToolParser.HERMES, ReasoningParser.THINK)
    answer = parsed(lambda: parsers.new(use, False), [written])
    back = {
        "role": "assistant", "content": answer.content, "reasoning": answer.reasoning,
        "tool_calls": [
            {"function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.tool_calls
        ],
    }  # fmt: skip
    chat = read_messages([{"role": "user", "content": "?"}, back])
    prompt = template.render(chat, (), RenderOptions(add_generation_prompt=False))
    assert prompt.endswith(f"<|im_start|>assistant\n{written}<|im_end|>\n")


@pytest.mark.parametrize("is_open", [False, True])
def test_tokens_of_the_thought_are_those_up_to_its_end(is_open: bool) -> None:
    tokenizer = Tokenizer(TOKENIZER.read_text())
    text = ("" if is_open else "<think>") + "\nhm hm</think>"
    token_ids = tokenizer.encode(text)
    counter = ReasoningTokens(text_stream(tokenizer, (), True), is_open)
    counter.push([*token_ids, *tokenizer.encode("\n\nSo <think> it")])
    assert counter.count == len(token_ids)
    none = ReasoningTokens(text_stream(tokenizer, (), True), False)
    none.push(tokenizer.encode("Yes"))
    assert none.count == 0

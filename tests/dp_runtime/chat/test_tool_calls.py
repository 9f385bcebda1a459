"""What holds of calls in both formats, however their text is cut."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_runtime.chat.hermes import HermesCall
from dp_runtime.chat.parsers import Parsers, ReasoningParser, ToolParser
from dp_runtime.chat.tool_calls import ToolCalls
from dp_runtime.chat.tools import ToolUse
from tests.dp_runtime.chat.answers import cut, deltas_of, parsed, parsed_anyhow
from tests.dp_runtime.chat.calls import A_CALL, answer, hermes, qwen_xml, xml

WORDS = st.lists(
    st.sampled_from(
        [
            "<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=text>",
            "<parameter=items>", "</parameter>", '{"name": "f", "arguments": {', '"a": "', "}", "{",
            '"', "\\", "[", "]", " ", "\n", "x", "<", "😀", ",", ":", "1",
        ]
    ),
    max_size=25,
).map("".join)  # fmt: skip


@pytest.mark.parametrize("new", [hermes, qwen_xml])
@settings(max_examples=80, deadline=None)
@given(text=WORDS, cuts=st.lists(st.integers(0, 200), max_size=8))
def test_pieces_make_no_difference_and_what_is_no_call_is_content(
    new: Any, text: str, cuts: list[int]
) -> None:
    whole = parsed(new, [text])
    assert parsed(new, cut(text, cuts)) == whole
    assert parsed(new, list(text)) == whole
    if not whole.tool_calls:
        assert (whole.content or "") == text


KEY = st.text(max_size=6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEY, inner, max_size=3),
    max_leaves=8,
)
OBJECT = st.dictionaries(KEY, JSON, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    content=st.text(max_size=10), calls=st.lists(OBJECT, max_size=3), ascii_only=st.booleans(),
    cuts=st.lists(st.integers(0, 500), max_size=8),
)  # fmt: skip
def test_arguments_are_what_the_model_wrote(
    content: str, calls: list[dict[str, Any]], ascii_only: bool, cuts: list[int]
) -> None:
    texts = [json.dumps(arguments, ensure_ascii=ascii_only) for arguments in calls]
    written = "\n".join(
        f'<tool_call>\n{{"name": "f", "arguments": {text}}}\n</tool_call>' for text in texts
    )
    shown = (content.rstrip() if calls else content) or None
    assert parsed(hermes, cut(content + written, cuts)) == answer(
        shown, *(("f", text) for text in texts)
    )


@settings(max_examples=60, deadline=None)
@given(
    value=st.text(max_size=12).filter(lambda text: "</parameter>" not in text),
    items=st.lists(JSON, max_size=3), cuts=st.lists(st.integers(0, 500), max_size=8),
)  # fmt: skip
def test_parameters_are_what_the_model_wrote(value: str, items: list[Any], cuts: list[int]) -> None:
    calls = parsed(qwen_xml, cut(xml(text=value, items=json.dumps(items)), cuts)).tool_calls
    assert [json.loads(call.arguments) for call in calls] == [{"text": value, "items": items}]


def test_a_call_streams_its_name_then_its_arguments() -> None:
    for new, text in ((hermes, A_CALL), (qwen_xml, xml(text="some text"))):
        pieces = [piece for delta in deltas_of(new(), list(text)) for piece in delta.tool_calls]
        first, *more = pieces
        assert (first.name, first.index) == ("f", 0)
        assert first.id is not None
        assert first.id.startswith("call_")
        assert len(more) > 8
        assert all(piece.id is None and piece.name is None and piece.arguments for piece in more)


def test_content_is_held_only_where_a_tag_may_begin() -> None:
    parser = hermes()
    assert [parser.push(char).content for char in "a b<c <tool"] == [
        "a", "", " b", "", "<c", "", "", "", "", "", "",
    ]  # fmt: skip
    assert parser.push("s").content == " <tools"


def test_only_the_first_call_where_calls_are_not_parallel() -> None:
    use = ToolUse.read([{"function": {"name": "f"}}], "auto", parallel=False)
    for format_, text in ((ToolParser.HERMES, A_CALL), (ToolParser.QWEN_XML, xml(count="1"))):
        new = partial(Parsers(format_, ReasoningParser.NONE).new, use, False)
        both = parsed_anyhow(new, f"{text}\n{text}")
        assert len(both.tool_calls) == 1


@pytest.mark.parametrize(
    ("new", "call", "name"), [(hermes, A_CALL, '"f",'), (qwen_xml, xml(count="1"), "=f>")]
)
def test_a_call_that_is_cut_before_its_name_is_neither_content_nor_a_call(
    new: Any, call: str, name: str
) -> None:
    known = call.index(name) + len(name)
    for size in range(len("<tool_call>"), known):
        text = f"{call}\nSo:\n{call[:size]}"
        first = parsed(new, [call]).tool_calls
        for pieces in ([text], list(text)):
            cut_short = parsed(new, pieces, is_cut=True)
            assert (cut_short.content, cut_short.tool_calls) == ("\nSo:", first)
    assert len(parsed(new, [f"{call}\n{call[:-20]}"], is_cut=True).tool_calls) == 2
    for size in range(len("<tool_call>")):
        behind = parsed(new, [f"{call}\n{call[:size]}"], is_cut=True)
        assert (behind.content, behind.tool_calls) == (None, first)
    prose = "<tool_call> is how a call beg"
    assert parsed(new, [prose], is_cut=True) == answer(prose)


@pytest.mark.parametrize(
    ("new", "call", "name", "end"),
    [
        (hermes, A_CALL, '"f", "arguments": {"', "}\n</"),
        (qwen_xml, xml(count="1"), "=f>", "\n</too"),
    ],
)
def test_a_call_is_whole_once_its_arguments_are(new: Any, call: str, name: str, end: str) -> None:
    known, whole = call.index(name) + len(name), call.rindex(end)
    for size in range(len(call) + 1):
        *_, last = deltas_of(new(), list(f"So:\n{call[:size]}"))
        assert last.cuts_call == (known <= size < whole)


@pytest.mark.parametrize(("max_calls", "is_told"), [(None, True), (2, True), (1, False)])
def test_a_call_that_is_dropped_is_not_one_that_is_cut(
    max_calls: int | None, is_told: bool
) -> None:
    calls = ToolCalls(HermesCall, max_calls)
    calls.push(A_CALL + A_CALL[: A_CALL.rindex("]")])
    assert calls.finish().cuts_call == is_told


LONG = 100_000
DEGENERATE = {
    "line breaks": "\n" * LONG,
    "line breaks in a call": "<tool_call>" + "\n" * LONG,
    "a name without end": '<tool_call>{"name": "' + "a" * LONG,
    "tags": "<tool_call>" * (LONG // 10),
    "calls in texts": '<tool_call>{"a": "' * (LONG // 20),
    "brackets": '<tool_call>{"name": ' + "[" * LONG,
    "a function without end": "<tool_call><function=" + "a" * LONG,
}


@pytest.mark.parametrize("new", [hermes, qwen_xml])
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_answers_are_content(new: Any, case: str) -> None:
    """Of which a parser that reads all it holds with every piece would make minutes."""
    text = DEGENERATE[case]
    pieces = [text[at : at + 5] for at in range(0, len(text), 5)]
    assert parsed(new, pieces) == parsed(new, [text]) == answer(text)

"""What an answer is made of: thoughts, content and tool calls, also forced ones."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from dp_runtime.server.config import ServerConfig
from dp_runtime.server.http.listener import Listener
from dp_runtime.server.state import ServerState
from tests.dp_runtime.server.served import MODEL, Served, serving

# `opening` is what the answer begins with; closed thoughts let a test choose all that follows.
TEMPLATE = """\
{%- for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}
{%- for tool in tools or [] %}{{ tool.function.name + '\\n' }}{% endfor %}
{{- 'assistant: ' + (opening or '<think></think>') }}
{#- <tool_call> with arguments #}"""
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Köln", "Ulm"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FORECAST = {"type": "function", "function": {"name": "forecast", "parameters": PARAMETERS}}
PING = {"type": "function", "function": {"name": "ping"}}
BODY: dict[str, Any] = {
    "model": MODEL, "messages": [{"role": "user", "content": "?"}], "tools": [FORECAST, PING],
}  # fmt: skip
ARGUMENTS = '{"city": "Köln", "days": 3}'
HERMES = f'<tool_call>\n{{"name": "forecast", "arguments": {ARGUMENTS}}}\n</tool_call>'
XML = (
    "<tool_call>\n<function=forecast>\n<parameter=city>\nKöln\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(TEMPLATE)
    return str(path)


@pytest.fixture(scope="module")
def served(template: str) -> Iterator[Served]:
    with serving({"chat_template": template}, dp_size=1) as running:
        yield running
        running.check_idle()


@pytest.fixture(scope="module")
def xml_served(served: Served, template: str) -> Iterator[str]:
    """The address of a second server of the same engine."""
    config = ServerConfig(port=0, chat_template=template, tool_parser="qwen_xml")
    state = ServerState(config, served.engine.config)
    state.serve(served.engine)
    listener = Listener(state)
    yield listener.url
    listener.close(threading.Event())


def create_at(url: str) -> Any:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    return client.chat.completions.create


@pytest.fixture
def create(served: Served) -> Any:
    return create_at(served.url)


def written(text: str, **more: Any) -> dict[str, Any]:
    """A request whose answer is this text."""
    form = {"structured_outputs": {"choice": [text]}}
    return BODY | {"max_tokens": 300, "extra_body": form} | more


def parts(message: Any) -> tuple[str | None, str | None, list[tuple[str, str]]]:
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    thought = getattr(message, "reasoning", None)
    assert thought == getattr(message, "reasoning_content", None)
    return thought, message.content, calls


def joined(chunks: Sequence[Any]) -> tuple[str | None, str | None, list[tuple[str, str]], str]:
    """The parts that the deltas of one choice make, and the reason of its end."""
    thought, content, reason = "", "", ""
    calls: list[list[str]] = []
    for chunk in chunks:
        for choice in chunk.choices:
            thought += getattr(choice.delta, "reasoning", "")
            content += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for piece in choice.delta.tool_calls or ():
                if piece.id is not None:
                    assert piece.index == len(calls)
                    calls.append([piece.function.name, ""])
                calls[piece.index][1] += piece.function.arguments
    return thought or None, content or None, [(name, text) for name, text in calls], reason


SCRIPTS: dict[str, tuple[str, tuple[str | None, str | None, list[tuple[str, str]]]]] = {
    "content": ("It is <b>.", (None, "It is <b>.", [])),
    "thought": ("<think>\nhm\n</think>\n\nYes", ("hm", "Yes", [])),
    "call": (HERMES, (None, None, [("forecast", ARGUMENTS)])),
    "all": (
        f"<think>é</think>So:\n{HERMES}\n{HERMES}",
        ("é", "So:", [("forecast", ARGUMENTS)] * 2),
    ),
    "no call": (
        "<tool_call>\nforecast</tool_call>",
        (None, "<tool_call>\nforecast</tool_call>", []),
    ),
}


@pytest.fixture(scope="module")
def answers(served: Served) -> dict[str, tuple[Any, list[Any]]]:
    """To each script, whole and in chunks; all are asked for at the same time."""
    create = create_at(served.url)
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    with ThreadPoolExecutor(2 * len(SCRIPTS)) as pool:
        asked = {
            name: (
                pool.submit(create, **written(text)),
                pool.submit(lambda body: list(create(**body)), written(text, **streamed)),
            )
            for name, (text, _) in SCRIPTS.items()
        }
        return {name: (whole.result(), chunks.result()) for name, (whole, chunks) in asked.items()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_parts_of_an_answer_whole_and_streamed(
    answers: dict[str, tuple[Any, list[Any]]], name: str
) -> None:
    _, expected = SCRIPTS[name]
    whole, chunks = answers[name]
    reason = "tool_calls" if expected[2] else "stop"
    assert parts(whole.choices[0].message) == expected
    assert whole.choices[0].finish_reason == reason
    assert joined(chunks) == (*expected, reason)
    assert chunks[-1].usage == whole.usage
    tokens = whole.usage.completion_tokens_details.reasoning_tokens
    assert (0 < tokens < whole.usage.completion_tokens) == (expected[0] is not None)


def test_calls_written_as_xml(xml_served: str) -> None:
    create = create_at(xml_served)
    body = written(f"So:\n{XML}")
    expected = (None, "So:", [("forecast", ARGUMENTS)])
    assert parts(create(**body).choices[0].message) == expected
    assert joined(list(create(**body, stream=True))) == (*expected, "tool_calls")


def test_arguments_come_as_they_are_written(create: Any) -> None:
    chunks = create(**written(HERMES), stream=True)
    pieces = [p for c in chunks for choice in c.choices for p in choice.delta.tool_calls or ()]
    assert len(pieces) > 5
    assert [piece.function.name for piece in pieces] == ["forecast"] + [None] * (len(pieces) - 1)


def test_an_answer_that_is_cut_has_what_was_written(create: Any) -> None:
    for tokens in range(2, 30, 9):
        whole = create(**written(f"<think>hm</think>{HERMES}", max_tokens=tokens))
        chunks = create(**written(f"<think>hm</think>{HERMES}", max_tokens=tokens), stream=True)
        assert whole.choices[0].finish_reason == "length"
        assert joined(list(chunks)) == (*parts(whole.choices[0].message), "length")


@pytest.mark.parametrize(
    ("stop", "expected", "reason"),
    [
        ('name"', (None, '<tool_call>\n{"', []), "stop"),
        ("</tool_call>", (None, None, [("forecast", ARGUMENTS)]), "tool_calls"),
        (ARGUMENTS[3:], (None, None, [("forecast", ARGUMENTS[:3])]), "stop"),
    ],
)
def test_a_stop_string_within_a_call(create: Any, stop: str, expected: Any, reason: str) -> None:
    """What is no call yet stays content, and what is none any more is not said to be called."""
    whole = create(**written(HERMES, stop=stop)).choices[0]
    chunks = list(create(**written(HERMES, stop=stop), stream=True))
    assert parts(whole.message) == expected
    assert (whole.finish_reason, whole.stop_reason) == (reason, stop)
    assert joined(chunks) == (*expected, reason)


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_the_beginning_of_a_call_that_is_cut_is_no_content(create: Any, choice: str) -> None:
    for tokens in range(3, 60, 11):
        body = written(f"{HERMES}\n{HERMES}", max_tokens=tokens)
        if choice == "required":
            body = BODY | {"tool_choice": choice, "max_tokens": tokens, "seed": 3}
        whole, chunks = create(**body).choices[0], list(create(**body, stream=True))
        thought, content, calls = parts(whole.message)
        assert (thought, whole.finish_reason) == (None, "length")
        assert content is None or (choice == "auto" and content in "<tool_call" and not calls)
        assert joined(chunks) == (thought, content, calls, "length")


def test_calls_that_are_not_wanted(create: Any) -> None:
    silent = create(**written(HERMES, tool_choice="none")).choices[0]
    assert (silent.message.content, silent.finish_reason) == (HERMES, "stop")
    one = create(**written(f"{HERMES}\n{HERMES}", parallel_tool_calls=False)).choices[0]
    assert len(one.message.tool_calls) == 1


def check_arguments(name: str, arguments: Any) -> None:
    if name == "ping":
        assert arguments == {}
    else:
        assert set(arguments) == {"city", "days"}
        assert arguments["city"] in ("Köln", "Ulm")
        assert type(arguments["days"]) is int
        assert arguments["days"] <= 9


JSON_OBJECT = {"type": "json_object"}
NAMED = {"type": "function", "function": {"name": "forecast"}}


@pytest.mark.parametrize(("choice", "n"), [("required", 2), (NAMED, 1)])
def test_forced_calls_fit_their_schema(xml_served: str, choice: Any, n: int) -> None:
    """Also where the model's own manner is another."""
    body = BODY | {"tool_choice": choice, "max_tokens": 300, "seed": 3, "n": n}
    body |= {"temperature": 0.7, "parallel_tool_calls": False}
    create = create_at(xml_served)
    whole, chunks = create(**body), list(create(**body, stream=True))
    for one in whole.choices:
        assert one.finish_reason == "tool_calls"
        thought, content, calls = parts(one.message)
        assert thought is content is None
        [(name, arguments)] = calls
        assert name == "forecast" or choice == "required"
        check_arguments(name, json.loads(arguments))
        own = [chunk for chunk in chunks if chunk.choices[0].index == one.index]
        assert joined(own) == (None, None, calls, "tool_calls")


def test_a_thought_that_the_prompt_opens(create: Any) -> None:
    extra = {"chat_template_kwargs": {"opening": "<think>"}, "ignore_eos": True}
    for form in ({}, {"response_format": {"type": "json_object"}}, {"tool_choice": "required"}):
        answer = create(**BODY | form, max_tokens=9, temperature=0, extra_body=extra)
        assert answer.choices[0].message.content is None
        assert answer.choices[0].message.reasoning
        assert answer.usage.completion_tokens_details.reasoning_tokens == 9


def test_an_answer_has_the_form_that_is_asked_for(create: Any) -> None:
    schema = {
        "type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
        "additionalProperties": False,
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "ok", "schema": schema}}
    answer = create(**BODY, response_format=form, max_tokens=60, seed=1)
    assert json.loads(answer.choices[0].message.content)["ok"] in (True, False)
    text = create(**BODY, response_format={"type": "text"}, max_tokens=3, seed=1)
    assert text.choices[0].finish_reason == "length"


def test_completions_have_the_form_that_is_asked_for(served: Served) -> None:
    for form in ({"structured_outputs": {"regex": "[a-c]{3}"}}, {"response_format": JSON_OBJECT}):
        answer = served.post("/v1/completions", prompt="a", max_tokens=40, seed=2, **form).json()
        text = answer["choices"][0]["text"]
        assert re.fullmatch("[a-c]{3}", text) or text.startswith("{")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "schema of a tool": (
        {
            "tools": [
                {"function": {"name": "f", "parameters": {"properties": {"a": {"type": "b"}}}}}
            ],
            "tool_choice": "required",
        },
        "tools",
    ),
    "format": ({"response_format": {"type": "xml"}}, "response_format"),
    "schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
        "response_format",
    ),
    "two forms": (
        {"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}},
        "response_format",
    ),
    "form and forced call": (
        {"response_format": {"type": "json_object"}, "tool_choice": "required"},
        "tool_choice",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_told_with_its_field(served: Served, name: str) -> None:
    fields, param = BAD[name]
    answer = served.post("/v1/chat/completions", **BODY | {"max_tokens": 1} | fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param

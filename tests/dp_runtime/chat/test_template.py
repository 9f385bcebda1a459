"""Prompts of chats, compared with those of transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dp_runtime.chat import template as template_module
from dp_runtime.chat.messages import read_messages
from dp_runtime.chat.template import ChatTemplate, ChatTemplates, RenderOptions
from dp_runtime.metrics.status import ChatFiles
from tests.dp_runtime.chat.templates import ALL, CHATML, IN_PARTS, LLAMA3, MISTRAL, QWEN3

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TEMPLATES = {name: ChatTemplate.read(source, SPECIAL, "template") for name, source in ALL.items()}
ORACLE = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, "?")), **SPECIAL
)
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "wetter",
            "description": "Sagt, wie's <dort> wird & bleibt: 😀",
            "parameters": {"type": "object", "properties": {"ort": {"type": "string"}}},
        },
    }
]
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "wetter", "arguments": {"ort": "Köln"}},
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "user": [{"role": "user", "content": "  Grüß Gott \n"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>"}],
    "turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb "},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d\n"},
    ],
    "calls": [
        {"role": "user", "content": "Wie wird's?"},
        {"role": "assistant", "content": "", "reasoning_content": "ich\n", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "☀"},
        {"role": "tool", "tool_call_id": "call_2", "content": "warm"},
    ],
}


def expected(
    source: str, chat: list[dict[str, Any]], tools: list[dict[str, Any]] | None, **options: Any
) -> str:
    text = ORACLE.apply_chat_template(
        chat, tools=tools, chat_template=source, tokenize=False, **options
    )
    assert isinstance(text, str)
    return text


def both(
    name: str,
    chat: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    **variables: Any,
) -> tuple[str | None, str | None]:
    """Our prompt and transformers', or None where the template refuses the chat."""
    how: dict[str, Any] = {
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
    }
    try:
        ours = TEMPLATES[name].render(
            read_messages(chat), tools, RenderOptions(**how, variables=variables)
        )
    except ValueError:
        ours = None
    if TEMPLATES[name].in_parts:
        chat = [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            for message in chat
        ]
    try:
        return ours, expected(ALL[name], chat, tools or None, **how, **variables)
    except Exception:
        return ours, None


@pytest.mark.parametrize("tools", [[], TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_transformers(
    name: str, chat: str, tools: list[dict[str, Any]]
) -> None:
    rendered = 0
    for variables in ({}, {"enable_thinking": False}, {"date_string": "1 May", "bos_token": "!"}):
        for add in (False, True):
            ours, theirs = both(name, CHATS[chat], tools, add, **variables)
            assert ours == theirs
            rendered += ours is not None
    assert rendered == 6


TEXT = st.text(st.sampled_from("ab <>&'\"\\\n\tß{%}#😀"), max_size=12)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(TEMPLATES)), user=TEXT, system=TEXT, final=TEXT)
def test_any_text_and_an_open_end_are_as_in_transformers(
    name: str, user: str, system: str, final: str
) -> None:
    chat = [
        {"role": "system", "content": system},
        {"role": "user", "content": user},
        {"role": "assistant", "content": final},
    ]
    for how in ({}, {"continue_final_message": True}, {"add_generation_prompt": True}):
        ours, theirs = both(name, chat, [], **how)
        assert ours == theirs


def test_a_final_message_stays_open() -> None:
    chat = read_messages(
        [{"role": "user", "content": "Sing"}, {"role": "assistant", "content": "La "}]
    )
    options = RenderOptions(add_generation_prompt=False, continue_final_message=True)
    assert TEMPLATES["chatml"].render(chat, (), options).endswith("<|im_start|>assistant\nLa ")
    assert TEMPLATES["mistral"].render(chat, (), options).endswith("[/INST] La")
    with pytest.raises(ValueError, match=r"^continue_final_message: .*add_generation_prompt"):
        RenderOptions(add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(ValueError, match=r"^continue_final_message: .* has no text"):
        TEMPLATES["chatml"].render(read_messages([{"role": "assistant"}]), (), options)
    deaf = ChatTemplate.read("{{ messages[0].role }}", {}, "chat_template")
    with pytest.raises(ValueError, match=r"^continue_final_message: .* does not show"):
        deaf.render(chat, (), options)


def test_json_is_not_escaped_as_html_or_ascii() -> None:
    prompt = TEMPLATES["qwen3"].render(read_messages(CHATS["user"]), TOOLS)
    assert json.dumps(TOOLS[0], ensure_ascii=False) in prompt


def test_what_a_template_refuses_is_a_value_error_with_its_words() -> None:
    chat = read_messages([{"role": "assistant", "content": "I first"}])
    with pytest.raises(ValueError, match=r"^messages: the chat template refuses them: .*alternate"):
        TEMPLATES["mistral"].render(chat)
    broken = ChatTemplate.read("{{ messages[0].content.x.y }}", {}, "chat_template")
    with pytest.raises(ValueError, match=r"^messages: the chat template can't render them: Undef"):
        broken.render(chat)
    for source in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"):
        with pytest.raises(ValueError, match="SecurityError"):
            ChatTemplate.read(source, {}, "chat_template").render(chat)


@pytest.mark.parametrize("source", ["{% for %}", "{{ a", "{% if x %}", "{{ x | nofilter }}"])
def test_a_template_that_is_not_jinja_names_its_line(source: str) -> None:
    with pytest.raises(ValueError, match=r"^chat_template: .* is not allowed; .*line 1"):
        ChatTemplate.read(source, {}, "chat_template")


def test_a_prompt_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "MAX_CHARS", 1000)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}spam{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match=r"^messages: .* at most 1,000"):
        ChatTemplate.read(endless, {}, "chat_template").render(read_messages(CHATS["user"]))


def test_deep_variables_are_refused() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    chat, template = read_messages(CHATS["user"]), "{{ deep | tojson }}"
    with pytest.raises(ValueError, match="can't render them: RecursionError"):
        ChatTemplate.read(template, {}, "chat_template").render(
            chat, (), RenderOptions(variables={"deep": deep})
        )


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_variables_do_not_hide_what_has_a_field(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^chat_template_kwargs\.{name}: "):
        RenderOptions(variables={name: []})


@pytest.mark.parametrize("name", ["chatml", "in_parts"])
def test_parts_of_text_are_joined_unless_the_template_reads_parts(name: str) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    prompt = TEMPLATES[name].render(read_messages([{"role": "user", "content": parts}]))
    assert TEMPLATES[name].in_parts == (name == "in_parts")
    assert ("onetwo" if name == "in_parts" else "one\ntwo") in prompt


def test_developers_speak_as_the_system_where_a_template_does_not_know_them() -> None:
    chat = read_messages([{"role": "developer", "content": "x"}])
    assert TEMPLATES["chatml"].render(chat).startswith("<|im_start|>system\nx")
    knows = ChatTemplate.read(CHATML + "{# developer #}", {}, "chat_template")
    assert knows.render(chat).startswith("<|im_start|>developer\nx")


def test_named_templates() -> None:
    both_named = ChatTemplates.read(ChatFiles({"default": CHATML, "tool_use": QWEN3}))
    assert both_named.choose(has_tools=False).source == CHATML
    assert both_named.choose(has_tools=True).source == QWEN3
    given = ChatTemplates.read(ChatFiles({"default": CHATML, "tool_use": QWEN3}), instead=LLAMA3)
    assert given.choose(has_tools=True).source == LLAMA3
    assert ChatTemplates.read(ChatFiles({"default": MISTRAL})).choose(True).source == MISTRAL


@pytest.mark.parametrize("templates", [{}, {"rag": IN_PARTS}])
def test_without_a_template_the_error_says_what_to_do(templates: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"^messages: .* --chat-template FILE, or use /v1/compl"):
        ChatTemplates.read(ChatFiles(templates)).choose(has_tools=False)

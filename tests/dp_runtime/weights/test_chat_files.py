"""What a checkpoint's files say about chats, compared with what transformers reads there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dp_runtime.chat.messages import read_messages
from dp_runtime.chat.template import ChatTemplates
from dp_runtime.metrics.status import ChatFiles
from dp_runtime.weights.chat_files import read_chat_files
from examples.tiny_moe.train import CHAT_TEMPLATE

CHECKPOINT = Path("examples/tiny_moe/checkpoint")


def write(directory: Path, config: Any = None, **files: str) -> Path:
    Tokenizer(models.WordLevel({"?": 0}, "?")).save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        path = directory / {"default": "", "tool_use": "additional_chat_templates"}[name]
        path.mkdir(exist_ok=True)
        (path / f"{'chat_template' if name == 'default' else name}.jinja").write_text(text)
    return directory


NAMED = [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]
BOS = {"content": "<s>", "special": True, "__type": "AddedToken"}
CASES: dict[str, tuple[Any, dict[str, str], ChatFiles]] = {
    "nothing": (None, {}, ChatFiles()),
    "nulls": ({"chat_template": None, "bos_token": None}, {}, ChatFiles()),
    "a text": ({"chat_template": "a"}, {}, ChatFiles({"default": "a"})),
    "named": ({"chat_template": NAMED}, {}, ChatFiles({"default": "a", "rag": "b"})),
    "a file": ({"chat_template": NAMED}, {"default": "ä"}, ChatFiles({"default": "ä"})),
    "two files": (
        {"chat_template": "a"},
        {"default": "b", "tool_use": "c"},
        ChatFiles({"default": "b", "tool_use": "c"}),
    ),
    "tokens": (
        {"bos_token": BOS, "eos_token": "</s>", "image_token": "<i>", "add_bos_token": True},
        {},
        ChatFiles({}, {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<i>"}),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_templates_and_tokens_are_those_that_transformers_reads(case: str, tmp_path: Path) -> None:
    config, files, expected = CASES[case]
    path = write(tmp_path, config, **files)
    assert read_chat_files(str(path)) == expected
    oracle = PreTrainedTokenizerFast.from_pretrained(path)
    theirs = oracle.chat_template or {}
    assert expected.templates == ({"default": theirs} if isinstance(theirs, str) else theirs)
    assert expected.special_tokens == oracle.special_tokens_map


BAD: dict[str, tuple[Any, str]] = {
    "not an object": ([1], r"tokenizer_config\.json: \[1\] .* a JSON object"),
    "template": ({"chat_template": 5}, r"chat_template of tokenizer_config\.json: 5 "),
    "entry": ({"chat_template": [{"name": "default"}]}, "chat_template of .*'name': 'default'"),
    "token": ({"bos_token": 5}, r"bos_token of tokenizer_config\.json: 5 .* a text"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_names_the_file_and_the_field(case: str, tmp_path: Path) -> None:
    config, words = BAD[case]
    with pytest.raises(ValueError, match=f"^{words}"):
        read_chat_files(str(write(tmp_path, config)))


def test_the_tiny_model_s_template_is_the_one_that_it_is_trained_with() -> None:
    files = read_chat_files(str(CHECKPOINT))
    assert files.templates == {"default": CHAT_TEMPLATE}
    chat = read_messages([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
    prompt = ChatTemplates.read(files).choose(has_tools=False).render(chat)
    assert prompt == (
        "<|im_start|>system\na<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    )

"""What a checkpoint recommends holds for the fields that a request leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dp_runtime import SamplingParams
from dp_runtime.cli.model_choice import TINY_MODEL
from dp_runtime.weights.sampling_defaults import read_sampling_defaults
from tests.dp_runtime.server.openai_calls import Content
from tests.dp_runtime.server.served import serving

PROMPT = "Return the"
GIVEN: list[Content] = [
    {}, {"temperature": 0.9}, {"temperature": 0.0, "repetition_penalty": 1.0},
]  # fmt: skip


def model_that_recommends(directory: Path, **values: Any) -> Path:
    for path in TINY_MODEL.iterdir():
        (directory / path.name).symlink_to(path)
    config = directory / "generation_config.json"
    config.unlink()
    config.write_text(json.dumps({"eos_token_id": 0, "do_sample": True} | values))
    return directory


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_a_request_has_the_last_word(tmp_path: Path, choice: str) -> None:
    model = model_that_recommends(tmp_path, temperature=0.0, repetition_penalty=1.5, top_k=None)
    recommended: Content = (
        {"temperature": 0.0, "repetition_penalty": 1.5} if choice == "auto" else {}
    )
    with serving({"generation_config": choice}, model=str(model), dp_size=1) as served:
        for given in GIVEN:
            fields = {"max_tokens": 12, "seed": 4} | given
            params = SamplingParams.from_fields(recommended | fields)
            expected = served.generate([PROMPT], params)[0]
            answer = served.post("/v1/completions", prompt=PROMPT, **fields).json()
            assert answer["choices"][0]["text"] == expected.text


def test_a_recommendation_that_can_not_be_followed_ends_the_start(tmp_path: Path) -> None:
    model = model_that_recommends(tmp_path, temperature="hot")
    expected = "generation_config.json: temperature: 'hot' is not allowed"
    with pytest.raises(ValueError, match=expected), serving(model=str(model), dp_size=1):
        pass


def test_a_checkpoint_need_not_recommend_anything(tmp_path: Path) -> None:
    assert read_sampling_defaults(str(tmp_path)) == {}
    assert read_sampling_defaults(str(TINY_MODEL)) == {}


def test_special_tokens_are_added_to_a_text_and_to_no_chat_unless_told(tmp_path: Path) -> None:
    model = model_that_recommends(tmp_path)
    path = model / "tokenizer.json"
    path.unlink()
    begin = {"SpecialToken": {"id": "b", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "B", "type_id": 0}}],
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"b": {"id": "b", "ids": [7], "tokens": ["b"]}},
    }  # fmt: skip
    given = json.loads((TINY_MODEL / "tokenizer.json").read_text())
    path.write_text(json.dumps(given | {"post_processor": processor}))
    text, chat = {"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}
    short = {"max_tokens": 1, "return_token_ids": True}
    with serving(model=str(model), dp_size=1) as served:
        for said, fields in ((None, {}), (True, {"add_special_tokens": True}),
                             (False, {"add_special_tokens": False})):  # fmt: skip
            tokens = served.post("/tokenize", **text, **fields).json()["tokens"]
            assert (tokens[0] == 7) is (said is not False)
            (choice,) = served.post("/v1/completions", **text, **short, **fields).json()["choices"]
            assert choice["prompt_token_ids"] == tokens
            tokens = served.post("/tokenize", **chat, **fields).json()["tokens"]
            assert (tokens[0] == 7) is (said is True)
            answer = served.post("/v1/chat/completions", **chat, **short, **fields).json()
            assert answer["prompt_token_ids"] == tokens

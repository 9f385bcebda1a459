"""What is said of EAGLE-3 heads that are not supported, not whole, or another target's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dp_runtime.models.registry import read_model_config
from dp_runtime.speculative.draft import read_draft_config
from tests.checkpoints import eagle3_checkpoint, tiny_checkpoint
from tests.dp_runtime.drafts import change_tensors, on_one_rank

VOCAB = 199


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("target"), num_experts=7, num_hidden_layers=6)


def refuse(target: Path, head: Path, *words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        on_one_rank(target, head, lambda rank: None)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("architectures", ["LlamaForCausalLM"], "LlamaForCausalLMEagle3"),
        ("model_type", "qwen3", "llama"),
        ("hidden_size", 128, "the target has 64"),
        ("target_hidden_size", 128, "the target has 64"),
        ("vocab_size", 200, "the target has 199"),
        ("draft_vocab_size", 200, "at most vocab_size 199"),
        ("num_hidden_layers", 2, "only 1"),
        ("num_key_value_heads", 3, "a divisor of num_attention_heads 2"),
        ("head_dim", 7, "an even number"),
        ("attention_bias", True, "only false"),
        ("norm_before_residual", True, "only false"),
        ("tie_word_embeddings", True, "only false"),
        ("hidden_act", "gelu", "silu"),
        ("quantization_config", {"quant_method": "awq"}, "not supported"),
        ("eagle_config", {"eagle_aux_hidden_state_layer_ids": [0, 3, 6]}, "the target's 6"),
        ("eagle_config", {"eagle_aux_hidden_state_layer_ids": [1, 3, 5]}, "the target's 6"),
        ("eagle_config", {"use_aux_hidden_state": False}, "only true"),
        ("eagle_config", {"tree": 3}, "not supported"),
    ],
)
def test_config_mistakes(
    name: str, value: object, words: str, target: Path, tmp_path: Path
) -> None:
    head = eagle3_checkpoint(tmp_path, target)
    path = head / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    refuse(target, head, "speculative_draft_model: config.json", name, words)


def test_default_layers_need_a_deep_target(tmp_path: Path) -> None:
    shallow = tiny_checkpoint(tmp_path / "target")
    head = eagle3_checkpoint(tmp_path / "head", shallow, layer_ids=None)
    refuse(shallow, head, "eagle_aux_hidden_state_layer_ids", "the target's 2")


def test_a_head_has_a_vocabulary_of_its_own(target: Path, tmp_path: Path) -> None:
    head, config = str(eagle3_checkpoint(tmp_path, target)), read_model_config(str(target))
    with pytest.raises(ValueError, match="speculative_draft_vocab: 9 is not allowed; None with "):
        read_draft_config(str(target), config, head, 9)


def test_no_directory_and_no_config(target: Path, tmp_path: Path) -> None:
    refuse(target, tmp_path / "nowhere", "speculative_draft_model", "an existing directory")
    refuse(target, tmp_path, "speculative_draft_model", "a directory with a config.json")
    head = eagle3_checkpoint(tmp_path / "head", target)
    (head / "model.safetensors").unlink()
    refuse(target, head, str(head), "a directory with model.safetensors")


@pytest.mark.parametrize(
    "name",
    ["fc.weight", "norm.weight", "lm_head.weight", "d2t", "midlayer.hidden_norm.weight",
     "midlayer.self_attn.q_proj.weight", "midlayer.mlp.down_proj.weight"],
)  # fmt: skip
def test_missing_and_misshaped_tensors(name: str, target: Path, tmp_path: Path) -> None:
    head = eagle3_checkpoint(tmp_path, target)
    change_tensors(head, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    refuse(target, head, name, "shape")
    change_tensors(head, lambda tensors: tensors.pop(name))
    refuse(target, head, f"tensor {name} is missing", str(head))


def test_tokens_outside_the_target_s_vocabulary(target: Path, tmp_path: Path) -> None:
    head = eagle3_checkpoint(tmp_path, target)
    for outside in (VOCAB, -100):
        change_tensors(head, lambda t, far=outside: t["d2t"].__setitem__(3, far - 3))  # type: ignore[misc]
        refuse(target, head, "d2t", f"[{outside}]", "tokens of the target, below 199")


def test_a_map_of_other_numbers(target: Path, tmp_path: Path) -> None:
    head = eagle3_checkpoint(tmp_path, target)
    change_tensors(head, lambda tensors: tensors.update(d2t=tensors["d2t"].float()))
    refuse(target, head, "d2t", "dtype: 'F32'", "I64")

"""config.json as it is published, and as it must be refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dp_runtime.models.config import ModelConfig
from dp_runtime.models.registry import read_model_config

QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_235B_A22B = QWEN3_30B_A3B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_window_layers": 94,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
    "num_hidden_layers": 94,
}
MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def parse(
    directory: Path, fields: dict[str, Any], generation: dict[str, Any] | None = None
) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(fields))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return read_model_config(str(directory))


def test_qwen3_30b_a3b(tmp_path: Path) -> None:
    generation = {"do_sample": True, "eos_token_id": [151645, 151643], "temperature": 0.6}
    config = parse(tmp_path, QWEN3_30B_A3B, generation)
    assert (config.hidden_size, config.num_layers, config.head_dim) == (2048, 48, 128)
    assert (config.num_heads, config.num_kv_heads) == (32, 4)
    assert (config.num_experts, config.num_experts_per_tok) == (128, 8)
    assert (config.moe_intermediate_size, config.norm_topk_prob) == (768, True)
    assert config.moe_layers == (True,) * 48
    assert (config.rope.type, config.rope.theta) == ("default", 1e6)
    assert config.eos_token_ids == (151645, 151643)
    assert config.qk_norm
    assert not config.attention_bias
    assert not config.tie_word_embeddings


def test_qwen3_235b_a22b(tmp_path: Path) -> None:
    config = parse(tmp_path, QWEN3_235B_A22B)
    assert (config.num_layers, config.num_heads, config.head_dim) == (94, 64, 128)
    assert config.moe_intermediate_size == 1536
    assert config.eos_token_ids == (151645,)


def test_mixtral_8x7b(tmp_path: Path) -> None:
    config = parse(tmp_path, MIXTRAL_8X7B)
    assert (config.head_dim, config.num_kv_heads, config.num_experts) == (128, 8, 8)
    assert (config.moe_intermediate_size, config.norm_topk_prob) == (14336, True)
    assert (config.rms_norm_eps, config.rope.theta) == (1e-5, 1e6)
    assert not config.qk_norm
    assert config.eos_token_ids == (2,)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": YARN},
        {"rope_scaling": {"type": "yarn", **{k: v for k, v in YARN.items() if k != "rope_type"}}},
        {"rope_parameters": {"rope_theta": 1e6, **YARN}, "rope_theta": None},
        {"rope_parameters": {"rope_theta": 1e6, "attention_factor": None, **YARN}},
    ],
    ids=["rope_scaling", "older type", "rope_parameters", "null factor"],
)
def test_yarn_in_every_layout(tmp_path: Path, fields: dict[str, Any]) -> None:
    config = parse(tmp_path, QWEN3_30B_A3B | fields)
    assert (config.rope.type, config.rope.theta, config.rope.factor) == ("yarn", 1e6, 4.0)
    assert config.rope.attention_factor == pytest.approx(1.138629436)
    assert (config.rope.beta_fast, config.rope.beta_slow, config.rope.truncate) == (32, 1, True)
    assert config.max_position_embeddings == 131072


def test_null_kv_heads_are_as_many_as_heads(tmp_path: Path) -> None:
    """As transformers 4 has it; 5 refuses null."""
    assert parse(tmp_path, MIXTRAL_8X7B | {"num_key_value_heads": None}).num_kv_heads == 32


def test_dense_layers(tmp_path: Path) -> None:
    fields = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    config = parse(tmp_path, QWEN3_30B_A3B | fields)
    assert config.moe_layers == (False, True, False, False, False, True)
    assert config.num_moe_layers == 2


def test_names_that_libraries_add(tmp_path: Path) -> None:
    fields = QWEN3_30B_A3B | {
        "num_local_experts": 16, "num_experts": None, "dtype": "bfloat16", "_name_or_path": "x",
        "num_nextn_predict_layers": 1, "mtp_use_dedicated_embeddings": False, "head_dim": None,
        "quantization_config": None, "sliding_window": 4096, "layer_types": ["full_attention"] * 48,
    }  # fmt: skip
    config = parse(tmp_path, fields)
    assert (config.num_experts, config.head_dim) == (16, 64)


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in QWEN3_30B_A3B.items() if key != name}


FP8: dict[str, Any] = {
    "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
    "modules_to_not_convert": ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(48))],
}  # fmt: skip


def quantized(message: str, **fields: Any) -> tuple[dict[str, Any], str]:
    return {"quantization_config": FP8 | fields}, message


def test_qwen3_30b_a3b_fp8(tmp_path: Path) -> None:
    assert parse(tmp_path, QWEN3_30B_A3B).fp8_experts == (False,) * 48
    assert parse(tmp_path, QWEN3_30B_A3B | {"quantization_config": FP8}).fp8_experts == (True,) * 48


@pytest.mark.parametrize(
    "name",
    ["model.layers.3", "model.layers.3.mlp.experts", "layers.3.mlp.experts.0.up_proj"],
)
def test_layers_whose_experts_are_not_quantised(tmp_path: Path, name: str) -> None:
    section = FP8 | {"modules_to_not_convert": ["lm_head", name]}
    found = parse(tmp_path, QWEN3_30B_A3B | {"quantization_config": section}).fp8_experts
    assert found == (True,) * 3 + (False,) + (True,) * 44


def test_mixtral_fp8(tmp_path: Path) -> None:
    section = FP8 | {"modules_to_not_convert": ["model.layers.1.block_sparse_moe"]}
    found = parse(tmp_path, MIXTRAL_8X7B | {"quantization_config": section}).fp8_experts
    assert found == (True, False, *(True,) * 30)


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"use_sliding_window": True}, "use_sliding_window: True is not allowed; only false"),
    ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not allowed; only \"silu\""),
    quantized("quant_method: 'gptq' is not allowed; only \"fp8\"", quant_method="gptq"),
    quantized('quant_method: None is not allowed; only "fp8"', quant_method=None),
    quantized("fmt: 'e5m2' is not allowed; only \"e4m3\"", fmt="e5m2"),
    quantized(
        "weight_block_size: [64, 128] is not allowed; only [128, 128]", weight_block_size=[64, 128]
    ),
    quantized("weight_block_size: None is not allowed", weight_block_size=None),
    quantized("activation_scheme: 'static'", activation_scheme="static"),
    quantized(
        "modules_to_not_convert: 'lm_head' is not allowed; a list", modules_to_not_convert="lm_head"
    ),
    quantized("quantization_config: kv_cache_scheme: 'x' is not allowed", kv_cache_scheme="x"),
    (
        {"quantization_config": FP8, "moe_intermediate_size": 704},
        "moe_intermediate_size: 704 is not allowed; a multiple of 128",
    ),
    ({"quantization_config": "fp8"}, "quantization_config: 'fp8' is not allowed; an object"),
    ({"shared_expert_intermediate_size": 512}, "shared_expert_intermediate_size: 512"),
    ({"layer_types": ["linear_attention"] * 48}, "layer_types: "),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type: 'dynamic'"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type: 'longrope'"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor: None is not allowed"),
    ({"rope_scaling": {**YARN, "surprise": 1}}, "rope_scaling: surprise: 1"),
    ({"rope_scaling": "yarn"}, "rope_scaling: 'yarn' is not allowed; an object or null"),
    ({"partial_rotary_factor": 0.25}, "partial_rotary_factor: 0.25"),
    ({"rope_theta": -1.0}, "rope_theta: -1.0"),
    ({"hidden_size": 0}, "hidden_size: 0 is not allowed; an integer >= 1"),
    ({"hidden_size": 2049}, "hidden_size: 2049 is not allowed; a multiple of 8"),
    ({"hidden_size": "2048"}, "hidden_size: '2048'"),
    ({"vocab_size": True}, "vocab_size: True"),
    ({"num_key_value_heads": 5}, "num_key_value_heads: 5 is not allowed; a divisor"),
    ({"num_experts_per_tok": 129}, "num_experts_per_tok: 129 is not allowed; at most"),
    ({"head_dim": 127}, "head_dim: 127 is not allowed; an even number"),
    ({"norm_topk_prob": 1}, "norm_topk_prob: 1 is not allowed; true or false"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps: nan"),
    ({"rope_theta": 1.0, "rope_scaling": YARN}, "rope_theta: 1.0 is not allowed; a number above 1"),
    ({"rope_scaling": {**YARN, "rope_theta": 0.5}}, "rope_theta: 0.5"),
    ({"rope_scaling": {**YARN, "factor": 1e300}}, "rope_scaling: factor: 1e+300"),
    ({"rope_scaling": {**YARN, "factor": 5000.0}}, "factor: 5000.0 is not allowed; at most 134"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 1e-300}}, "factor: 1e-300"),
    ({"rope_scaling": {**YARN, "attention_factor": 1e300}}, "attention_factor: 1e+300"),
    ({"window_size": 128}, "window_size: 128"),
    ({"final_logit_softcap": 30.0}, "final_logit_softcap: 30.0"),
    ({"headwise_attn_output_gate": True}, "headwise_attn_output_gate: True"),
    ({"router_score_function": "sigmoid"}, "router_score_function: 'sigmoid'"),
    ({"mlp_only_layers": [48]}, "mlp_only_layers: (48,)"),
    ({"eos_token_id": "</s>"}, "eos_token_id: '</s>'"),
    ({"model_type": "qwen3"}, "model_type: 'qwen3'"),
    ({"num_experts": None}, "num_experts: None"),
    ({"architectures": ["LlamaForCausalLM"]}, "architectures: ['LlamaForCausalLM']"),
    ({"architectures": None}, "one of Qwen3MoeForCausalLM, MixtralForCausalLM"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS, ids=[m[:30] for _, m in BAD_FIELDS])
def test_unsupported_fields_are_one_line(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=r"^config\.json: ") as caught:
        parse(tmp_path, QWEN3_30B_A3B | fields)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["hidden_size", "num_experts", "moe_intermediate_size"])
def test_missing_fields(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"config.json: {name}: None is not allowed"):
        parse(tmp_path, without(name))


@pytest.mark.parametrize("used", [None, False, True])
def test_mixtral_serves_its_sliding_window_and_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, used: bool | None
) -> None:
    config = parse(tmp_path, MIXTRAL_8X7B | {"sliding_window": 4096, "use_sliding_window": used})
    with caplog.at_level("INFO", "dp_runtime"):
        assert config.resolve_max_model_len(None) == 4096
    assert "max_model_len is 4096: the model's sliding_window" in caplog.text
    assert config.resolve_max_model_len(4096) == 4096
    assert config.resolve_max_model_len(100) == 100
    with pytest.raises(ValueError, match=r"max_model_len: 4097 .*sliding_window 4096"):
        config.resolve_max_model_len(4097)


def test_a_window_as_long_as_the_context_is_none(tmp_path: Path) -> None:
    config = parse(tmp_path, MIXTRAL_8X7B | {"sliding_window": 32768})
    assert config.resolve_max_model_len(None) == 32768
    with pytest.raises(ValueError, match=r"max_model_len: 32769 .*the model has 32768 positions"):
        config.resolve_max_model_len(32769)


TOO_LARGE = {
    "num_hidden_layers": 10_000_000, "num_experts": 10**9, "vocab_size": 2**63,
    "hidden_size": 2**40, "moe_intermediate_size": 2**33, "num_attention_heads": 10**6,
    "max_position_embeddings": 2**31, "head_dim": 10**5, "eos_token_id": 2**63,
    "num_experts_per_tok": 10**400, "decoder_sparse_step": 2**70, "rope_theta": 10**400,
}  # fmt: skip


@pytest.mark.parametrize("name", TOO_LARGE)
def test_sizes_without_end_are_one_short_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"^config.json: {name}: ") as caught:
        parse(tmp_path, QWEN3_30B_A3B | {name: TOO_LARGE[name]})
    assert len(str(caught.value)) < 400


def test_layers_times_experts_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_hidden_layers: 1000 is not allowed; at most"):
        parse(tmp_path, QWEN3_30B_A3B | {"num_hidden_layers": 1000, "num_experts": 4000})


def test_long_names_and_values_are_cut(tmp_path: Path) -> None:
    fields = {"hidden_act": "x" * 100_000, "y" * 100_000: 1}
    with pytest.raises(ValueError, match="hidden_act: 'xxx") as caught:
        parse(tmp_path, QWEN3_30B_A3B | fields)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_only_regular_files_are_read(tmp_path: Path, file: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    (tmp_path / file).unlink(missing_ok=True)
    os.mkfifo(tmp_path / file)
    with pytest.raises(ValueError, match=f"{file}: 'p.*' is not allowed; a regular file"):
        read_model_config(str(tmp_path))


def test_an_adapter_beside_the_model_is_not_overlooked(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=r"adapter_config\.json: 'present' .*merge it"):
        parse(tmp_path, QWEN3_30B_A3B)


def test_missing_directory_and_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model: '.*nowhere' is not allowed; an existing"):
        read_model_config(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"a directory with a config\.json"):
        read_model_config(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[1]", "a JSON object"),
        (b"[" * 100_000, "not valid JSON: nested too deeply"),
        (b'{"vocab_size": 1' + b"0" * 5000 + b"}", "not valid JSON"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_malformed_files(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_model_config(str(tmp_path))
    assert str(tmp_path / file) in str(caught.value)
    assert "\n" not in str(caught.value)
